"""Carrying out a plan: the same bytes under all conditions, values that are refused, statistics and grains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

import merging
from merging.api.merge_files import merge_plan, plan_for
from merging.engine import tiles
from merging.errors import FormatError, OptionError
from merging.maths.delta import Delta, Dense, Stack
from merging.maths.order_statistics import Rank
from merging.maths.radix_selection import OrderStatistics
from merging.maths.reductions import Sum
from merging.maths.site import Site
from merging.methods import chain
from merging.methods.contract.method import Method, Statistic, Statistics
from merging.methods.contract.wrapper import Unwrapped, Wrapper
from merging.methods.lines import Lines
from merging.methods.slerp import Slerp
from merging.methods.task_arithmetic import TaskArithmetic
from merging.plan.recipe import Recipe
from support.tiny import CONFIG, checkpoint, fine_tune, identical, load, model, save

Tensors = dict[str, Tensor]


class Trim(Method):
    """Sum of what is among the largest changes of each whole model."""

    name: ClassVar[str] = "trim"
    summary: ClassVar[str] = "test"
    density: float = Field(0.3)

    def required_statistics(self) -> tuple[Statistic, ...]:
        def of(stack: Stack, site: Site, statistics: Statistics) -> Tensor:
            return stack.dense().abs()

        return (Statistic("threshold", OrderStatistics((Rank.largest(self.density),)), of),)

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        values = stack.dense()
        least = statistics["threshold"][:, 0].to(values).view(-1, *[1] * (values.dim() - 1))
        return Dense((values * (values.abs() >= least)).sum(0))


class Normed(Method):
    """Mean of the changes, each divided by its size in this tensor, relative to its size in the whole model."""

    name: ClassVar[str] = "normed"
    summary: ClassVar[str] = "test"

    def required_statistics(self) -> tuple[Statistic, ...]:
        def sizes(stack: Stack, site: Site, statistics: Statistics) -> Tensor:
            return stack.dense().abs()

        def shares(stack: Stack, site: Site, statistics: Statistics) -> Tensor:
            values = stack.dense()
            return values.abs() / statistics["model"].to(values).view(-1, *[1] * (values.dim() - 1))

        return Statistic("model", Sum(), sizes), Statistic("tensor", Sum(), shares, per="tensor")

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        values = stack.dense()
        return Dense((values / statistics["tensor"].to(values).view(-1, *[1] * (values.dim() - 1))).mean(0))


class Nearest(Method):
    """The orthogonal matrix nearest to the mean change; vectors are averaged."""

    name: ClassVar[str] = "nearest"
    summary: ClassVar[str] = "test"

    def grain_at(self, site: Site) -> Literal["element", "matrix"]:
        return "matrix"

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        assert tuple(stack.dense().shape[1:]) == site.shape
        return Dense(nearest(stack.dense().mean(0)))


def nearest(mean: Tensor) -> Tensor:
    if mean.dim() < 2 or not mean.numel():
        return mean
    u, _, vh = torch.linalg.svd(mean, full_matrices=False)
    return u @ vh


class Squared(Wrapper):
    """The method inside sees squares with their signs."""

    name: ClassVar[str] = "squared"
    summary: ClassVar[str] = "test"

    def unwrap(self, stack: Stack, site: Site, statistics: Statistics) -> Unwrapped:
        squares = stack.map(lambda d: Dense(square(d.dense())))
        return Unwrapped(self.then, squares, site, lambda merged: Dense(root(merged.dense())))


def square(values: Tensor) -> Tensor:
    return values * values.abs()


def root(values: Tensor) -> Tensor:
    return values.sign() * values.abs().sqrt()


def deltas(base: Tensors, tuned: list[Tensors]) -> list[Tensors]:
    return [{name: each[name].double() - base[name].double() for name in base} for each in tuned]


def trim(changes: list[Tensors], density: float = 0.3) -> Tensors:
    kept: list[Tensors] = []
    for change in changes:
        flat = torch.cat([value.flatten() for value in change.values()]).float().abs().sort(descending=True).values
        least = flat[max(1, int(density * len(flat))) - 1]
        kept.append({name: value * (value.float().abs() >= least) for name, value in change.items()})
    return {name: sum(each[name] for each in kept) for name in changes[0]}


def normed(changes: list[Tensors]) -> Tensors:
    whole = [sum(value.abs().sum() for value in change.values()) for change in changes]
    parts = [
        {n: v / (v.abs().sum() / size) for n, v in change.items()} for change, size in zip(changes, whole, strict=True)
    ]
    return {name: sum(each[name] for each in parts) / len(parts) for name in changes[0]}


def average(changes: list[Tensors]) -> Tensors:
    return {name: sum(each[name] for each in changes) / len(changes) for name in changes[0]}


def squared(inside: Callable[[list[Tensors]], Tensors], changes: list[Tensors]) -> Tensors:
    merged = inside([{name: square(value) for name, value in change.items()} for change in changes])
    return {name: root(value) for name, value in merged.items()}


def slerp(one: Tensors, two: Tensors, t: float) -> Tensors:
    merged = {}
    for name in one:
        v0, v1 = one[name].double().flatten(), two[name].double().flatten()
        omega = torch.acos(v0 @ v1 / (v0.norm() * v1.norm()))
        flat = (torch.sin((1 - t) * omega) * v0 + torch.sin(t * omega) * v1) / torch.sin(omega)
        merged[name] = flat.view(one[name].shape)
    return merged


def depths(layers: int = 3, tail: float = 0.0) -> dict[str, float]:
    found = {"model.embed_tokens.weight": 0.0, "model.norm.weight": tail, "lm_head.weight": tail}
    for layer in range(layers):
        for part in ("mlp.up_proj", "input_layernorm"):
            found[f"model.layers.{layer}.{part}.weight"] = layer / (layers - 1) if layers > 1 else 1.0
    return found


def lines(merged: Tensors, plain: Tensors, n: int, beta: float = 0.5, alpha: float | None = None,
          published: bool = False, tail: float = 0.0) -> Tensors:  # fmt: skip
    """The merged change scaled by depth; ``plain`` is the sum of the changes."""
    nu = float(sum(v.abs().sum() for v in plain.values()) / sum(v.abs().sum() for v in merged.values()))
    first = nu / n if alpha is None else alpha
    grow = beta if published else beta * nu
    return {name: (first + grow * depths(tail=tail)[name]) * value for name, value in merged.items()}


def total(changes: list[Tensors]) -> Tensors:
    return {name: sum(each[name] for each in changes) for name in changes[0]}


def plus(base: Tensors, change: Tensors) -> Tensors:
    return {name: value.double() + change[name] for name, value in base.items()}


def close(got: Tensors, want: Tensors, within: float = 2e-6) -> bool:
    return got.keys() == want.keys() and all(
        torch.allclose(got[name].double(), want[name].double(), rtol=within, atol=within) for name in want
    )


CASES: dict[str, tuple[Method, Callable[[list[Tensors]], Tensors]]] = {
    "trim": (Trim(), trim),
    "trim-little": (Trim(density=0.01), lambda changes: trim(changes, 0.01)),
    "normed": (Normed(), normed),
    "nearest": (Nearest(), lambda changes: {n: nearest(v) for n, v in average(changes).items()}),
    "squared+trim": (Squared(then=Trim()), lambda changes: squared(trim, changes)),
    "squared+normed": (Squared(then=Normed()), lambda changes: squared(normed, changes)),
    "lines+trim": (Lines(then=Trim()), lambda changes: lines(trim(changes), total(changes), len(changes))),
    "lines+normed": (Lines(then=Normed(), beta=0.2), lambda c: lines(normed(c), total(c), len(c), beta=0.2)),
    "lines+nearest": (
        Lines(then=Nearest(), tail="depth"),
        lambda c: lines({n: nearest(v) for n, v in average(c).items()}, total(c), len(c), tail=1.0),
    ),
    "lines+squared+trim": (
        Lines(then=Squared(then=Trim()), published=True),
        lambda c: lines(squared(trim, c), total(c), len(c), published=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_rounds_grains_and_closings(tmp_path: Path, name: str, threads: int) -> None:
    """Against a flat reference; the tensors span several tiles."""
    method, reference = CASES[name]
    base_path, paths = checkpoint(tmp_path, 3, width=64, vocab=1100)
    merging.merge(paths, method=method, base=base_path, output=tmp_path / "out", threads=threads)
    base, tuned = load(base_path), [load(path) for path in paths]
    assert close(load(tmp_path / "out"), plus(base, reference(deltas(base, tuned))), 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_rounds_of_tensors_in_memory(name: str) -> None:
    """The same methods without files."""
    method, reference = CASES[name]
    base = model(0, width=16)
    tuned = [fine_tune(base, i) for i in range(3)]
    got = merging.merge_state_dicts(tuned, method=method, base=base)
    assert close(got, plus(base, reference(deltas(base, tuned))), 2e-5)


def test_matrix_grain_of_tensors_without_elements(tmp_path: Path) -> None:
    base = {**model(0), "none": torch.zeros(0, 8), "one": torch.tensor(1.0)}
    paths = [save(tmp_path / "base", base), save(tmp_path / "tuned", fine_tune(base, 1))]
    merging.merge(paths[1:], method=Nearest(), base=paths[0], output=tmp_path / "out")
    assert load(tmp_path / "out")["none"].shape == (0, 8)


def test_lines_around_slerp(tmp_path: Path) -> None:
    base_path, paths = checkpoint(tmp_path, 2, width=64, vocab=1100)
    base, one, two = load(base_path), *map(load, paths)
    change = deltas(base, [slerp(one, two, 0.3)])[0]
    plain = total(deltas(base, [one, two]))
    for published in (False, True):
        method = Lines(then=Slerp(t=0.3), published=published)
        merging.merge(paths, method=method, base=base_path, output=tmp_path / f"out{published}")
        want = plus(base, lines(change, plain, 2, published=published))
        assert close(load(tmp_path / f"out{published}"), want, 1e-5)


LINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "beta": ({"beta": 0.1}, {"beta": 0.1}),
    "alpha": ({"alpha": 0.7}, {"alpha": 0.7}),
    "published": ({"published": True}, {"published": True}),
    "alpha-published": ({"alpha": 0.7, "published": True}, {"alpha": 0.7, "published": True}),
    "tail": ({"tail": "depth"}, {"tail": 1.0}),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("inside", ["task_arithmetic", "linear"])
def test_lines_around_a_sum(tmp_path: Path, name: str, inside: str) -> None:
    parameters, expected = LINES[name]
    base_path, paths = checkpoint(tmp_path, 3)
    method = chain(f"lines+{inside}", parameters)
    merging.merge(paths, method=method, base=base_path, output=tmp_path / "out")
    base = load(base_path)
    changes = deltas(base, [load(path) for path in paths])
    merged = total(changes) if inside == "task_arithmetic" else average(changes)
    assert close(load(tmp_path / "out"), plus(base, lines(merged, total(changes), 3, **expected)), 1e-6)


@pytest.mark.parametrize(("parameters", "first", "grow"), [({}, 0.5, 0.5), ({"alpha": 0.2, "beta": 0.1}, 0.2, 0.1)])
def test_lines_around_one_model(tmp_path: Path, parameters: dict[str, float], first: float, grow: float) -> None:
    base_path, paths = checkpoint(tmp_path, 1)
    merging.merge(paths, method="lines", base=base_path, output=tmp_path / "out", **parameters)
    base = load(base_path)
    (change,) = deltas(base, [load(paths[0])])
    scaled = {name: (first + grow * depths()[name]) * value for name, value in change.items()}
    assert close(load(tmp_path / "out"), plus(base, scaled), 1e-6)


def test_lines_sets_the_size_itself(tmp_path: Path) -> None:
    base_path, paths = checkpoint(tmp_path, 2)
    with pytest.raises(OptionError, match="scale must be 1 under lines"):
        merging.merge(paths, method=Lines(then=TaskArithmetic(scale=0.3)), base=base_path, output=tmp_path / "out")


def test_layers_of_the_config_count(tmp_path: Path) -> None:
    """Blocks beyond those that the config states (multi-token prediction) have depth 1, as the last one has."""
    base_path, paths = checkpoint(tmp_path, 1)
    (base_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2}))
    merging.merge(paths, method="lines", base=base_path, output=tmp_path / "out", alpha=0.0, beta=1.0)
    base, (tuned,) = load(base_path), [load(path) for path in paths]
    got = load(tmp_path / "out")
    for layer, depth in enumerate([0.0, 1.0, 1.0]):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.allclose(got[name], base[name] + depth * (tuned[name] - base[name]), atol=1e-6)


METHODS = [chain("linear"), chain("task_arithmetic", {"weights": (0.3, 0.5)}), chain("slerp", {"t": 0.3}),
           chain("lines+slerp"), Trim(), Normed(), Nearest()]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.chain)
def test_nothing_but_the_recipe_changes_a_byte(tmp_path: Path, method: Method) -> None:
    """Neither threads nor memory nor shards nor the order of tensors in a file."""
    parts = {"base": model(0, width=64, vocab=1100, dtype=torch.bfloat16)}
    parts |= {f"tuned{i}": fine_tune(parts["base"], i, 0.5) for i in range(2)}
    for name, tensors in parts.items():
        save(tmp_path / "plain" / name, tensors)
        save(tmp_path / "shards" / name, dict(reversed(tensors.items())), shards=3)

    def merged(number: int, layout: str, **execution: Any) -> Tensors:
        folder, output = tmp_path / layout, tmp_path / f"out{number}"
        options: dict[str, Any] = {"method": method, "base": folder / "base", "output": output}
        merging.merge([folder / "tuned0", folder / "tuned1"], **options, **execution)
        return load(output)

    least = plan_for(recipe(tmp_path / "plain", method), None).memory(1)
    first = merged(0, "plain", threads=1)
    others: list[tuple[str, dict[str, Any]]] = [
        ("plain", {"threads": 2}),
        ("plain", {"threads": 3, "max_memory": least}),
        ("plain", {"threads": 3, "max_memory": 1 << 40}),
        ("shards", {"threads": 3}),
    ]
    for number, (layout, execution) in enumerate(others, 1):
        assert identical(merged(number, layout, **execution), first), (layout, execution)


def recipe(folder: Path, method: Method, **options: Any) -> Recipe:
    models = tuple(str(folder / f"tuned{i}") for i in range(2))
    return Recipe(models=models, method=method, base=str(folder / "base"), **options)


def test_units_of_a_large_tensor(tmp_path: Path) -> None:
    """One of more than a unit is shared out among threads."""
    base = {"layers.0.w": torch.zeros(1100, 1000), "layers.1.w": torch.zeros(3, 5)}
    paths = [save(tmp_path / name, fine_tune(base, i)) for i, name in enumerate(["base", "tuned0", "tuned1"])]
    for threads in (1, 3):
        merging.merge(
            paths[1:], method="task_arithmetic", base=paths[0], output=tmp_path / f"out{threads}", threads=threads
        )
    changes = deltas(load(paths[0]), [load(path) for path in paths[1:]])
    assert close(load(tmp_path / "out1"), plus(load(paths[0]), total(changes)), 1e-6)
    assert identical(load(tmp_path / "out1"), load(tmp_path / "out3"))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.chain)
def test_large_tiles_as_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """The same numbers within rounding, whatever the size of the tiles."""
    checkpoint(tmp_path, 2, width=64, vocab=1100)
    plan = plan_for(recipe(tmp_path, method), None)
    merge_plan(plan, tmp_path / "small", threads=2)
    monkeypatch.setattr(tiles, "TILE", tiles.GPU_TILE)
    monkeypatch.setattr(tiles, "CHUNK", 4 * tiles.GPU_TILE)
    merge_plan(plan, tmp_path / "large", threads=2)
    assert close(load(tmp_path / "small"), load(tmp_path / "large"), 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.chain)
def test_gpu_and_cpu_agree(tmp_path: Path, method: Method) -> None:
    base_path, paths = checkpoint(tmp_path, 2, width=64, vocab=1100)
    for device in ("cpu", "cuda"):
        merging.merge(paths, method=method, base=base_path, output=tmp_path / device, device=device, threads=2)
    assert close(load(tmp_path / "cpu"), load(tmp_path / "cuda"), 1e-5)


def test_too_little_memory(tmp_path: Path) -> None:
    base, paths = checkpoint(tmp_path, 2)
    with pytest.raises(OptionError, match=r"max_memory = 0 MB is too little: this merge needs \d+ MB"):
        merging.merge(paths, method="linear", base=base, output=tmp_path / "out", max_memory=100)
    with pytest.raises(OptionError, match="threads = 0: at least one"):
        merging.merge(paths, method="linear", base=base, output=tmp_path / "out", threads=0)


def test_progress_adds_up(tmp_path: Path) -> None:
    """Over the rounds and the merge, and it ends at the whole."""
    base, paths = checkpoint(tmp_path, 2)
    statistics: list[tuple[int, int]] = []
    options: dict[str, Any] = {"base": base, "output": tmp_path / "out", "threads": 2}
    merging.merge(paths, method=Trim(), progress=lambda done, whole: statistics.append((done, whole)), **options)
    assert [done for done, _ in statistics] == sorted(done for done, _ in statistics)
    assert {whole for _, whole in statistics} == {statistics[-1][0]}
    read = sum(value.nbytes for path in (base, *paths) for value in load(path).values())
    assert statistics[-1][0] == 3 * read


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_file_cut_after_planning(tmp_path: Path, method: str) -> None:
    _, tuned = checkpoint(tmp_path)
    plan = plan_for(Recipe(models=tuple(map(str, tuned)), method=chain(method)), None)
    file = tuned[1] / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 20)
    with pytest.raises(FormatError, match=r"tuned1/model\.safetensors: .*was cut while it was read"):
        merge_plan(plan, tmp_path / "out", threads=2)
    assert not (tmp_path / "out").exists()


def test_file_replaced_after_planning(tmp_path: Path) -> None:
    """What was opened is merged, whatever has its name by then."""
    _, tuned = checkpoint(tmp_path)
    plan = plan_for(Recipe(models=tuple(map(str, tuned)), method=chain("linear")), None)
    want = average([load(path) for path in tuned])
    save_file(model(9), tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(tuned[1] / "model.safetensors")
    merge_plan(plan, tmp_path / "out")
    assert close(load(tmp_path / "out"), want, 1e-6)


def test_unrelated_base_is_remarked_with_a_number(tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path)
    stranger = save(tmp_path / "stranger", model(77))
    done = merging.merge([tuned[0], stranger], method="task_arithmetic", base=base, output=tmp_path / "out")
    said = [notice for notice in done.notices if "is it a fine-tune of" in notice]
    changed = sum(((load(stranger)[n] - v) ** 2).sum() for n, v in load(base).items() if v.dim() > 1)
    number = (changed / sum((v**2).sum() for v in load(base).values() if v.dim() > 1)) ** 0.5
    assert said == [
        f"warning: {stranger} differs from the base by {float(number):.0%} of its norm: is it a fine-tune of {base}?"
    ]


def test_same_input_twice_is_remarked(tmp_path: Path) -> None:
    _, tuned = checkpoint(tmp_path)
    copy = save(tmp_path / "copy", load(tuned[0]))
    done = merging.merge([*tuned, copy], method="linear", output=tmp_path / "out")
    assert [n for n in done.notices if "twice" in n] == [
        f"{copy} has the same content as {tuned[0]}: it counts twice in the merge"
    ]
    done = merging.merge([*tuned, tuned[0]], method="linear", output=tmp_path / "again")
    assert [n for n in done.notices if "twice" in n] == [f"{tuned[0]} is given twice: it counts twice in the merge"]


def test_repeats_are_one_remark_with_their_number(tmp_path: Path) -> None:
    _, tuned = checkpoint(tmp_path)
    copies = [save(tmp_path / name, load(tuned[0])) for name in ("copy", "other")]
    given = merging.preview([*tuned, tuned[0], tuned[0]], method="linear")
    assert [n for n in given.notices if "times" in n] == [
        f"{tuned[0]} is given 3 times: it counts 3 times in the merge"
    ]
    mixed = merging.preview([*tuned, *copies, tuned[0]], method="linear")
    assert [n for n in mixed.notices if "times" in n] == [
        f"{copies[0]} and {copies[1]} have the same content as {tuned[0]}: it counts 4 times in the merge"
    ]
