"""What models change, compared through factors and by rows: everything against flat float64 matrices."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.linalg import subspace_angles
from torch import Tensor

import merging
from merging.errors import InputError, OptionError
from merging.geometry import Comparison, compare, cosines, gram, grams, sign_agreement, spectra
from merging.geometry.alignment import align
from merging.geometry.spectrum import directions, overlaps, singular_values, spectrum_of
from merging.maths.delta import Dense, LowRank
from support import tiny
from support.adapters import QUIRKS, change_of, llama_adapters
from support.references import golden_adapters

pytestmark = QUIRKS

Factors = Mapping[str, tuple[Tensor, Tensor]]
Adapter = tuple[Path, dict[str, Tensor]]
"""A folder, and what lies in it as flat float64 matrices."""

SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 16),
    "model.layers.0.mlp.down_proj": (16, 40),
    "model.layers.1.self_attn.q_proj": (24, 16),
    "model.layers.1.mlp.up_proj": (40, 16),
}
F64 = torch.float64


def factors(seed: int, rank: int, modules: Sequence[str] = tuple(SHAPES), size: float = 1.0) -> Factors:
    """Factors of float64 ``(B, A)`` by module, with a part that all seeds share, so that no angle is a right one."""
    random, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(-1)
    found = {}
    for name, (out, into) in SHAPES.items():
        common = torch.randn(out, 1, generator=shared, dtype=F64), torch.randn(1, into, generator=shared, dtype=F64)
        own = (torch.randn(side, generator=random, dtype=F64) for side in ((out, rank), (rank, into)))
        up, down = (each + 0.5 * part for each, part in zip(own, common, strict=True))
        found[name] = (size * up, down)
    return {name: found[name] for name in modules}


def write(folder: Path, changes: Factors, dtype: torch.dtype = F64, stored: float = 1.0, **config: Any) -> Path:
    """An adapter of PEFT's: by default its scale is 1. ``stored`` divides B, for a scale that says otherwise."""
    folder.mkdir(parents=True)
    ranks = {name: down.shape[0] for name, (_, down) in changes.items()}
    rank = max(ranks.values())
    settings: dict[str, Any] = {"r": rank, "lora_alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks}
    settings |= {"peft_type": "LORA", "base_model_name_or_path": "org/base", "target_modules": list(changes)} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, (up, down) in changes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.to(dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (up / stored).to(dtype).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def flat(models: Sequence[Factors]) -> list[Tensor]:
    """What each model changes, as one float64 vector over all tensors."""
    found = []
    for each in models:
        parts = [
            each[name][0] @ each[name][1] if name in each else torch.zeros(shape) for name, shape in SHAPES.items()
        ]
        found.append(torch.cat([part.double().flatten() for part in parts]))
    return found


def inner_products(vectors: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(vectors))
    return stacked @ stacked.mT


def assert_near(got: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    """Entries of a Gram matrix as shares of the norms; others as they are."""
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Factors]]:
    """Adapters of unequal ranks, one above the dimensions; one is zero, two leave modules out."""
    folder = tmp_path_factory.mktemp("pool")
    first, *_, last = SHAPES
    made = [
        factors(0, 4),
        factors(1, 1),
        factors(2, 45, size=0.2),
        {name: (torch.zeros_like(up), down) for name, (up, down) in factors(3, 4).items()},
        factors(4, 3, [first]),
        factors(5, 2, [name for name in SHAPES if name != first]),
        factors(6, 7, [first, last], size=30.0),
    ]
    return [write(folder / f"m{i}", each) for i, each in enumerate(made)], made


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


def write_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    random = torch.Generator().manual_seed(7)
    return tiny.save(
        folder,
        {f"{name}.weight": torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()},
    )


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


# -- spectra -----------------------------------------------------------------------------------------------------------


def test_singular_values(pool: tuple[list[Path], list[Factors]]) -> None:
    paths, made = pool
    for name, found in spectra(paths):
        for model, values in zip(made, found, strict=True):
            module = name.removesuffix(".weight")
            if module not in model:
                assert values is None
                continue
            assert values is not None
            up, down = model[module]
            wanted = torch.linalg.svdvals(up @ down)
            assert len(values) == min(len(down), *SHAPES[module])
            torch.testing.assert_close(values, wanted[: len(values)], rtol=0, atol=1e-12 * float(wanted[0] + 1))


def test_what_a_spectrum_tells() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])
    found = spectrum_of(values)
    entropy = -sum(share * math.log(share) for share in (3 / 6, 2 / 6, 1 / 6))
    assert found.largest == 3
    assert found.effective == pytest.approx(math.exp(entropy))
    assert found.stable == pytest.approx(14 / 9)
    assert (found.energy90, found.energy99) == (2, 3)
    assert found.curve == pytest.approx([9 / 14, 13 / 14, 1, 1])
    flat_one = spectrum_of(torch.ones(5))
    assert (flat_one.effective, flat_one.stable, flat_one.energy90) == pytest.approx((5, 5, 5))
    assert spectrum_of(torch.zeros(4)) == spectrum_of(torch.zeros(0)) == spectrum_of(torch.zeros(2, 0))
    experts = spectrum_of(torch.stack([values, torch.tensor([1.0, 0, 0, 0]), torch.zeros(4)]))
    assert experts.stable == pytest.approx((14 / 9 + 1) / 2), "a matrix that did not change has no spectrum"


def test_full_changes_and_convolutions_are_decomposed_too() -> None:
    random = torch.Generator().manual_seed(0)
    for shape in ((30, 12), (12, 30), (8, 3, 3, 3)):
        value = torch.randn(shape, generator=random)
        found = singular_values(Dense(value))
        torch.testing.assert_close(found, torch.linalg.svdvals(value.double().flatten(1)), rtol=1e-7, atol=0)


def test_large_full_changes_are_decomposed_when_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merging.geometry.spectrum.SIDE", 8)
    base, tuned = tiny.checkpoint(tmp_path, 2, width=10)
    unasked, asked = (compare(tuned, base=base, full_spectra=full) for full in (False, True))
    assert [model.matrices for model in unasked.models] == [0, 0]
    assert unasked.overlaps is None
    assert any("--full-spectra decomposes them too" in notice for notice in unasked.notices)
    assert [model.matrices for model in asked.models] == [4, 4]
    assert not asked.notices


# -- subspaces ---------------------------------------------------------------------------------------------------------


def test_overlaps_follow_principal_angles() -> None:
    """scipy's angles: the mean of their squared cosines."""
    random = torch.Generator().manual_seed(0)
    changes: list[Any] = [
        LowRank(
            torch.randn(20, r, generator=random, dtype=F64), torch.randn(r, 14, generator=random, dtype=F64), (20, 14)
        )
        for r in (3, 5, 9)
    ]
    changes += [Dense(torch.randn(20, 14, generator=random)), LowRank(torch.zeros(20, 2), torch.ones(2, 14), (20, 14))]
    most = 6
    bases = [directions(change, most) for change in changes]
    for side in (0, 1):
        got = overlaps([*(base[side] for base in bases), None])
        for i, one in enumerate(changes):
            for j, other in enumerate(changes):
                subspaces = []
                for change in (one, other):
                    u, s, vh = torch.linalg.svd(change.dense().double(), full_matrices=False)
                    kept = min(most, int((s > 1e-6 * s[0]).sum()))
                    subspaces.append((u if side == 0 else vh.mT)[:, :kept].numpy())
                if not all(subspace.shape[1] for subspace in subspaces):
                    assert math.isnan(got[i, j])
                    continue
                cosines_of_angles = torch.from_numpy(subspace_angles(*subspaces)).cos()
                assert float(got[i, j]) == pytest.approx(float(cosines_of_angles.square().mean()), abs=1e-9)
        assert bool(got[-1].isnan().all())


def test_overlaps_of_a_pool(pool: tuple[list[Path], list[Factors]]) -> None:
    """The mean over the tensors that two models both change; 1 with oneself, and chance as it is drawn."""
    paths, made = pool
    found = compare(paths, signs=None, directions=3).overlaps
    assert found and found.directions == 3
    for side, matrix in (("outputs", found.outputs), ("inputs", found.inputs)):
        for i, one in enumerate(made):
            for j, other in enumerate(made):
                each = [
                    overlaps([directions(LowRank(*m[name], SHAPES[name]), 3)[side == "inputs"] for m in (one, other)])
                    for name in SHAPES
                    if name in one and name in other
                ]
                wanted = [float(pair[0, 1]) for pair in each if not pair[0, 1].isnan()]
                if not wanted:
                    assert matrix[i][j] is None
                else:
                    assert matrix[i][j] == pytest.approx(sum(wanted) / len(wanted), abs=1e-9)
    assert found.chance_outputs == pytest.approx(3 / 26, rel=0.5)
    random = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(200, 5, generator=random, dtype=F64))[0].mT for _ in range(40)]
    drawn = overlaps(bases)[torch.triu(torch.ones(40, 40), 1).bool()].mean()
    assert float(drawn) == pytest.approx(5 / 200, rel=0.1)


# -- signs -------------------------------------------------------------------------------------------------------------


def agreement(vectors: Sequence[Tensor]) -> Tensor:
    """Entry by entry, from the dense changes."""
    out = torch.full((len(vectors), len(vectors)), torch.nan, dtype=F64)
    for i, one in enumerate(vectors):
        for j, other in enumerate(vectors):
            both = (one != 0) & (other != 0)
            if bool(both.any()):
                out[i, j] = (one[both].sign() == other[both].sign()).double().mean()
    return out


@pytest.mark.parametrize("entries", ["sample", "all"])
def test_signs_of_small_tensors_are_counted_in_full(entries: Any, pool: tuple[list[Path], list[Factors]]) -> None:
    paths, made = pool
    found = sign_agreement(paths, entries=entries)
    assert found.entries == found.total == sum(map(math.prod, SHAPES.values()))
    torch.testing.assert_close(found.agreement, agreement(flat(made)), rtol=0, atol=1e-12, equal_nan=True)


def test_signs_of_full_checkpoints(tmp_path: Path) -> None:
    base, tuned = tiny.checkpoint(tmp_path, 3)
    before, after = tiny.load(base), [tiny.load(path) for path in tuned]
    vectors = [torch.cat([(each[name] - before[name]).flatten() for name in before]) for each in after]
    for entries in ("sample", "all"):
        found = sign_agreement(tuned, base=base, entries=entries)  # type: ignore[arg-type]
        torch.testing.assert_close(found.agreement, agreement(vectors), rtol=0, atol=1e-12)


def test_a_sample_of_signs_is_near_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "model.layers.0.self_attn.q_proj", (700, 900))
    paths = [write(tmp_path / f"m{i}", factors(i, 2), torch.float32) for i in range(2)]
    all_of_them, sample = (sign_agreement(paths, entries=entries) for entries in ("all", "sample"))  # type: ignore[arg-type]
    assert sample.entries < 0.2 * all_of_them.entries == 0.2 * sample.total
    assert float(all_of_them.agreement[0, 1]) > 0.51
    torch.testing.assert_close(sample.agreement, all_of_them.agreement, rtol=0, atol=0.02)


# -- magnitudes --------------------------------------------------------------------------------------------------------


def test_magnitudes(tmp_path: Path) -> None:
    made = [factors(0, 4), factors(1, 2, size=3.0), factors(2, 1, size=0.5)]
    found = compare([write(tmp_path / f"m{i}", each) for i, each in enumerate(made)]).magnitudes
    assert found
    ratios, variances, columns = [], [], []
    for name in SHAPES:
        stacked = torch.stack([each[name][0] @ each[name][1] for each in made])
        norms = stacked.flatten(1).norm(dim=1)
        ratios.append(float(norms.max() / norms.min()))
        variances.append(float(norms.var(correction=0) / norms.mean() ** 2))
        by_column = stacked.norm(dim=1)
        columns.append(float((by_column.var(0, correction=0) / by_column.mean(0) ** 2).mean()))
    assert found.ratio == pytest.approx(sum(sorted(ratios)[1:3]) / 2)
    assert found.variance == pytest.approx(sum(variances) / 4)
    assert found.columns == pytest.approx(sum(columns) / 4)
    assert (found.tensors, found.modules) == (4, 4)


def test_equal_models_have_equal_magnitudes(tmp_path: Path) -> None:
    path = write(tmp_path / "one", factors(0, 4))
    found = compare([path, path])
    assert found.magnitudes and found.overlaps and found.signs
    assert (found.magnitudes.ratio, found.magnitudes.variance, found.magnitudes.columns) == pytest.approx((1, 0, 0))
    assert found.cosines[0] == pytest.approx([1, 1])
    assert found.signs.matrix[0] == (1, 1)
    assert found.overlaps.outputs[0] == pytest.approx([1, 1])
    assert found.names == ["one #1", "one #2"]


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
    with pytest.raises(InputError, match="give the base with --base"):
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
    with pytest.raises(OptionError, match="give it with --base"):
        compare([path], intruders=True)
    with pytest.raises(InputError, match="is an adapter, and --base wants the full model"):
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
    with pytest.raises(OptionError, match=r"takes [0-9]+ MB to compare: raise --max-memory"):
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
