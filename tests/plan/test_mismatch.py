"""Checkpoints of one model that differ in types, names, heads or shapes: merged, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from merging.errors import InputError
from support.tiny import CONFIG, fine_tune, load, model, save


def merged(paths: list[Path], output: Path, **options: Any) -> dict[str, torch.Tensor]:
    """A linear merge, loaded."""
    merging.merge(paths, method="linear", output=output, **options)
    return load(output)


def mean(*models: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The average, tensor by tensor, in the first model's types."""
    return {
        name: (sum(each[name].double() for each in models) / len(models)).to(value.dtype)
        for name, value in models[0].items()
    }


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal names, shapes and types, and values equal but for rounding."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.allclose(value.double(), other[name].double(), atol=1e-6, rtol=1e-2)
        for name, value in one.items()
    )


def test_mixed_dtypes_are_the_first_models(tmp_path: Path) -> None:
    one, two = model(1, dtype=torch.bfloat16), model(2, dtype=torch.float16)
    one["model.norm.weight"] = one["model.norm.weight"].double()
    got = merged([save(tmp_path / "a", one), save(tmp_path / "b", two)], tmp_path / "out")
    assert close(got, mean(one, two))


@pytest.mark.parametrize("differs", [False, True])
def test_integers_are_the_bases_with_a_notice_if_they_differ(tmp_path: Path, differs: bool) -> None:
    base = {**model(0), "position_ids": torch.arange(5), "mask": torch.tensor([True, False])}
    tuned = fine_tune(base, 1)
    if differs:
        tuned["position_ids"] = tuned["position_ids"] + 1
    paths = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    done = merging.merge([paths[1]], method="task_arithmetic", base=paths[0], output=tmp_path / "out")
    got = load(tmp_path / "out")
    assert torch.equal(got["position_ids"], base["position_ids"])
    assert torch.equal(got["mask"], base["mask"])
    said = [notice for notice in done.notices if "integers are not merged" in notice]
    assert len(said) == differs
    assert all("position_ids of" in notice and str(paths[1]) in notice for notice in said)


def untied(seed: int) -> dict[str, torch.Tensor]:
    return model(seed)


def without_head(seed: int) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model(seed).items() if name != "lm_head.weight"}


TIED = CONFIG | {"tie_word_embeddings": True}


@pytest.mark.parametrize("first_is_tied", [False, True])
def test_tied_and_untied_heads(tmp_path: Path, first_is_tied: bool) -> None:
    """A tied head is its embedding, and the result has a head of its own, which its config says."""
    paths = [save(tmp_path / "untied", untied(1)), save(tmp_path / "tied", without_head(2), TIED)]
    got = merged(paths[::-1] if first_is_tied else paths, tmp_path / "out")
    tied = without_head(2)
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    assert close(got, mean(untied(1), tied))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"tied{seed}", without_head(seed), TIED) for seed in (1, 2)]
    assert close(merged(paths, tmp_path / "out"), mean(without_head(1), without_head(2)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_missing_head_of_an_untied_model(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a", untied(1)), save(tmp_path / "b", without_head(2))]
    with pytest.raises(InputError, match=r"b lacks lm_head\.weight"):
        merged(paths, tmp_path / "out")


@pytest.mark.parametrize("more_first", [False, True])
@pytest.mark.parametrize("prefix", ["model.", "language_model."])
def test_prefix_drift(tmp_path: Path, more_first: bool, prefix: str) -> None:
    """The same network, saved with and without a wrapper: the names of the first come out."""
    one, two = model(1), model(2)
    paths = [
        save(tmp_path / "a", {prefix + name if more_first else name: value for name, value in one.items()}),
        save(tmp_path / "b", {name if more_first else prefix + name: value for name, value in two.items()}),
    ]
    want = {prefix + name if more_first else name: value for name, value in mean(one, two).items()}
    assert close(merged(paths, tmp_path / "out"), want)


BERT = {
    "bert.encoder.layer.0.output.dense.weight": (4, 4),
    "bert.encoder.layer.0.output.LayerNorm.weight": (4,),
    "bert.encoder.layer.0.output.LayerNorm.bias": (4,),
}


OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def bert(seed: int, old: bool, prefix: str = "bert.") -> dict[str, torch.Tensor]:
    """A block of BERT, with the names of 2018 or today's."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in BERT.items():
        for new, legacy in OLD.items() if old else ():
            name = name.replace(new, legacy)
        tensors[prefix + name.removeprefix("bert.")] = torch.randn(shape, generator=random)
    return tensors


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("first_is_old", [False, True])
def test_old_names_of_norms(tmp_path: Path, first_is_old: bool, prefix: str) -> None:
    """bert-base-uncased still has them, and its fine-tunes do not."""
    paths = [save(tmp_path / "a", bert(1, first_is_old)), save(tmp_path / "b", bert(2, not first_is_old, prefix))]
    got = merged(paths, tmp_path / "out")
    assert close(got, mean(bert(1, first_is_old), bert(2, first_is_old)))


def spoiled(tmp_path: Path, kind: str) -> tuple[list[Path], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two models the second of which does not fit in one tensor."""
    one, two = model(1), model(2)
    if kind == "shape":
        two["lm_head.weight"] = torch.zeros(13, 8)
    elif kind == "missing":
        del two["model.layers.1.mlp.up_proj.weight"]
    elif kind == "type":
        two["model.norm.weight"] = torch.zeros(8, dtype=torch.int64)
    else:
        two["model.layers.1.mlp.up_proj.bias"] = torch.zeros(16)
    return [save(tmp_path / "a", one), save(tmp_path / "b", two)], one, two


MISMATCHES = {
    "shape": ("lm_head.weight", r"lm_head\.weight of \S*b has the shape \(13, 8\) instead of \(12, 8\)"),
    "missing": ("model.layers.1.mlp.up_proj.weight", r"b lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "type": ("model.norm.weight", r"model\.norm\.weight of \S*b has the type I64"),
    "extra": ("", r"b has model\.layers\.1\.mlp\.up_proj\.bias, which the other lacks"),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_mismatch_is_an_error_that_names_tensor_and_file(tmp_path: Path, kind: str) -> None:
    paths, _, _ = spoiled(tmp_path, kind)
    with pytest.raises(InputError, match=f'{MISMATCHES[kind][1]}.*on_mismatch="base"'):
        merged(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", MISMATCHES)
def test_mismatch_can_keep_the_bases(tmp_path: Path, kind: str) -> None:
    paths, one, two = spoiled(tmp_path, kind)
    odd = MISMATCHES[kind][0]
    got = merged(paths, tmp_path / "out", on_mismatch="base")
    kept = {name: one[name] if name == odd else two[name] for name in one}
    assert close(got, mean(one, kept))


@pytest.mark.parametrize("first", ["smaller", "larger"])
def test_tensors_left_to_the_base_are_counted_and_named(tmp_path: Path, first: str) -> None:
    """Whichever model comes first: the tensors of blocks that the other lacks are not dropped in silence."""
    larger = model(1)
    odd = sorted(name for name in larger if ".layers." in name)
    smaller = {name: value for name, value in larger.items() if name not in odd}
    paths = {"smaller": save(tmp_path / "smaller", smaller), "larger": save(tmp_path / "larger", larger)}
    order = [first, *({"smaller", "larger"} - {first})]
    plan = merging.preview([paths[name] for name in order], method="linear", on_mismatch="base")
    lines = "\n".join([*plan.matched, *plan.notices])
    assert f"{order[1]}: {len(smaller)} of {len(larger)} tensors matched" in lines
    what = f"differ are {order[0]}'s" if first == "larger" else f"{paths['smaller']} lacks are left out"
    assert f'{len(odd)} tensors that {what} (on_mismatch="base"' in lines
    assert all(name in lines for name in odd[:3])
    assert f"and {len(odd) - 3} more" in lines
    assert len(plan.items) == len(larger if first == "larger" else smaller)


def test_unrelated_models_are_refused(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a", model(1)), save(tmp_path / "b", bert(1, False))]
    with pytest.raises(InputError, match=r"do not hold the same tensors as \S*a: .* more"):
        merged(paths, tmp_path / "out")
