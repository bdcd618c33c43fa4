"""Packs: what they hold to the last bit, what they lose, and what a damaged one is answered with."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.api.inspect import inspect
from merging.cli.main import cli
from merging.compression.bands import pack_factors, truncate_to_bands
from merging.compression.settings import PackSettings, parse_bands
from merging.compression.ternary import balance, pack_signs, ternary
from merging.errors import FormatError, InputError, MergingError, OptionError, OutputError
from merging.geometry import compare
from merging.hub.open_model import open_model
from merging.sources import Adapter
from merging.sources.packs.codings import Packed, Ternary
from merging.sources.packs.frames import FRAME, frame_signs
from merging.sources.packs.golomb import entropy, mean_bits, parameter, positions, remainder_bytes, streams
from merging.sources.stored import MappedTensor
from support import adapters, tiny
from support.paths import EXAMPLES


def decoded(coding: Any, payload: Tensor, shape: tuple[int, ...], kind: Any = "F32") -> Packed:
    return Packed("a tensor", kind, shape, MappedTensor(payload, ("here", 0)), coding)


def changes(path: Path | str) -> dict[str, Tensor]:
    """What an adapter or pack changes, as its source says, in float64."""
    model = open_model(path)
    assert isinstance(model, Adapter)
    none = torch.empty(0)
    return {name: each.read(each.shape, lambda: none, torch.float64).dense() for name, each in model.changes.items()}


def golden() -> Tensor:
    """The update that the golden vectors are of, 6 x 5 and of rank 2."""
    down = [[math.sin(1 + 0.3 * a + 0.11 * b * (a + 1)) for b in range(5)] for a in range(2)]
    up = [[math.cos(0.5 + 0.23 * p * (q + 1) - 0.2 * q) for q in range(2)] for p in range(6)]
    return torch.tensor(up, dtype=torch.float64) @ torch.tensor(down, dtype=torch.float64)


def test_golden_vectors() -> None:
    update = golden()
    assert math.isclose(float(update.norm()), 5.706084, abs_tol=1e-6)
    signs, scale = ternary(update, 0.2, alpha=1.0)
    kept = signs * scale
    assert math.isclose(scale, 0.919747, abs_tol=1e-6)
    told = (float(kept.norm()), float(kept.sum()), float(kept[0, 0]), float(kept[5, 4]))
    assert told == pytest.approx((2.252910, 5.518479, 0.919747, 0.0), abs=2e-6)
    signs, scale = ternary(update, 0.2)
    assert scale == pytest.approx(1.661493, abs=1e-6)
    assert scale / float(update.std(correction=0)) == pytest.approx(1.806468, abs=1e-6)
    assert scale == pytest.approx(float(update.abs().flatten().sort(descending=True).values[:6].mean()), abs=1e-12)


def test_equal_magnitudes_are_kept_from_the_front_and_zeros_never() -> None:
    values = torch.tensor([[1.0, -2.0, 2.0], [2.0, 0.0, -2.0]])
    assert ternary(values, 0.5)[0].tolist() == [[0, -1, 1], [1, 0, 0]]
    assert ternary(values, 1.0)[0].tolist() == [[1, -1, 1], [1, 0, -1]]
    assert ternary(torch.zeros(3), 0.5)[0].tolist() == [0, 0, 0]
    assert int(ternary(torch.randn(7), 0.01)[0].count_nonzero()) == 1


@pytest.mark.parametrize(
    ("density", "b", "bits", "error"),
    [(0.05, 4, 0.339, 0.73), (0.1, 3, 0.576, 0.58), (0.2, 2, 0.939, 0.38), (0.3, 1, 1.188, 0.28), (0.5, 0, 1.5, 0.19)],
)
def test_sizes_are_those_of_the_paper(density: float, b: int, bits: float, error: float) -> None:
    """Measured on a Gaussian tensor, index, checksums and all; the squared error too."""
    values = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    kind, coding, payload = pack_signs(values, "BF16", PackSettings("ternary", density))
    assert parameter(density) == coding.b == b
    assert payload.nbytes * 8 / values.numel() == pytest.approx(bits, rel=0.02)
    assert density * (mean_bits(density) + 1) == pytest.approx(bits, abs=6e-4)
    assert 0.9 * bits < entropy(density) <= 1.001 * bits
    read = decoded(coding, payload, (1024, 1024), kind).read()
    assert read.dtype == torch.bfloat16
    assert float((read - values).square().sum() / values.square().sum()) == pytest.approx(error, abs=0.02)
    _, other, maps = pack_signs(values, "BF16", PackSettings("ternary", density, bitmap=True))
    assert maps.nbytes * 8 / values.numel() == pytest.approx(2, rel=0.02)
    assert torch.equal(decoded(other, maps, (1024, 1024), "BF16").read(), read)


@given(st.lists(st.booleans(), max_size=400), st.integers(0, 15))
@settings(max_examples=60, deadline=None)
def test_golomb_codes_come_back(mask: list[bool], b: int) -> None:
    kept = np.flatnonzero(np.array(mask, dtype=bool))
    unary, remainders = streams(kept, b)
    assert len(remainders) == remainder_bytes(len(kept), b)
    assert np.array_equal(positions(unary, remainders, len(kept), b, len(mask)), kept)
    if len(kept):
        with pytest.raises(ValueError, match="position"):
            positions(unary, remainders, len(kept), b, int(kept[-1]))


@given(st.integers(0, 3 * FRAME), st.sampled_from([0.0, 0.0003, 0.2, 0.9, 1.0]), st.integers(-1, 6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_pieces_of_a_tensor_are_those_of_the_whole(size: int, density: float, b: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=random, dtype=torch.int8) * 2 - 1
    signs *= torch.rand(size, generator=random) < density
    stored = decoded(Ternary(b=b, scale=0.5), frame_signs(signs, b), (size,))
    assert torch.equal(stored.read(), signs * 0.5)
    start, stop = sorted(torch.randint(0, size + 1, (2,), generator=random).tolist())
    piece = torch.full((stop - start,), torch.nan)
    stored.read_into(piece, start)
    assert torch.equal(piece, signs[start:stop] * 0.5)


def test_packs_do_not_depend_on_the_gauge() -> None:
    """(B, A) -> (B G, G^-1 A) is the same product: the factors in balance are the same, and so are their signs."""
    random = torch.Generator().manual_seed(1)
    up, down = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((40, 4), (4, 30)))
    mix = torch.randn(4, 4, generator=random, dtype=torch.float64) + 3 * torch.eye(4)
    one, other = balance(up, down), balance(up @ mix, torch.linalg.solve(mix, down))
    assert torch.allclose(one[0] @ one[1], up @ down, atol=1e-12)
    assert all(torch.allclose(*pair, atol=1e-9) for pair in zip(one, other, strict=True))
    assert all(torch.equal(ternary(a, 0.2)[0], ternary(b, 0.2)[0]) for a, b in zip(one, other, strict=True))
    assert torch.allclose(one[0].norm(dim=0), one[1].norm(dim=1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.llama_adapters(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("options", [{}, {"coding": "bitmap", "density": 0.5}, {"method": "bands", "bands": "2@8,*@4"}])
@pytest.mark.parametrize("half", [False, True])
def test_a_pack_is_what_it_unpacks_to(llama: Path, tmp_path: Path, options: dict[str, Any], half: bool) -> None:
    """PEFT loads what comes out, makes the same change of it as the pack's source, and types and config stay."""
    adapter = adapters.copied(llama, tmp_path / "adapter")
    if half:
        adapters.edit_tensors(adapter, lambda tensors: {name: each.bfloat16() for name, each in tensors.items()})
    told = merging.compress(adapter, tmp_path / "p.safetensors", **options)
    merging.decompress(tmp_path / "p.safetensors", tmp_path / "out")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert {name: (each.dtype, each.shape) for name, each in before.items()} == {
        name: (each.dtype, each.shape) for name, each in after.items()
    }
    config = [json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, tmp_path / "out")]
    assert config[0] == config[1]
    packed = changes(tmp_path / "p.safetensors")
    assert tiny.identical(packed, changes(tmp_path / "out"))
    by_peft = adapters.change_of(llama / "base", tmp_path / "out")
    adapters.assert_close({name: packed[name] for name in packed}, {name: by_peft[name] for name in packed}, 1e-5)
    whole = changes(adapter)
    for name, change in whole.items():
        error = float((packed[name] - change).norm() / change.norm())
        assert told.errors[name] == pytest.approx(error, abs=1e-6)
    squares = [
        sum(float(each.square().sum()) for each in some)
        for some in ([packed[n] - whole[n] for n in whole], whole.values())
    ]
    assert told.error == pytest.approx(math.sqrt(squares[0] / squares[1]), abs=1e-6)
    assert told.bytes_after == (tmp_path / "p.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("method", "given"),
    [("linear", {}), ("ties", {"rank": 4}), ("dare+task_arithmetic", {"rank": 4, "seed": 3}), ("knots+ties", {})],
)
def test_merges_of_packs_are_those_of_what_they_unpack_to(
    llama: Path, tmp_path: Path, method: str, given: Mapping[str, Any]
) -> None:
    """To the last bit; packs beside ordinary adapters too."""
    merging.compress(llama / "plain", tmp_path / "p.safetensors")
    merging.compress(llama / "plain", tmp_path / "q.safetensors", method="bands")
    for name in "pq":
        merging.decompress(tmp_path / f"{name}.safetensors", tmp_path / name)
    files, folders = ([tmp_path / f"{name}{end}" for name in "pq"] for end in (".safetensors", ""))
    for inputs, out in ((files, "one"), (folders, "other")):
        merging.merge([*inputs, llama / "plain"], method=method, output=tmp_path / out, **given)
    one, other = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("one", "other"))
    assert tiny.identical(one, other)


def test_dora_and_biases_keep_what_are_no_factors(llama: Path, tmp_path: Path) -> None:
    told = merging.compress(llama / "dora", tmp_path / "p.safetensors", method="bands", bands="*@8")
    assert "kept as they are" in told.notices[0]
    merging.decompress(tmp_path / "p.safetensors", tmp_path / "out")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (llama / "dora", tmp_path / "out"))
    assert all(torch.equal(one[name], other[name]) for name in one if "magnitude" in name)
    wanted, got = (adapters.baked(llama / "base", folder) for folder in (llama / "dora", tmp_path / "out"))
    adapters.assert_close(got, wanted, 5e-3)


def test_scales_that_keep_the_norm(llama: Path, full: tuple[Path, list[Path]], tmp_path: Path) -> None:
    merging.compress(llama / "plain", tmp_path / "p.safetensors", scale="norm")
    base, (one, _) = full
    merging.compress(one, tmp_path / "q.safetensors", base=base, method="ternary", scale="norm")
    whole = {name: tiny.load(one)[name].double() - each.double() for name, each in tiny.load(base).items()}
    for pack, wanted in (("p", changes(llama / "plain")), ("q", whole)):
        got = changes(tmp_path / f"{pack}.safetensors")
        assert {n: float(got[n].norm()) for n in got} == pytest.approx(
            {n: float(wanted[n].norm()) for n in got}, rel=1e-5
        )
    with pytest.raises(OptionError, match="leave one of alpha and scale out"):
        merging.compress(llama / "plain", tmp_path / "r.safetensors", scale="norm", alpha=1.0)


def test_starts_that_a_pack_would_lose_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"its start took off the base \(pissa\).*passthrough"):
        merging.compress(llama / "pissa", tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_kohya_files_stay_kohya_files(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(2)
    path = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {
        f"{path}.lora_down.weight": torch.randn(4, 16, 3, 3, generator=random).half(),
        f"{path}.lora_up.weight": torch.randn(32, 4, 1, 1, generator=random).half(),
        f"{path}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "k.safetensors", {"ss_base_model_version": "sd_v1", "ss_tag_frequency": "private"})
    merging.compress(tmp_path / "k.safetensors", tmp_path / "p.safetensors", method="bands", bands="*@8")
    merging.decompress(tmp_path / "p.safetensors", tmp_path / "o.safetensors")
    with safe_open(tmp_path / "o.safetensors", "pt") as found:
        assert found.metadata()["ss_base_model_version"] == "sd_v1" and "ss_tag_frequency" not in found.metadata()
        assert set(found.keys()) == set(tensors)
        assert float(found.get_tensor(f"{path}.alpha")) == 2.0
    model = open_model(tmp_path / "p.safetensors")
    assert isinstance(model, Adapter) and model.dialect == "Kohya"
    one, other = (
        changes(tmp_path / "k.safetensors")[f"{path}.weight"],
        changes(tmp_path / "p.safetensors")[f"{path}.weight"],
    )
    assert one.shape == (32, 16, 3, 3) and float((one - other).norm() / one.norm()) < 0.02


def test_bands_lose_less_with_more_bits() -> None:
    """And the fit to what codes became of the lower factor loses less than none; each bound is the truncation's."""
    random = torch.Generator().manual_seed(3)
    basis = [torch.linalg.qr(torch.randn(size, 96, generator=random, dtype=torch.float64))[0] for size in (128, 96)]
    matrix = (basis[0] * torch.arange(1, 97).double().pow(-0.6) @ basis[1].mT).float()
    errors = {}
    for text in ("*@1", "*@2", "4@8,*@2", "*@4", "*@8", "24@8"):
        bands = parse_bands(text)
        factors = truncate_to_bands(matrix, bands)
        up, down = (
            decoded(coding, payload, tuple(each.shape)).read()
            for (coding, payload), each in zip(
                pack_factors(factors.up, factors.down, bands, matrix), (factors.up, factors.down), strict=True
            )
        )
        errors[text] = float((matrix - up @ down).norm() / matrix.norm())
    assert errors["*@1"] > errors["*@2"] > errors["4@8,*@2"] > errors["*@4"] > errors["*@8"]
    assert errors["*@8"] < 0.02
    tail = torch.linalg.svdvals(matrix.double())
    assert errors["24@8"] == pytest.approx(float(tail[24:].norm() / tail.norm()), rel=0.02)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return tiny.checkpoint(tmp_path_factory.mktemp("full"), 2, width=32, vocab=64)


@pytest.mark.parametrize("options", [{}, {"bands": "4@8,*@2", "density": 0.5}, {"method": "ternary", "density": 0.3}])
def test_packs_of_full_models(full: tuple[Path, list[Path]], tmp_path: Path, options: dict[str, Any]) -> None:
    """The error told is that of the model that comes out, and merges of the pack are merges of that model."""
    base, (one, two) = full
    told = merging.compress(one, tmp_path / "p.safetensors", base=base, **options)
    merging.decompress(tmp_path / "p.safetensors", tmp_path / "out", base=base)
    start, whole, got = tiny.load(base), tiny.load(one), tiny.load(tmp_path / "out")
    lost = sum(float((got[n].double() - whole[n].double()).square().sum()) for n in start)
    norm = sum(float((start[n].double() - whole[n].double()).square().sum()) for n in start)
    assert told.error == pytest.approx(math.sqrt(lost / norm), rel=1e-3)
    assert told.bytes_after < 0.6 * told.bytes_before
    assert all(torch.allclose(got[name], whole[name], atol=1e-6) for name in start if "norm" in name)
    for model, out in ((tmp_path / "p.safetensors", "m1"), (tmp_path / "out", "m2")):
        merging.merge([model, two], method="task_arithmetic", scale=0.5, base=str(base), output=tmp_path / out)
    merged = [tiny.load(tmp_path / out) for out in ("m1", "m2")]
    adapters.assert_close(*merged, tolerance=1e-5)
    facts = inspect(tmp_path / "p.safetensors")
    assert facts["kind"] == "pack of a model" and facts["packed_bytes"] < told.bytes_after
    angles = compare([tmp_path / "p.safetensors", one], base=base).cosines
    assert angles[0][1] == pytest.approx(math.sqrt(max(0.0, 1 - told.error**2)), abs=0.05)


def test_what_did_not_change_is_not_packed(full: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, _ = full
    same = tiny.load(base)
    changed = dict(same)
    name = "model.layers.1.mlp.up_proj.weight"
    changed[name] = changed[name] + 1
    one = tiny.save(tmp_path / "one", changed)
    merging.compress(one, tmp_path / "p.safetensors", base=base, bands="1@8")
    assert list(changes(tmp_path / "p.safetensors")) == [name]
    assert inspect(tmp_path / "p.safetensors")["rank"] == 1
    with pytest.raises(InputError, match="there is no change to pack"):
        merging.compress(base, tmp_path / "q.safetensors", base=tiny.save(tmp_path / "copy", same))


def test_another_base_is_refused(full: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (one, two) = full
    merging.compress(one, tmp_path / "p.safetensors", base=base)
    merging.compress(one, tmp_path / "q.safetensors", base=two)
    with pytest.raises(InputError, match="packed with another base"):
        merging.decompress(tmp_path / "p.safetensors", tmp_path / "out", base=two)
    held = merging.decompress(tmp_path / "p.safetensors", tmp_path / "beside", base=two, allow_different_bases=True)
    assert held.kind == "model"
    with pytest.raises(InputError, match="is not a tensor of the base"):
        merging.compress(EXAMPLES / "bbc", tmp_path / "r.safetensors", base=base)
    with pytest.raises(InputError, match="packed with another base"):
        merging.merge([tmp_path / "p.safetensors"], method="linear", base=str(two), output=tmp_path / "out")
    with pytest.raises(InputError, match="packed with different bases"):
        compare([tmp_path / "p.safetensors", tmp_path / "q.safetensors"])
    merging.merge(
        [tmp_path / "p.safetensors"], method="task_arithmetic", base=str(two), output=tmp_path / "out",
        allow_different_bases=True,
    )  # fmt: skip
    sharded = tiny.save(tmp_path / "sharded", tiny.load(base), shards=3)
    merging.decompress(tmp_path / "p.safetensors", tmp_path / "same", base=sharded)


def test_a_pack_grows_into_a_store(full: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (one, two) = full
    merging.compress(one, tmp_path / "p.safetensors", base=base)
    merging.decompress(tmp_path / "p.safetensors", tmp_path / "out", base=base)
    made = []
    for name, first in (("packed", tmp_path / "p.safetensors"), ("unpacked", tmp_path / "out")):
        store = merging.ContinualStore.create(tmp_path / name, base=base, method="opcm")
        store.add(first)
        store.add(two)
        store.export(tmp_path / f"{name}-out")
        made.append(tiny.load(tmp_path / f"{name}-out"))
    adapters.assert_close(*made, tolerance=1e-4)


@pytest.fixture(scope="module")
def packs(full: tuple[Path, list[Path]], llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("packs")
    base, (one, _) = full
    merging.compress(llama / "plain", folder / "a.safetensors")
    merging.compress(llama / "plain", folder / "b.safetensors", coding="bitmap")
    merging.compress(one, folder / "c.safetensors", base=base, bands="2@8,*@2")
    return [folder / f"{name}.safetensors" for name in "abc"]


def read_all(path: Path) -> None:
    model = open_model(path)
    assert isinstance(model, Adapter)
    for change in model.changes.values():
        for stored in change.tensors:
            stored.read()


def test_flipped_bytes_are_noticed(packs: list[Path], tmp_path: Path) -> None:
    """Wherever they are: one clear error, or a name that only looks different; never a crash, never other values."""
    random = np.random.default_rng(0)
    for path in packs:
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        wanted = changes(path)
        for place in [*random.integers(0, len(data), 60), *random.integers(header, len(data), 60)]:
            bad = bytearray(data)
            bad[place] ^= 1 << int(random.integers(8))
            broken = tmp_path / "broken.safetensors"
            broken.write_bytes(bad)
            try:
                got = changes(broken)
            except MergingError as error:
                assert str(broken) in str(error) or "tensor" in str(error)
                continue
            same = got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in wanted)
            raw = path.name == "c.safetensors"  # vectors lie in it as they are, without a checksum
            assert place < header or same or raw


def test_cut_files_and_lying_headers_are_refused(packs: list[Path], tmp_path: Path) -> None:
    data = packs[0].read_bytes()
    broken = tmp_path / "broken.safetensors"
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        broken.write_bytes(data[:size])
        with pytest.raises(FormatError):
            open_model(broken)
    tensors = load_file(packs[0])
    with safe_open(packs[0], "pt") as found:
        metadata = found.metadata()
    manifest = json.loads(metadata["merging_pack"])

    def written(**edits: Any) -> Path:
        save_file(tensors, broken, {"merging_pack": json.dumps({**manifest, **edits})})
        return broken

    first, *others = manifest["tensors"]
    huge = {**first, "shape": [1 << 31, 1 << 31]}
    lies: list[tuple[dict[str, Any], str]] = [
        ({"version": 2}, "version 2, and 1 is read"),
        ({"tensors": others}, "describes .* and holds others"),
        ({"tensors": [huge, *others]}, "should have more than"),
        ({"tensors": [{**first, "shape": [-1, 4]}, *others]}, "of the shape"),
        ({"tensors": [{**first, "shape": [1 << 40] * 9}, *others]}, "of the shape"),
        ({"tensors": [{**first, "coding": {**first["coding"], "b": 99}}, *others]}, "tensors.0.coding"),
        ({"tensors": [{**first, "coding": {**first["coding"], "scale": -1}}, *others]}, "tensors.0.coding"),
        ({"tensors": [{**first, "kind": "I64"}, *others]}, "tensors.0.kind"),
        ({"tensors": [{**first, "name": others[0]["name"]}, *others]}, "twice"),
        ({"dialect": "none"}, "dialect"),
        ({"dialect": None}, "belongs to no change"),
    ]
    for edits, reason in lies:
        with pytest.raises(FormatError, match=reason):
            open_model(written(**edits))
    bands = {
        "coding": "bands",
        "bands": [[1, 1]],
        "matrices": [1, 1 << 30, 1 << 20],
        "axis": 1,
        "unit": 1.0,
        "checksum": 0,
    }
    with pytest.raises(FormatError, match="should have"):
        open_model(written(tensors=[{**first, "shape": [1 << 30, 1 << 20], "coding": bands}, *others]))
    shorter = {**first, "shape": [first["shape"][0], first["shape"][1] // 2]}
    with pytest.raises(FormatError):
        read_all(written(tensors=[shorter, *others]))
    save_file(tensors, broken)
    with pytest.raises(FormatError, match="no merging_pack"):
        open_model(broken)


def test_what_cannot_be_packed_is_refused_and_leaves_nothing(
    llama: Path, full: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, (one, _) = full
    out = tmp_path / "out"
    out.mkdir()
    broken = adapters.edit_tensors(
        adapters.copied(llama, tmp_path / "nan"),
        lambda tensors: {name: each.index_fill(0, torch.tensor([0]), math.nan) for name, each in tensors.items()},
    )
    odd = tiny.load(one)
    odd["model.norm.weight"][0] = math.inf
    cases: list[tuple[Any, dict[str, Any], type[MergingError], str]] = [
        (broken, {}, InputError, "NaN or infinite"),
        (tiny.save(tmp_path / "odd", odd), {"base": base}, InputError, "model.norm.weight holds NaN"),
        (one, {}, InputError, "give its base"),
        (one, {"base": llama / "plain"}, InputError, "is an adapter"),
        (llama / "plain", {"density": 0.0}, OptionError, "density"),
        (llama / "plain", {"bands": "*@4"}, OptionError, "setting of the method bands"),
        (llama / "plain", {"method": "bands", "alpha": 1.0}, OptionError, "alpha is a setting of ternary"),
        (llama / "plain", {"method": "bands", "bands": "3@7"}, OptionError, "write directions and their bits"),
        (llama / "plain", {"coding": "zip"}, OptionError, "coding"),
    ]
    for model, options, kind, reason in cases:
        with pytest.raises(kind, match=reason):
            merging.compress(model, out / "p.safetensors", **options)
    with pytest.raises(OutputError, match=r"ends in \.safetensors"):
        merging.compress(llama / "plain", out / "p.bin")
    with pytest.raises(OutputError, match="name of an adapter of PEFT's"):
        merging.compress(llama / "plain", out / "adapter_model.safetensors")
    assert list(out.iterdir()) == []
    merging.compress(llama / "plain", out / "p.safetensors")
    with pytest.raises(OutputError, match="exists already"):
        merging.compress(llama / "plain", out / "p.safetensors")
    with pytest.raises(InputError, match="is a pack already"):
        merging.compress(out / "p.safetensors", out / "q.safetensors")
    with pytest.raises(InputError, match="is not a pack"):
        merging.decompress(llama / "plain", out / "q")
    with pytest.raises(InputError, match="leave base= out"):
        merging.decompress(out / "p.safetensors", out / "q", base=base)
    assert [path.name for path in out.iterdir()] == ["p.safetensors"]


def test_command_line(tmp_path: Path) -> None:
    pack, folder = tmp_path / "bbc.safetensors", tmp_path / "bbc"
    run = CliRunner()
    done = run.invoke(cli, ["compress", str(EXAMPLES / "bbc"), "-o", str(pack)])
    assert done.exit_code == 0, done.output
    assert "0.96 bits a parameter" in done.output and "at worst (encoder.layer" in done.output
    done = run.invoke(
        cli, ["compress", str(EXAMPLES / "bbc"), "-o", str(pack), "--overwrite", "--json", "--density", "0.3"]
    )
    told = json.loads(done.stdout)
    assert told["ratio"] > 10 and len(told["errors"]) == 12 and told["bytes_after"] == pack.stat().st_size
    done = run.invoke(cli, ["decompress", str(pack), "-o", str(folder), "--json"])
    assert json.loads(done.stdout)["tensors"] == 24
    assert tiny.identical(changes(pack), changes(folder))
    done = run.invoke(cli, ["verify", str(pack)])
    assert done.exit_code == 1 and "is a pack, which no other program reads" in done.output
    done = run.invoke(cli, ["compress", str(EXAMPLES / "bbc"), "-o", str(pack)])
    assert done.exit_code == 1 and "exists already" in done.output
    shutil.rmtree(folder)
