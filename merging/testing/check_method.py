"""The laws of merging methods, tried on small random models."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.api.merge_files import merge, preview
from merging.api.merge_tensors import merge_deltas, merge_state_dicts
from merging.maths.delta import Delta, LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.site import Site
from merging.methods import chain
from merging.methods.contract.method import Method
from merging.plan.items import TILE
from merging.plan.recipe import Recipe
from merging.plan.recipe_files import load_recipe
from merging.sources.stored import open_safetensors

__all__ = ["check_method"]

_SHAPES = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.1.mlp.up_proj.weight": (24, 8),
    "model.layers.1.input_layernorm.weight": (8,),
}

_CUT = (TILE // 500 + 40, 500)
"""The shape of a matrix with more elements than a tile, which is cut unless a method needs all of it."""

Tensors = dict[str, Tensor]


def check_method(method: str | Method, *, within: float = 1e-5, **parameters: Any) -> None:
    """Check that a method does what its declaration promises.

    - It gives the same each time, in the shapes and types of the base, and does not change its inputs.
    - It does not depend on the order of the tensors, nor on the number of threads.
    - On files, where tensors are cut into the pieces that it declares, it gives the result that it gives in memory.
    - A method of changes changes nothing where no model does.
    - Low-rank changes stay low-rank if it says so, and only then, unless it looks at the base's values.
    - Its parameters are the same after a recipe was written and read.

    Args:
        method: a method, its name, or a chain.
        within: how far results that need not be equal to the bit may differ, relative and absolute.
        parameters: the method's parameters, where ``method`` is a name.

    Raises:
        AssertionError: a law does not hold; the message says which.
        MergingError: the method refuses its parameters or the number of models.
    """
    checked = chain(method, parameters) if isinstance(method, str) else method
    most = min(link.models[1] or 3 for link in checked.links())
    base = _random(checked, 0, 1.0)
    models = [_sum(base, _random(checked, seed, 0.1)) for seed in range(1, most + 1)]
    _check_in_memory(checked, base, models, within)
    _check_on_files(checked, base, models, within)
    if (checked.merge_space == "delta" or checked.factored) and not checked.needs_base:
        _check_factors(checked, most)
    _check_recipe(checked, method if isinstance(method, str) else checked.chain)


def _check_in_memory(method: Method, base: Tensors, models: list[Tensors], within: float) -> None:
    before = [{name: value.clone() for name, value in tensors.items()} for tensors in (base, *models)]
    merged = merge_state_dicts(models, method=method, base=base)
    _require(_equal(merged, merge_state_dicts(models, method=method, base=base)), method, "gives the same each time")
    _require(all(map(_equal, before, (base, *models))), method, "leaves its inputs alone")
    backwards = [dict(reversed(tensors.items())) for tensors in models]
    again = merge_state_dicts(backwards, method=method, base=dict(reversed(base.items())))
    _require(_equal(merged, again), method, "merges each tensor whatever the order of the tensors")
    wide = merge_state_dicts(
        [_cast(each, torch.float64) for each in models], method=method, base=_cast(base, torch.float64)
    )
    _require(
        _near(_cast(wide, torch.float32), merged, max(within, 1e-3)),
        method,
        "gives in float64 what it gives in float32",
    )
    if method.merge_space == "delta":
        unchanged = merge_state_dicts([base] * len(models), method=method, base=base)
        _require(_near(unchanged, base, 1e-6), method, "changes nothing where no model changes anything")


def _check_on_files(method: Method, base: Tensors, models: list[Tensors], within: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / f"{number}.bin" for number in range(len(models) + 1)]
        for path, tensors in zip(paths, (base, *models), strict=True):
            torch.save(tensors, path)
        options: dict[str, Any] = {"method": method, "base": paths[0]}
        plan = preview(paths[1:], **options)
        wanted = merge_state_dicts(models, method=method, base=base, keys=plan.keys)
        outputs = [folder / f"merged{threads}.safetensors" for threads in (1, 3)]
        merge(paths[1:], output=outputs[0], threads=1, max_memory=plan.memory(1), **options)
        merge(paths[1:], output=outputs[1], threads=3, **options)
        got = _load(outputs[0])
        law = f"is exact on the pieces that it declares ({method.grain_at(plan.items[0].site)})"
        _require(_near(got, wanted, within), method, law)
        _require(_equal(got, _load(outputs[1])), method, "gives the same bytes with any number of threads")


def _check_factors(method: Method, models: int) -> None:
    random = torch.Generator().manual_seed(0)
    adapters: list[dict[str, Delta]] = [
        {
            f"layers.{layer}.q.weight": LowRank(
                torch.randn(6, 2, generator=random), torch.randn(2, 5, generator=random), (6, 5)
            )
            for layer in range(2)
        }
        for _ in range(models)
    ]
    merged = merge_deltas(adapters, method=method)
    kept = all(isinstance(delta, LowRank) for delta in merged.values())
    _require(kept == method.factored, method, f"is {'' if method.factored else 'not '}factored, as it says")


def _check_recipe(method: Method, text: str) -> None:
    recipe = Recipe(models=("one", "other"), method=method)
    _require(load_recipe(recipe.to_yaml()) == recipe, method, "is the same after a recipe was written and read")
    _require(
        hash(method) == hash(load_recipe(recipe.to_yaml()).method), method, "has a hash that follows from its values"
    )
    _require(chain(text).chain == method.chain, method, "is found by its name")


def _require(holds: bool, method: Method, law: str) -> None:
    if not holds:
        raise AssertionError(f"{method!r} ({method.chain}) breaks a law of methods: it {law}")


def _random(method: Method, seed: int, size: float) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    cut = {} if method.grain_at(Site("", _CUT)) == "matrix" else {"model.layers.1.mlp.up_proj.weight": _CUT}
    return {name: size * torch.randn(shape, generator=random) for name, shape in {**_SHAPES, **cut}.items()}


def _load(path: Path) -> Tensors:
    return {name: stored.read() for name, stored in open_safetensors(path)[0].items()}


def _sum(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensors:
    return {name: value + other[name] for name, value in one.items()}


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    return {name: value.to(dtype) for name, value in tensors.items()}


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _near(one: Mapping[str, Tensor], other: Mapping[str, Tensor], within: float) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and torch.allclose(value, other[name], rtol=within, atol=within)
        for name, value in one.items()
    )
