"""What PEFT's own merge of adapters gets wrong, beside ours; both against the sum of what each adapter changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from support.adapters import QUIRKS, State, assert_close, baked, peft, reload, save_base, train, trained
from support.peft_types import TYPES

pytestmark = [
    *QUIRKS,
    *TYPES,
    # PEFT says that it changes the base for a second PiSSA, and that it overwrites what it had targeted
    pytest.mark.filterwarnings("ignore:.*"),
]

Q, QV = ["q_proj"], ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Defect:
    """Two adapters (or one) that PEFT merges by ``how``; ``says`` is what it raises, where it does."""

    how: str
    settings: Sequence[dict[str, Any]]
    targets: Sequence[list[str]] = (Q, Q)
    architecture: str = "llama"
    weights: Sequence[float] = (1.0, 0.5)
    says: str = ""
    peer: dict[str, Any] = field(default_factory=dict)
    needs_base: bool = False


DEFECTS: dict[str, Defect] = {
    "rsLoRA keeps its scale": Defect("cat", [{"use_rslora": True}] * 2),
    "rsLoRA in an SVD": Defect("svd", [{"use_rslora": True}] * 2, peer={"svd_rank": 8}),
    "cross terms": Defect("linear", [{}] * 2),
    "a bias": Defect("cat", [{"lora_bias": True}] * 2, architecture="qwen2", needs_base=True),
    "modules saved in full": Defect(
        "cat", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}], needs_base=True
    ),
    "PiSSA": Defect("cat", [{"init_lora_weights": "pissa"}] * 2, needs_base=True),
    "layers of one adapter only": Defect("cat", [{"layers_to_transform": [0]}, {"layers_to_transform": [1]}]),
    "modules left out by one": Defect("cat", [{"exclude_modules": ["v_proj"]}, {}], [QV, QV]),
    "ranks that differ by module": Defect(
        "linear", [{"rank_pattern": {"layers.0.self_attn.q_proj": 2}}, {}], says="size of tensor|stack expects"
    ),
    "convolutions in an SVD": Defect(
        "svd", [{}] * 2, [["convolution"]] * 2, "resnet", says="shape|dim|size|expected", peer={"svd_rank": 8}
    ),
    "half precision": Defect("cat", [{"dtype": torch.bfloat16}] * 2),
}


def by_peft(base: Path, adapters: Sequence[Path], defect: Defect) -> State:
    """The model that PEFT's merge of the adapters makes."""
    first, *others = adapters
    model = peft.PeftModel.from_pretrained(reload(base), first, adapter_name="0")
    for i, each in enumerate(others, 1):
        model.load_adapter(each, str(i))
    names = [str(i) for i in range(len(adapters))]
    model.add_weighted_adapter(names, list(defect.weights), "merged", combination_type=defect.how, **defect.peer)
    model.set_adapter("merged")
    model.save_pretrained(base.parent / "theirs", selected_adapters=["merged"])
    merged = peft.PeftModel.from_pretrained(reload(base), base.parent / "theirs" / "merged").merge_and_unload()
    return {name: value.clone() for name, value in merged.state_dict().items()}


@pytest.mark.parametrize("case", DEFECTS)
def test_ours_is_the_sum_of_the_changes(tmp_path: Path, case: str) -> None:
    """And PEFT 0.21's is not, or does not come about; each way of its own that should be exact there."""
    defect = DEFECTS[case]
    base = save_base(tmp_path / "base", defect.architecture)
    parts = zip(defect.targets, defect.settings, strict=True)
    adapters = [train(tmp_path / f"{i}", base, i, targets, **each) for i, (targets, each) in enumerate(parts)]
    wanted = trained(base, *adapters).plus(*defect.weights)
    options: dict[str, Any] = {"method": "task_arithmetic", "weights": defect.weights, "dtype": "float32"}
    merging.merge(adapters, base=base if defect.needs_base else None, output=tmp_path / "ours", **options)
    assert_close(baked(base, tmp_path / "ours"), wanted)
    if not peft.__version__.startswith("0.21."):
        return
    if defect.says:
        with pytest.raises(Exception, match=defect.says):
            by_peft(base, adapters, defect)
        return
    theirs = by_peft(base, adapters, defect)
    off = max(float((theirs[name].double() - wanted[name]).abs().max()) for name in wanted)
    print(case, off)
    assert off > 1e-3, off
