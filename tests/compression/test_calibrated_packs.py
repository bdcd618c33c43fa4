"""Packs that are rounded by statistics of a few examples: what they minimize, and the statistics that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.api.inspect import inspect
from merging.cli.main import cli
from merging.compression.bands import _DAMPING, decode_factor, pack_factors, truncate_to_bands
from merging.compression.settings import parse_bands
from merging.errors import FormatError, InputError, MergingError, OptionError
from merging.maths.layer_statistics import InputGram
from merging.sources.packs.grouped import pack_groups, unpack_groups
from merging.sources.statistics_file import REST, StatisticsFile, StoredStatistics, open_statistics
from support.adapters import train
from support.example_statistics import exact_gram, save_runnable, write_texts
from support.tiny import load


def rounded(column: Tensor, bits: int, unit: float) -> Tensor:
    row = column[None].float()
    return unpack_groups(pack_groups(row, bits, unit), 1, row.shape[1], bits, unit)[0].double()


def fed_back(matrix: Tensor, lower: Tensor, x: Tensor, bits: list[int]) -> Tensor:
    """The upper factor by GPTQ as its definition has it: after each rounded direction the later ones are solved again.

    Everything is of the inputs `x` themselves, in float64.
    """
    seen, count = lower @ x.T, lower.shape[0]
    damping = torch.diag(seen.square().sum(1) * torch.tensor([_DAMPING[each] + 1e-12 for each in bits]).double())
    hessian = seen @ seen.T + damping
    free = torch.linalg.solve(hessian, seen @ (matrix @ x.T).T).T
    unit, found, kept = float(free.abs().max()), free.clone(), torch.zeros_like(free)
    for j in range(count):
        kept[:, j] = rounded(found[:, j], bits[j], unit)
        done, later = slice(0, j + 1), slice(j + 1, count)
        pull = (free - kept)[:, done] @ hessian[done, later]
        if j + 1 < count:
            found[:, later] = free[:, later] + torch.linalg.solve(hessian[later, later], pull.T).T
    return kept


@pytest.mark.parametrize("bands", ["2@8,3@4,*@2", pytest.param("*@1", marks=pytest.mark.exhaustive)])
def test_feedback_is_gptq(bands: str) -> None:
    """Against the definition, on inputs that depend on each other."""
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(24, 12, generator=random, dtype=torch.float64)
    x = torch.randn(60, 12, generator=random, dtype=torch.float64) @ torch.randn(12, 12, generator=random).double()
    spec = parse_bands(bands)
    factors = truncate_to_bands(matrix, spec)
    (up, down) = (decode_factor(*each).double() for each in pack_factors(
        factors.up, factors.down, spec, matrix, exact_gram(x)))  # fmt: skip
    bits = [bits for count, bits in spec for _ in range(12 - sum(n or 0 for n, _ in spec) if count is None else count)]
    wanted = fed_back(matrix, down, x / len(x) ** 0.5, bits)
    assert float((up - wanted).abs().max()) < 2e-3 * float(wanted.abs().max())
    plain = [decode_factor(*each).double() for each in pack_factors(factors.up, factors.down, spec, matrix)]
    errors = [float(((matrix - u @ d) @ x.T).norm()) for u, d in ((up, down), plain)]
    assert errors[0] < 0.9 * errors[1]


def test_leading_directions_are_those_of_the_outputs() -> None:
    """The closest matrix of a rank on these inputs, by an SVD of the outputs themselves."""
    random = torch.Generator().manual_seed(1)
    matrix = torch.randn(10, 14, generator=random, dtype=torch.float64)
    x = torch.randn(40, 14, generator=random, dtype=torch.float64) * torch.arange(1, 15)
    found = truncate_to_bands(matrix, ((3, 8),), exact_gram(x))
    u, s, vh = torch.linalg.svd(matrix @ x.T)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    assert torch.allclose(found.up @ found.down @ x.T, best, atol=1e-9 * float(s[0]))


def tuned_with_statistics(folder: Path, architecture: str = "bert") -> tuple[Path, Path, Path]:
    """A base, a fine-tune, and its statistics."""
    base, (one, *_) = save_runnable(folder, architecture)
    stats = folder / "stats.safetensors"
    merging.collect_statistics(one, write_texts(folder / "texts.jsonl", 12), stats)
    return base, one, stats


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return tuned_with_statistics(tmp_path_factory.mktemp("tuned"))


def gram_of(file: StatisticsFile, name: str) -> InputGram:
    gram = StoredStatistics(file, file.layers(REST)[name], None).read_inputs()
    assert gram is not None
    return gram


def output_error(stats: Path, change: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """The relative error of the outputs on the examples, from the whole matrices."""
    file, squares = open_statistics(stats), [0.0, 0.0]
    for name in file.layers(REST):
        if name in change:
            g = gram_of(file, name).dense()
            for i, each in enumerate((change[name].double() - got[name].double(), change[name].double())):
                squares[i] += float(((each.T if each.shape[1] != len(g) else each) @ g * each).sum())
    return math.sqrt(squares[0] / squares[1])


@pytest.mark.parametrize("bands", ["4@4,*@2", pytest.param("3@8", marks=pytest.mark.exhaustive)])
def test_packs_of_models(tuned: tuple[Path, Path, Path], tmp_path: Path, bands: str) -> None:
    """A pack of the same size whose outputs are closer; the errors told are the model's that comes out."""
    base, one, stats = tuned
    packs = []
    for name, options in (("plain", {}), ("by", {"stats": stats})):
        told = merging.compress(one, tmp_path / f"{name}.safetensors", base=base, bands=bands, **options)
        merging.decompress(told.path, tmp_path / name, base=base)
        packs.append(told)
    plain, by = packs
    start, whole = load(base), load(one)
    change = {name: whole[name] - start[name] for name in start}
    errors = [
        output_error(stats, change, {name: value - start[name] for name, value in load(tmp_path / each).items()})
        for each in ("plain", "by")
    ]
    assert (plain.output_error, plain.plain_output_error) == (None, None)
    assert by.output_error is not None
    assert by.output_error == pytest.approx(errors[1], rel=1e-3)
    assert by.plain_output_error == pytest.approx(errors[0], rel=1e-3)
    assert by.output_error < 0.9 * by.plain_output_error
    assert by.bits == plain.bits
    assert by.settings == f"{plain.settings}, rounded by 12 examples"
    assert "rounded by 12 examples" in json.dumps(inspect(by.path))
    with safe_open(by.path, "pt") as found:
        assert json.loads(found.metadata()["calibration"])["tokens"] == 72
    with safe_open(plain.path, "pt") as found:
        assert "calibration" not in found.metadata()


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("bands", ["*@1", "*@2", "*@8", "1@8", "2@4,6@2"])
def test_no_pack_is_worse_for_the_examples(architecture: str, bands: str, tmp_path: Path) -> None:
    """In any layer, whatever the bands; also where a matrix is transposed."""
    base, one, stats = tuned_with_statistics(tmp_path, architecture)
    by, plain = (tmp_path / f"{name}.safetensors" for name in ("by", "plain"))
    merging.compress(one, by, base=base, bands=bands, stats=stats)
    merging.compress(one, plain, base=base, bands=bands)
    for pack in (by, plain):
        merging.decompress(pack, tmp_path / pack.stem, base=base)
    start, states = load(base), [load(tmp_path / name) for name in ("by", "plain")]
    whole, file = load(one), open_statistics(stats)
    better = 0
    for name in file.layers(REST):
        gram = gram_of(file, name)
        lost = [(whole[name].double() - state[name].double()) for state in states]
        turned = architecture == "gpt2" and "lm_head" not in name
        one_error, other = (gram.energy(each.T if turned else each) for each in lost)
        assert one_error <= other * (1 + 1e-4) + 1e-12 * gram.energy(
            start[name].double().T if turned else start[name].double()
        )
        better += one_error < 0.99 * other
    assert better > 4


@pytest.mark.parametrize("bands", ["2@4", pytest.param("*@2", marks=pytest.mark.exhaustive)])
def test_packs_of_adapters(tuned: tuple[Path, Path, Path], tmp_path: Path, bands: str) -> None:
    base, _, _ = tuned
    adapter = train(tmp_path / "a", base, 1, ["query", "value"], r=4)
    stats = tmp_path / "a-stats.safetensors"
    merging.collect_statistics(adapter, write_texts(tmp_path / "texts.jsonl", 12), stats, base=base)
    pack = tmp_path / "by.safetensors"
    words = ["--method", "bands", "--bands", bands, "--stats", str(stats), "--json"]
    done = CliRunner().invoke(cli, ["compress", str(adapter), "-o", str(pack), *words])
    assert done.exit_code == 0, done.output
    by = json.loads(done.stdout)
    plain = merging.compress(adapter, tmp_path / "plain.safetensors", method="bands", bands=bands)
    for each in (pack, plain.path):
        merging.decompress(each, tmp_path / each.stem)
    file, errors = open_statistics(stats), {"by": 0.0, "plain": 0.0}
    states = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "by", "plain")}
    norm = 0.0
    for low in (name for name in states["a"] if "lora_A" in name):
        up = low.replace("lora_A", "lora_B")
        gram = gram_of(file, low.removeprefix("base_model.model.").replace("lora_A.", ""))
        products = {name: state[up].double() @ state[low].double() for name, state in states.items()}
        norm += gram.energy(products["a"])
        for name in errors:
            errors[name] += gram.energy(products["a"] - products[name])
    assert by["output_error"] == pytest.approx(math.sqrt(errors["by"] / norm), rel=1e-3)
    assert by["plain_output_error"] == pytest.approx(math.sqrt(errors["plain"] / norm), rel=1e-3)
    assert errors["by"] < errors["plain"]
    assert by["bits"] == plain.bits


def edited(stats: Path, path: Path, edit: Any) -> Path:
    """A copy of a file of statistics, with other tensors."""
    with safe_open(stats, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(stats)
    edit(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def test_statistics_that_are_refused(tuned: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """One error each, before or after the layers were read, and nothing is left."""
    base, one, stats = tuned
    first = next(name for name in load_file(stats) if name.startswith("rest/"))

    def narrow(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for name in list(tensors):
            if name.endswith(first.partition("/")[2]) and not name.startswith("sizes/"):
                tensors[name] = tensors[name][:-1].contiguous()

    def rename(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for name in list(tensors):
            part, _, layer = name.partition("/")
            tensors[f"{part}/other.{layer.replace('.', '_')}"] = tensors.pop(name)
        metadata["shared"] = "{}"

    def through(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata["facts"] = json.dumps({"through_merge": {"models": ["a", "b"]}})

    files = {
        "nan": edited(stats, tmp_path / "nan.safetensors", lambda t, m: t[first].fill_(math.nan)),
        "lacks": edited(stats, tmp_path / "lacks.safetensors", lambda t, m: t.pop(first.replace("rest", "sizes"))),
        "narrow": edited(stats, tmp_path / "narrow.safetensors", narrow),
        "other": edited(stats, tmp_path / "other.safetensors", rename),
        "through": edited(stats, tmp_path / "through.safetensors", through),
    }
    out = tmp_path / "out"
    out.mkdir()
    cases: list[tuple[Path, Path, dict[str, Any], type[MergingError], str]] = [
        (
            base.parent / "tuned2",
            stats,
            {},
            InputError,
            "holds statistics of tuned1, and not of .*, which has another content",
        ),
        (one, one / "model.safetensors", {}, FormatError, "holds no statistics"),
        (one, tmp_path / "none.safetensors", {}, FormatError, "none.safetensors: cannot be read"),
        (one, files["nan"], {}, FormatError, "are damaged: gather them again"),
        (one, files["lacks"], {}, FormatError, "are incomplete: gather them again"),
        (one, files["narrow"], {}, InputError, "and the tensor wants"),
        (one, files["other"], {}, InputError, "are of other layers than the packed ones"),
        (one, files["through"], {}, InputError, "through a merge with other models"),
        (one, stats, {"method": "ternary"}, OptionError, r"stats= is for packs by bands"),
    ]
    for model, file, options, kind, reason in cases:
        with pytest.raises(kind, match=reason):
            merging.compress(model, out / "p.safetensors", base=base, stats=file, **options)
    assert not list(out.iterdir())
    with pytest.raises(MergingError, match="stats"):
        merging.compress(one, stats, base=base, stats=stats, overwrite=True)


@pytest.mark.exhaustive
def test_layers_without_statistics_are_named(tuned: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, stats = tuned

    def drop(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for name in [name for name in tensors if "layer.0.output.dense" in name]:
            del tensors[name]

    file = edited(stats, tmp_path / "some.safetensors", drop)
    run = CliRunner()
    pack = tmp_path / "p.safetensors"
    done = run.invoke(cli, ["compress", str(one), "--base", str(base), "-o", str(pack), "--stats", str(file)])
    assert done.exit_code == 0, done.output
    assert "without statistics" in done.output
    assert "layer.0.output.dense.weight" in done.output
    assert "of what the change adds to the layers' outputs on the examples" in done.output
