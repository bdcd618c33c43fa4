"""``merge verify --against-sources``: outputs of every kind hold, and each kind of harm is found and named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merging
from merging.engine.samples import cut_pieces, sample_pieces
from merging.errors import InputError, OptionError
from merging.output.header import header_metadata
from merging.serving import Verdict
from support.commands import merge, ok, refused
from support.pipelines import diffusion_pipeline, sentence_encoder
from support.stores import Models, grown
from support.tiny import adapters, checkpoint, fine_tune, load, save

OUTPUTS: dict[str, dict[str, Any]] = {
    "a mean": {"models": ["tuned0", "tuned1"], "method": "linear"},
    "a bare file": {"models": ["tuned0/model.safetensors", "tuned1/model.safetensors"], "method": "linear"},
    "shards": {"models": ["tuned0", "tuned1"], "method": "ties", "base": "base", "shard_size": 2000},
    "random masks": {"models": ["tuned0", "tuned1"], "method": "dare+task_arithmetic", "base": "base", "seed": 3},
    "a threshold of the whole model": {"models": ["tuned0", "tuned1"], "method": "pcb", "base": "base"},
    "changes set aside": {"models": ["tuned0", "tuned1"], "method": "lines+tsv", "base": "base"},
    "an adapter": {"models": ["more/adapter0", "more/adapter1"], "method": "ties"},
    "ranks by energy": {"models": ["more/adapter0", "more/adapter1"], "method": "svd", "energy": 0.9},
    "a baked adapter": {"models": ["more/adapter0"], "method": "linear", "base": "more/base", "kind": "model"},
    "a stage": {
        "models": [{"models": ["tuned0", "tuned1"], "method": "slerp"}, "base"],
        "method": "ties",
        "base": "base",
    },
}


EVERYDAY = ("a bare file", "shards", "changes set aside", "an adapter")
KINDS = [pytest.param(kind, marks=[] if kind in EVERYDAY else pytest.mark.exhaustive) for kind in OUTPUTS]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with models, and adapters of another model."""
    checkpoint(tmp_path)
    adapters(tmp_path / "more", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(kind: str = "a mean", output: str | Path = "out") -> Path:
    """Make an output."""
    stated = OUTPUTS[kind]
    output = f"{output}.safetensors" if kind == "a bare file" else output
    models = [each if isinstance(each, str) else merging.Recipe(**each) for each in stated["models"]]
    return merging.merge(models, output=output, **{key: each for key, each in stated.items() if key != "models"}).path


def check(output: Path, **options: Any) -> Verdict:
    return merging.verify_against_sources(output, **{"sample": "all", **options})


def problems(verdict: Verdict) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {each.what: (each.severity, each.where) for each in verdict.findings if each.severity != "ok"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_holds(folder: Path, kind: str) -> None:
    out = make(kind)
    for sample in ("all", 3):
        verdict = check(out, sample=sample)
        assert verdict.served and not problems(verdict)
        assert "have the same bits" in verdict.findings[-1].what


@pytest.mark.parametrize("kind", KINDS)
def test_one_other_bit_is_found(folder: Path, kind: str) -> None:
    """The last bit of the last byte of a tensor: the finding names it, its place and both values."""
    out = make(kind)
    file = out if out.is_file() else sorted(out.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    place = 8 + size + header[name]["data_offsets"][1] - 4  # the lowest byte of the last element
    data[place] ^= 1
    file.write_bytes(data)
    found = check(out)
    last = [each - 1 for each in header[name]["shape"]]
    ((what, (severity, where)),) = problems(found).items()
    assert (what, severity) == (f"{name}: other values than the sources give", "differs")
    with safe_open(file, "pt") as opened:
        value = opened.get_tensor(name).flatten()[-1].item()
    assert where[0].startswith(f"at {last}: {value!r} here, ")
    assert where[1].startswith("1 of ") and not found.served


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    """Change the tensors and the metadata of a file."""
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def test_tensors_that_are_missing_added_or_of_another_type_are_named(folder: Path) -> None:
    def harm(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        del tensors["lm_head.weight"]
        tensors["extra"] = torch.ones(1)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    out = make()
    rewrite(out / "model.safetensors", harm)
    assert problems(check(out)) == {
        "tensors that the recipe makes are missing": ("differs", ("lm_head.weight",)),
        "the recipe makes no such tensors": ("differs", ("extra",)),
        "tensors have other types or shapes than the recipe makes": (
            "differs",
            ("model.norm.weight: F16 [8], planned F32 [8]",),
        ),
    }


def test_companions_are_compared(folder: Path) -> None:
    out = make()
    (out / "README.md").write_text("mine")
    assert check(out).served
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    (out / "README.md").unlink()
    found = problems(check(out))
    assert found["files that go with the weights are missing"] == ("differs", ("README.md",))
    assert found["the config is not as it was written: was it edited?"] == ("differs", ("config.json",))


def test_sources_that_changed_are_named_and_missing_ones_refused(folder: Path) -> None:
    out = make()
    shutil.move("tuned0", "moved")
    with pytest.raises(InputError, match=r"tuned0, a source of .*, is not at hand"):
        check(out)
    assert check(out, sources={"tuned0": "moved"}).served
    save(folder / "moved", fine_tune(load(folder / "base"), 9))
    ((what, (severity, where)),) = problems(check(out, sources={"tuned0": "moved"})).items()
    assert (what, severity) == ("the sources changed since the output was made", "differs")
    assert where[0].startswith("moved has other weights than then")


@pytest.mark.parametrize("key", ["merging_version", "torch_version", "merging_device"])
def test_another_version_or_device_may_round_otherwise(folder: Path, key: str) -> None:
    """A difference within rounding is a warning then, and any other one is still found."""

    def harm(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata[key] = "cuda" if key == "merging_device" else "0"
        tensors["lm_head.weight"][0, 0] += 1e-7

    out = make()
    rewrite(out / "model.safetensors", harm)
    verdict = check(out)
    assert verdict.served and "within rounding" in verdict.findings[-1].what
    remark, value = problems(verdict)
    assert "was made on cuda" in remark if key == "merging_device" else "was written with" in remark
    assert value == "lm_head.weight: values differ within rounding"
    rewrite(out / "model.safetensors", lambda tensors, metadata: tensors["lm_head.weight"][0, 0].add_(1e-2))
    assert not check(out).served


def test_outputs_of_other_devices_say_so(folder: Path) -> None:
    plan = merging.preview(["tuned0", "tuned1"], method="linear")
    assert header_metadata(plan, torch.device("cuda"))["merging_device"] == "cuda"
    assert header_metadata(plan, torch.device("cpu")) == header_metadata(plan)


def test_pieces_are_chosen_of_as_many_tensors_as_possible_by_the_seed(folder: Path) -> None:
    state = {"large": torch.zeros(3, 1 << 19), "small": torch.zeros(4), "other": torch.zeros(5)}
    for name in ("one", "two"):
        save(folder / name, state)
    cpu = torch.device("cpu")
    pieces = cut_pieces(merging.preview(["one", "two"], method="linear"), cpu)
    assert sorted((each.item.site.name, each.start) for each in pieces if each.stop - each.start > 5) == [
        ("large", 0),
        ("large", 1 << 19),
        ("large", 2 << 19),
    ]
    starts = set()
    for seed in range(20):
        chosen = sample_pieces(pieces, 3, seed)
        assert chosen == sample_pieces(pieces, 3, seed)
        assert {each.item.site.name for each in chosen} == set(state)
        starts |= {each.start for each in chosen}
    assert len(starts) == 3
    assert sample_pieces(pieces, 9, 0) == pieces
    merging.merge(["one", "two"], method="linear", output="out")
    rewrite(folder / "out" / "model.safetensors", lambda tensors, metadata: tensors["large"][1, 5].fill_(1))
    found = [check(folder / "out", sample=3, seed=seed).served for seed in range(6)]
    assert set(found) == {True, False}
    assert "at [1, 5]: 1.0 here, 0.0 from" in str(problems(check(folder / "out")))


def test_the_command(folder: Path) -> None:
    out = make()
    shown = ok("verify", out, "--against-sources", "--sample", "4", "--seed", "1").stdout
    assert "sources       ok  all 9 tensors are there; 4 of 9 pieces merged from the sources again, " in shown
    assert "sources" not in ok("verify", out).stdout
    rewrite(out / "model.safetensors", lambda tensors, metadata: tensors["lm_head.weight"].zero_())
    done = merge("verify", out, "--against-sources", "--sample", "all", "--json")
    verdict = json.loads(done.stdout)
    assert done.exit_code == 1 and verdict["served"] is False
    assert [each["what"] for each in verdict["findings"] if each["severity"] == "differs"] == [
        "lm_head.weight: other values than the sources give"
    ]
    with pytest.raises(OptionError, match="a number of pieces"):
        check(out, sample=0)
    assert "is not in the range" in refused("verify", out, "--against-sources", "--sample", "0", code=2)
    for words in (("--sample", "all"), ("--seed", "0"), ("--source", "tuned0=moved")):
        assert f"{words[0]} is for --against-sources: add it" in refused("verify", out, *words)


def test_outputs_without_a_recipe_and_mixtures_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="states no recipe"):
        check(folder / "tuned0")
    out = make()
    rewrite(out / "model.safetensors", lambda tensors, metadata: metadata.update(merging_moe_recipe="{}"))
    with pytest.raises(InputError, match="is a mixture of experts: `merge rerun`"):
        check(out)


def test_configs_name_models_as_they_were(folder: Path) -> None:
    """So those of moved adapters are no difference."""
    out = make("an adapter")
    shutil.move("more", "moved")
    assert not problems(check(out, sources={f"more/adapter{each}": f"moved/adapter{each}" for each in (0, 1)}))


@pytest.mark.exhaustive
def test_pipelines_encoders_quantised_outputs_and_exports(folder: Path) -> None:
    """Components that are copied are compared too, and exports of stores within rounding."""
    for name, seed in (("p1", 1), ("p2", 2)):
        diffusion_pipeline(folder / name, seed)
        sentence_encoder(folder / f"s{seed}", seed)
    merging.merge(["p1", "p2"], method="linear", output="unet", components=["unet"])
    merging.merge(["s1", "s2"], method="linear", output="encoder")
    merging.merge(["tuned0", "tuned1"], method="linear", output="codes", quantize="fp8-channel")
    grown(folder / "store", Models(folder / "base", [folder / "tuned0", folder / "tuned1"])).export("export")
    for name in ("unet", "encoder", "codes"):
        assert not problems(check(folder / name)), name
    exported = check(folder / "export")
    assert exported.served and any("states no keys of its sources" in what for what in problems(exported))
    kept = next((folder / "unet" / "text_encoder").glob("*.safetensors"))
    rewrite(kept, lambda tensors, metadata: next(iter(tensors.values())).add_(1))
    assert not check(folder / "unet").served
