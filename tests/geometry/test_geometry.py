"""What models change, compared through factors and by rows: everything against flat float64 matrices."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import merging
from merging.errors import InputError, OptionError
from merging.geometry import Comparison, compare, cosines, gram, grams, sign_agreement, spectra
from merging.geometry.alignment import align
from merging.geometry.spectrum import directions
from merging.maths.delta import LowRank
from support import tiny
from support.adapter_pool import (
    F64,
    SHAPES,
    Factors,
    agreement,
    assert_near,
    factors,
    flat,
    inner_products,
    write,
    write_base,
)
from support.adapters import QUIRKS, change_of, llama_adapters
from support.references import golden_adapters

pytestmark = QUIRKS


def test_inner_products_norms_and_cosines(pool: tuple[list[Path], list[Factors]]) -> None:
    paths, made = pool
    wanted = inner_products(flat(made))
    found = gram(paths)
    assert found.dtype == F64
    assert_near(found, wanted)
    norms = wanted.diagonal().sqrt()
    sizes = norms[:, None] * norms
    angles = torch.where(sizes > 0, wanted / sizes, 0.0)
    torch.testing.assert_close(cosines(paths), angles, rtol=0, atol=1e-12)
    assert angles[0, 1] > 0.01, "a right angle would tell nothing"
    compared = compare(paths, signs=None)
    assert [model.norm for model in compared.models] == pytest.approx(norms.tolist(), rel=1e-12)
    assert [model.tensors for model in compared.models] == [4, 4, 4, 0, 1, 3, 2]
    assert [model.rank_text for model in compared.models] == ["4", "1", "45", "4", "3", "2", "7"]


def test_float32_products_against_flat_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of many adapters are float32: cosines of unlike, alike and opposite changes keep their digits."""
    monkeypatch.setattr(grams, "_DOUBLE", 0)

    def rounded(changes: Factors) -> Factors:
        return {name: (up.float().double(), down.float().double()) for name, (up, down) in changes.items()}

    made = [factors(seed, 8) for seed in range(12)]
    alike = {name: (up + 1e-3 * made[1][name][0], down) for name, (up, down) in made[0].items()}
    opposite = {name: (-2 * up, down) for name, (up, down) in made[0].items()}
    made = [rounded(each) for each in (*made, alike, opposite)]
    paths = [write(tmp_path / str(number), each, torch.float32) for number, each in enumerate(made)]
    wanted = inner_products(flat(made))
    norms = wanted.diagonal().sqrt()
    found = cosines(paths)
    assert float((found - wanted / (norms[:, None] * norms)).abs().max()) < 1e-6
    assert float(found[0, -1]) == pytest.approx(-1, abs=1e-6)


def test_norms_and_cosines_by_layer(pool: tuple[list[Path], list[Factors]]) -> None:
    paths, made = pool
    found = compare(paths, signs=None).layers
    assert [each.layer for each in found] == [0, 1]
    for layer, each in enumerate(found):
        names = [name for name in SHAPES if f"layers.{layer}." in name]
        vectors = [torch.cat([part for name in names for part in flat_of(model, name)]) for model in made]
        norms = torch.stack(vectors).norm(dim=1)
        assert each.norms == pytest.approx(norms.tolist(), rel=1e-12)
        units = [vector / norm for vector, norm in zip(vectors, norms, strict=True) if norm]
        pairs = [float(one @ other) for i, one in enumerate(units) for other in units[i + 1 :]]
        assert each.cosine == pytest.approx(sum(pairs) / len(pairs), rel=1e-10)


def flat_of(model: Factors, name: str) -> list[Tensor]:
    return [(model[name][0] @ model[name][1]).flatten() if name in model else torch.zeros(math.prod(SHAPES[name]))]


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 15)), min_size=1, max_size=4),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_ranks_modules_and_types(
    tmp_path_factory: pytest.TempPathFactory, models: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    """Of what was saved: rounding to a type is no error of ours."""
    folder = tmp_path_factory.mktemp("any")
    made = [
        factors(seed, rank, [name for bit, name in enumerate(SHAPES) if mask >> bit & 1])
        for seed, (rank, mask) in enumerate(models)
    ]
    saved = [{name: (up.to(dtype).double(), down.to(dtype).double()) for name, (up, down) in m.items()} for m in made]
    paths = [write(folder / str(i), each, dtype) for i, each in enumerate(made)]
    wanted = inner_products(flat(saved))
    got = gram(paths)
    sizes = wanted.diagonal().sqrt()
    assert float(((got - wanted) / (sizes[:, None] * sizes)).abs().max()) < (1e-12 if dtype == F64 else 1e-6)


def test_any_gauge(tmp_path: Path) -> None:
    """``(B G, G^-1 A)`` is the same change: so are all numbers."""
    made = [factors(0, 4), factors(1, 3)]
    random = torch.Generator().manual_seed(9)

    def turned(changes: Factors) -> Factors:
        out = {}
        for name, (up, down) in changes.items():
            turn = torch.randn(down.shape[0], down.shape[0], generator=random, dtype=F64) + 3 * torch.eye(len(down))
            out[name] = (up @ turn, torch.linalg.solve(turn, down))
        return out

    base = write_base(tmp_path / "base")
    plain, other = (
        compare([write(tmp_path / kind / f"m{i}", how(each)) for i, each in enumerate(made)], **options(base))
        for kind, how in (("plain", dict), ("turned", turned))
    )
    assert_same(plain, other)


def options(base: Path) -> dict[str, Any]:
    return {"signs": "all", "intruders": True, "base": base}


def assert_same(one: Comparison, other: Comparison, tolerance: float = 1e-8, order: Sequence[int] = ()) -> None:
    """All numbers agree, the second comparison's models taken in another order if that is given."""
    order = order or range(len(one.models))

    def rows(matrix: Any) -> Any:
        return [[matrix[i][j] for j in order] for i in order]

    near = {"rel": tolerance, "abs": tolerance}
    assert one.signs and other.signs and one.overlaps and other.overlaps and one.magnitudes and other.magnitudes
    for mine, theirs in (
        (one.cosines, other.cosines),
        (one.signs.matrix, other.signs.matrix),
        (one.overlaps.outputs, other.overlaps.outputs),
        (one.overlaps.inputs, other.overlaps.inputs),
    ):
        for row, wanted in zip(rows(theirs), mine, strict=True):
            assert row == pytest.approx(list(wanted), **near)
    sizes = (one.magnitudes, other.magnitudes)
    for name in ("ratio", "variance", "columns"):
        assert getattr(sizes[0], name) == pytest.approx(getattr(sizes[1], name), **near)
    for i, j in enumerate(order):
        assert one.models[i].norm == pytest.approx(other.models[j].norm, **near)
        mine, theirs = one.models[i].spectrum, other.models[j].spectrum
        assert mine and theirs
        assert mine.curve == pytest.approx(theirs.curve, **near)
        assert mine.effective == pytest.approx(theirs.effective, **near)
        for name, intruders in one.intruders[i].by_tensor.items():
            found = other.intruders[j].by_tensor[name]
            assert intruders.similarity == pytest.approx(found.similarity, **near)
            assert intruders.which == found.which


def test_any_way_to_write_a_scale(tmp_path: Path) -> None:
    """alpha / r, alpha / sqrt(r), patterns of ranks and alphas, or all of it in B."""
    changes = factors(0, 4)
    other = write(tmp_path / "other", factors(1, 3))
    plain: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    written = [
        write(tmp_path / "one", changes, **plain),
        write(tmp_path / "alpha", changes, stored=2.5, lora_alpha=10, **plain),
        write(tmp_path / "rs", changes, stored=5.0, lora_alpha=10, use_rslora=True, **plain),
        write(tmp_path / "patterns", changes, stored=3.0, r=9, alpha_pattern=dict.fromkeys(changes, 12)),
    ]
    (wanted, *found) = (gram([path, other]) for path in written)
    assert_near(wanted, inner_products(flat([changes, factors(1, 3)])))
    for each in found:
        assert_near(each, wanted)


def test_any_order_of_models(tmp_path: Path) -> None:
    made = [factors(seed, rank) for seed, rank in enumerate((4, 1, 6))]
    paths = [write(tmp_path / f"m{i}", each) for i, each in enumerate(made)]
    base = write_base(tmp_path / "base")
    order = [2, 0, 1]
    one = compare(paths, **options(base))
    other = compare([paths[i] for i in order], **options(base))
    assert_same(one, other, 1e-12, [order.index(i) for i in range(3)])


def test_golden_vectors(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    made = golden_adapters()
    paths = [write(tmp_path / f"d{i}", {name: each}) for i, each in enumerate(made)]
    wanted = torch.tensor(
        [[32.559392, 19.687947, 3.041007], [19.687947, 17.146996, 5.314029], [3.041007, 5.314029, 3.707158]], dtype=F64
    )
    torch.testing.assert_close(gram(paths), wanted, rtol=0, atol=6e-7)
    ((found, values),) = spectra(paths)
    assert found == f"{name}.weight"
    assert [round(float(each.square().sum().sqrt()), 6) for each in values if each is not None] == [
        5.706084,
        4.140893,
        1.925398,
    ]
    both = tuple(torch.cat(parts, dim) for parts, dim in zip(zip(*made[:2], strict=True), (1, 0), strict=True))
    ((_, [summed]),) = spectra([write(tmp_path / "sum", {name: (both[0], both[1])})])
    assert summed is not None
    assert [round(each, 6) for each in summed.tolist()] == [9.420191, 0.58504, 0.004366, 0.000058]
    leading = directions(LowRank(*made[0], (6, 5)), 1)[1][0].abs()
    assert [round(each, 6) for each in leading.tolist()] == [0.435122, 0.456039, 0.461906, 0.452777, 0.42934]


# -- kinds of models ---------------------------------------------------------------------------------------------------


def test_full_checkpoints_and_adapters_together(tmp_path: Path) -> None:
    """A checkpoint that holds an adapter's change is that adapter, but for the rounding of what it was saved in."""
    base = write_base(tmp_path / "base", F64)
    made = [factors(0, 4), factors(1, 2)]
    paths = [write(tmp_path / f"m{i}", each) for i, each in enumerate(made)]
    weights = tiny.load(base)
    full = tiny.save(
        tmp_path / "full", {f"{n}.weight": weights[f"{n}.weight"] + u @ d for n, (u, d) in made[0].items()}
    )
    wanted = inner_products(flat([made[0], made[1], made[0]]))
    assert_near(gram([*paths, full], base=base), wanted, 1e-12)
    found = compare([*paths, full], base=base, intruders=True)
    assert [model.kind for model in found.models] == ["adapter", "adapter", "checkpoint"]
    assert [model.rank_text for model in found.models] == ["4", "2", "full"]
    assert found.overlaps
    assert found.overlaps.outputs[0][2] == pytest.approx(1)
    first, _, last = found.models
    assert first.spectrum and last.spectrum
    assert last.spectrum.curve[:4] == pytest.approx(first.spectrum.curve)
    for name, each in found.intruders[0].by_tensor.items():
        assert found.intruders[2].by_tensor[name].similarity == pytest.approx(each.similarity, abs=1e-9)


def test_every_type_of_adapter(tmp_path: Path) -> None:
    """Factors, DoRA, PiSSA: against what PEFT's own merge changes."""
    llama = llama_adapters(tmp_path)
    paths = [llama / name for name in ("plain", "dora", "pissa")]
    changes = [change_of(llama / "base", path) for path in paths]
    wanted = inner_products([torch.cat([each.flatten() for each in change.values()]) for change in changes])
    assert_near(gram(paths, base=llama / "base"), wanted, 1e-4)
    with pytest.raises(InputError, match="give the base with base="):
        gram(paths)


def test_transposed_layers_are_turned(tmp_path: Path) -> None:
    """GPT-2's layers are stored as inputs by outputs; what is told of their sides is not."""
    rows = {name: factors(i, 3)[name] for i, name in enumerate(SHAPES)}
    others = {name: factors(i + 9, 2)[name] for i, name in enumerate(SHAPES)}
    one = compare([write(tmp_path / "a", rows), write(tmp_path / "b", others)], signs=None)
    names = {
        name: f"transformer.h.{i % 2}.{part}"
        for i, (name, part) in enumerate(zip(SHAPES, ("attn.q", "mlp.c_fc", "attn.c_proj", "mlp.c_proj"), strict=True))
    }
    turned = [
        write(tmp_path / f"{label}-turned", {names[n]: each for n, each in model.items()}, fan_in_fan_out=True)
        for label, model in (("a", rows), ("b", others))
    ]
    other = compare(turned, signs=None)
    plan = align(turned)
    assert {item.site.axis for item in plan.items} == {0}
    assert one.overlaps and other.overlaps and one.magnitudes and other.magnitudes
    assert other.overlaps.outputs[0] == pytest.approx(one.overlaps.outputs[0])
    assert other.overlaps.inputs[0] == pytest.approx(one.overlaps.inputs[0])
    assert other.magnitudes.columns == pytest.approx(one.magnitudes.columns)


def test_a_change_of_full_rank_is_multiplied_by_rows(pool: tuple[list[Path], list[Factors]]) -> None:
    """Where ranks are above the dimensions, rows are cheaper than factors, and tell the same."""
    paths, made = pool
    plan = align([paths[2], paths[2]])
    assert not grams._factors_are_cheaper(plan.items[0])
    assert grams._factors_are_cheaper(align(paths[:2]).items[0])
    assert_near(gram([paths[2], paths[2]]), inner_products(flat([made[2], made[2]])))


def test_what_has_no_products(tmp_path: Path) -> None:
    for value, number in ((math.nan, 0), (math.inf, 1)):
        changes = {name: (up.clone(), down) for name, (up, down) in factors(0, 2).items()}
        next(iter(changes.values()))[0][3, 1] = value
        path = write(tmp_path / f"bad{number}", changes)
        with pytest.raises(InputError, match=rf"bad{number}: model\.layers\.0\.self_attn\.q_proj\.weight holds NaN"):
            gram([write(tmp_path / f"good{number}", factors(1, 2)), path])


def test_factors_that_cancel(tmp_path: Path) -> None:
    """A difference of a model from itself is at a right angle to the others, but for rounding."""
    changes = factors(0, 3)
    nothing = {name: (torch.cat([up, -up], 1), torch.cat([down, down])) for name, (up, down) in changes.items()}
    paths = [write(tmp_path / "nothing", nothing), write(tmp_path / "one", changes)]
    found = compare(paths)
    assert found.models[0].norm < 1e-6
    assert abs(found.cosines[0][1] or 0.0) < 1e-6


def test_bad_options(tmp_path: Path) -> None:
    path = write(tmp_path / "one", factors(0, 3))
    with pytest.raises(OptionError, match="a comparison has no option 'weights'"):
        gram([path], weights=1)
    with pytest.raises(InputError, match="name at least one model"):
        gram([])
    with pytest.raises(InputError, match="no tensor is left"):
        gram([path], exclude="*")
    with pytest.raises(OptionError, match="give it with base="):
        compare([path], intruders=True)
    with pytest.raises(InputError, match="is an adapter, and base= wants the full model"):
        compare([path], base=path)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_groups_and_blocks_change_nothing(
    pool: tuple[list[Path], list[Factors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs of groups of models, and blocks of their rows, add up to what one product tells."""
    paths, made = ([each[i] for i in (0, 1, 4, 5, 6)] * 3 for each in pool)
    wanted = inner_products(flat(made))
    monkeypatch.setattr(grams, "_ROWS", 1 << 10)
    plan, small = align(paths), 24_000
    groups = [grams.groups_of(plan, item, True, small) for item in plan.items]
    assert max(map(len, groups)) > 2
    assert_near(gram(paths, max_memory=small), wanted)
    signs = agreement(flat(made))
    monkeypatch.setattr("merging.geometry.grams.TILE", 1)
    monkeypatch.setattr("merging.geometry.signs._EXACT", 100)
    few = sign_agreement(paths, entries="all", max_memory=400_000)
    torch.testing.assert_close(few.agreement, signs, rtol=0, atol=1e-12, equal_nan=True)


def test_too_little_memory_is_refused(pool: tuple[list[Path], list[Factors]]) -> None:
    with pytest.raises(OptionError, match=r"takes [0-9]+ MB to compare: raise max_memory="):
        gram(pool[0], max_memory=1000)


_PEAK = """
import sys
from pathlib import Path
from merging.geometry import cosines
def resident(what):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if what in line)
cosines(sys.argv[2:4])  # what libraries allocate when they are first used does not count
before = resident("VmHWM")
cosines(sys.argv[2:], max_memory=int(sys.argv[1]))
print((resident("VmHWM") - before) * 1024)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells peaks by /proc")
def test_memory_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty adapters of a matrix of 8192 by 8192, 256 MiB when multiplied out, within 64 MB."""
    name = "model.layers.0.self_attn.q_proj"
    random = torch.Generator().manual_seed(0)
    paths = [
        write(
            tmp_path / f"m{i}",
            {name: (torch.randn(8192, 16, generator=random), torch.randn(16, 8192, generator=random))},
            torch.bfloat16,
        )
        for i in range(40)
    ]
    limit = 64_000_000
    command = [sys.executable, "-c", _PEAK, str(limit), *map(str, paths)]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert taken < limit


def test_the_package_offers_it() -> None:
    assert merging.compare is compare  # type: ignore[attr-defined]
