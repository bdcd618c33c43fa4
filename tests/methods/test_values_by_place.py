"""Numbers of every method that differ from tensor to tensor: each tensor is merged as with its value everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, equal

import merging
from merging.cli.fields import field_option
from merging.cli.types import ValuesType
from merging.errors import OptionError
from merging.maths.delta import LowRank
from merging.methods import METHODS, chain, method_class, parameters_of
from support.changes import K, changes, dense
from support.tiny import checkpoint, load

SAME_EVERYWHERE = {"seed", "blocks", "ctm.max_rank"}
"""Numbers that mean the same wherever they are, the rank of an adapter, and weights by block, written another way."""

SHARES = {"ties": {"scope": "tensor"}, "pcb": {"scope": "tensor"}}
"""Settings with which a share is a share of each tensor."""

NUMBERS = [
    ("breadcrumbs+task_arithmetic", "density", 0.9, 0.4),
    ("breadcrumbs+task_arithmetic", "gamma", 0.01, 0.2),
    ("consensus", "agree", 1, 2),
    ("consensus", "threshold", 0.1, 0.9),
    ("dare+task_arithmetic", "drop", 0.1, 0.9),
    ("della+task_arithmetic", "density", 0.5, 0.7),
    ("della+task_arithmetic", "epsilon", 0.1, 0.3),
    ("iso_cts", "common", 0.3, 0.9),
    ("karcher", "max_iter", 1, 10),
    ("karcher", "tol", 0.5, 1e-5),
    ("lines+task_arithmetic", "alpha", 0.1, 0.6),
    ("lines+task_arithmetic", "beta", 0.1, 0.9),
    ("nearswap", "t", 0.001, 0.1),
    ("pcb", "clip", 0.01, 0.2),
    ("pcb", "ratio", 0.1, 0.5),
    ("ram", "epsilon", 0.001, 1.0),
    ("ramplus_tl", "alpha", 0.01, 5.0),
    ("ramplus_tl", "r", 0.1, 2.0),
    ("sce", "density", 0.1, 1.0),
    ("svd", "energy", 0.3, 0.9),
    ("svd", "max_rank", 1, 5),
    ("ties", "density", 0.1, 0.6),
]
"""Numbers of methods whose merge of one tensor does not depend on the others, with two values."""

ON_ADAPTERS = [
    ("do", "gamma", 0.01, 10.0),
    ("do", "steps", 0, 50),
    ("orthogonalize+task_arithmetic", "gamma", 0.01, 10.0),
    ("orthogonalize+task_arithmetic", "steps", 0, 50),
]


def options_of(method: str, field: str, value: Any) -> dict[str, Any]:
    options = {**SHARES.get(method, {}), field: value}
    if method == "karcher":
        options["space"] = "changes"
    return options


def merged(models: Any, method: str, field: str, value: Any) -> dict[str, Tensor]:
    got = merging.merge_deltas(models, method=method, **options_of(method, field, value))
    return {name: delta.dense() for name, delta in got.items()}


def go_by_name(models: Any, method: str, field: str, one: float, other: float) -> bool:
    """Whether K is merged as with the one value everywhere, and the other tensors as with the other."""
    first, second = (merged(models, method, field, value) for value in (one, other))
    got = merged(models, method, field, {K: one, "*": other})
    return not equal(first[K], second[K]) and all(
        equal(value, (first if name == K else second)[name]) for name, value in got.items()
    )


@pytest.mark.parametrize(("method", "field", "one", "other"), NUMBERS)
def test_values_by_name(method: str, field: str, one: float, other: float) -> None:
    models = changes(3, 5)
    assert go_by_name(dense(models[:1] if method == "nearswap" else models), method, field, one, other)


@pytest.mark.parametrize(("method", "field", "one", "other"), ON_ADAPTERS)
def test_values_by_name_on_adapters(method: str, field: str, one: float, other: float) -> None:
    ups, downs = changes(2, 1, shapes={K: (8, 3), "q": (8, 3)}), changes(2, 2, shapes={K: (3, 9), "q": (3, 9)})
    models = [
        {name: LowRank(up[name], down[name], (8, 9), False) for name in up} for up, down in zip(ups, downs, strict=True)
    ]
    assert go_by_name(models, method, field, one, other)


@pytest.mark.parametrize("method", METHODS)
def test_every_number_may_differ(method: str) -> None:
    """By its declaration, on the command line too; the tests above try them."""
    cls = method_class(method)
    for field in parameters_of(cls):
        kinds = str(cls.model_fields[field].annotation)
        if ("int" in kinds or "float" in kinds) and not {field, f"{method}.{field}"} & SAME_EVERYWHERE:
            chain(method, {field: {"a": 1, "*": 1}} if "int" in kinds else {field: {"a": 0.5, "*": "0.25:0.5"}})
            assert isinstance(field_option(field, cls.model_fields[field]).type, ValuesType)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("pcb", {"ratio": {"q": 0.1, "*": 0.2}}, "pcb.ratio is a share of the whole model"),
        ("pcb", {"clip": "0.1:0.2"}, "pcb.clip is a share of the whole model"),
        ("consensus", {"agree": {"q": 1.5, "*": 2}}, "a whole number"),
        ("consensus", {"agree": {"q": 4, "*": 2}}, "consensus.agree = 4, and only 3 models were given"),
        ("svd", {"max_rank": {"q": 0, "*": 2}}, "max_rank"),
        ("opcm", {"alpha": {"q": 2, "*": 0}}, "alpha"),
    ],
)
def test_values_that_are_refused(method: str, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merging.merge_deltas(dense(changes(3)), method=method, **options)


@pytest.mark.parametrize("method", ["breadcrumbs+ties", "sce", "pcb", "opcm", "iso_cts", "lines+ties"])
def test_values_by_name_in_files(method: str, tmp_path: Path) -> None:
    """The engine merges files as the same tensors in memory are merged."""
    base, tuned = checkpoint(tmp_path, 2)
    fields = {"sce": "density", "pcb": "ratio", "opcm": "alpha", "iso_cts": "common", "lines+ties": "beta"}
    values: Any = {"layers.1": 0.3, "*": "0.5:0.8"}
    options: Any = {"breadcrumbs.density": values} if method not in fields else {fields[method]: values}
    options |= {"ties.density": values, "scope": "tensor"} if "breadcrumbs" in method else SHARES.get(method, {})
    merging.merge(tuned, method=method, base=base, output=tmp_path / "out", **options)
    loaded = [load(path) for path in (base, *tuned)]
    want = merging.merge_state_dicts(loaded[1:], method=method, base=loaded[0], **options)
    got = load(tmp_path / "out")
    assert all((got[name] - want[name]).abs().max() < 1e-5 for name in want)


def test_a_large_tensor_is_not_split_where_shares_differ(tmp_path: Path) -> None:
    """A share is a share of the whole tensor, also where the share depends on the tensor."""
    base, tuned = checkpoint(tmp_path, 2)
    for method, options in (
        ("breadcrumbs", {"density": {"*": 0.5}}),
        ("pcb", {"ratio": {"*": 0.5}, "scope": "tensor"}),
    ):
        plan = merging.preview(tuned, method=method, base=base, **options)
        assert {item.cut.splits for item in plan.items} == {False}
