"""A merge of files that name modules alike keeps these names, and programs take from it all that they took before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.errors import InputError
from merging.serving import verify
from support.diffusion_families import ROWS, Row, by_definition, diffusers_reads, write
from support.diffusion_models import FLUX, build

WEIGHTS = (0.7, -0.4)


def check_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def weighted(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: sum((w * part[name] for w, part in zip(WEIGHTS, parts, strict=True)), torch.zeros(()))
        for name in parts[0]
    }


def _is_raw(row: Row) -> bool:
    """Whether the names are those that PEFT gives the modules of a model."""
    return row.prefix == "base_model.model."


@pytest.mark.parametrize("family", ROWS)
def test_names_and_form_stay(tmp_path: Path, family: str) -> None:
    row = ROWS[family]
    inputs = [write(row, tmp_path / f"{rank}.safetensors", rank, rank, 1.5 * rank) for rank in (2, 3)]
    out = tmp_path / "out.safetensors"
    merging.merge(inputs, method="task_arithmetic", weights=WEIGHTS, output=out)
    assert load_file(out).keys() == load_file(inputs[0]).keys()
    with safe_open(out, "pt") as opened:
        header = opened.metadata()
    assert "merging_recipe" in header
    stated = {"lora_adapter_metadata": row.configured, "ss_network_dim": row.flat, "adapter_config": _is_raw(row)}
    assert {key: key in header for key in stated} == stated
    if not row.configured:
        check_close(by_definition(out), weighted([by_definition(path) for path in inputs]))
    if row.loader:
        taken = [diffusers_reads(row, path) for path in inputs]
        assert taken[0]
        check_close(diffusers_reads(row, out), weighted(taken))


def merged(inputs: list[Path], out: Path, **options: Any) -> merging.Merged:
    """Their weighted sum, by default."""
    settings = {"method": "task_arithmetic", "weights": WEIGHTS[: len(inputs)], **options}
    return merging.merge(inputs, output=out, threads=1, **settings)


# ---- a format that is asked for

_NATIVE = "z-image native"  # diffusers keeps its fused attention under a name that its model does not have


@pytest.mark.parametrize("family", [name for name, row in ROWS.items() if row.loader and name != _NATIVE])
def test_diffusers_takes_its_format(tmp_path: Path, family: str) -> None:
    """Under its own names it takes all that it took under others."""
    row = ROWS[family]
    given = write(row, tmp_path / "a.safetensors", 1, 2, 3.0)
    out = tmp_path / "out.safetensors"
    merged([given], out, format="diffusers", weights=1.0)
    got, wanted = diffusers_reads(replace(row, configured=True), out), diffusers_reads(row, given)
    lost = {name for name in got.keys() - wanted.keys() if family == "flux.2 flat" and "_modulation" in name}
    wanted.pop("text_embedding_projection.aggregate_embed", None)  # which it keeps next to its own name
    check_close({name: value for name, value in got.items() if name not in lost}, wanted)


def test_connectors_next_to_a_denoiser(tmp_path: Path) -> None:
    """LTX-2's files hold both: diffusers' loader takes both under its own names, and the file is read again."""
    row = ROWS["ltx-2 comfyui"]
    one = load_file(write(row, tmp_path / "a.safetensors", 1, 2, None))
    other = load_file(write(ROWS["ltx-2 connectors"], tmp_path / "b.safetensors", 2, 2, None))
    save_file({**one, **other}, tmp_path / "both.safetensors")
    merged([tmp_path / "both.safetensors"], tmp_path / "out.safetensors", format="diffusers", weights=1.0)
    wanted = diffusers_reads(row, tmp_path / "both.safetensors")
    assert {name.partition(".")[0] for name in wanted} == {"transformer", "connectors"}
    check_close(diffusers_reads(replace(row, configured=True), tmp_path / "out.safetensors"), wanted)
    merged([tmp_path / "out.safetensors"], tmp_path / "again.safetensors", weights=1.0)
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(tmp_path / "out.safetensors").keys()


@pytest.mark.parametrize("family", ROWS)
def test_comfyui_takes_kohyas_format(tmp_path: Path, family: str) -> None:
    row = ROWS[family]
    out = tmp_path / "out.safetensors"
    try:
        merged([write(row, tmp_path / "a.safetensors", 1, 2, 3.0)], out, format="kohya", weights=1.0)
    except InputError as error:
        assert "leave format= out" in str(error)
        assert family in ("lumina 2 diffusers", "ltx-2 connectors")
        return
    assert not [each for each in verify(str(out), ["comfyui"]).findings if each.severity == "ignores"]


# ---- changes in full, forms that differ, names that differ


def test_changes_in_full_stay_in_full(tmp_path: Path) -> None:
    """lightx2v's files: weights, biases and norms beside factors, each under its name, without a rank to choose."""
    row = ROWS["wan lightx2v"]
    states = []
    for seed in (1, 2):
        state = load_file(write(row, tmp_path / f"{seed}.safetensors", seed, 2, 4.0))
        random = torch.Generator().manual_seed(seed)
        full = {
            "blocks.0.self_attn.q.diff_b": (8,),
            "blocks.0.norm3.diff": (8,),
            "patch_embedding.diff": (8, 4, 1, 2, 2),
            "head.head.diff": (4, 8),
            "head.head.diff_b": (4,),
        }
        state |= {f"diffusion_model.{name}": torch.randn(shape, generator=random) for name, shape in full.items()}
        save_file(state, tmp_path / f"{seed}.safetensors")
        states.append(state)
    out = tmp_path / "out.safetensors"
    merged([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], out)
    got = load_file(out)
    assert got.keys() == states[0].keys()
    for name in got:
        if ".diff" in name:
            torch.testing.assert_close(got[name], WEIGHTS[0] * states[0][name] + WEIGHTS[1] * states[1][name])


def test_two_forms_of_one_naming(tmp_path: Path) -> None:
    """The first input's factors, and alphas since one input has them."""
    one = write(ROWS["wan comfyui"], tmp_path / "1.safetensors", 1, 2, None)
    two = write(ROWS["wan lightx2v"], tmp_path / "2.safetensors", 2, 2, 6.0)
    merged([one, two], tmp_path / "out.safetensors")
    names = load_file(tmp_path / "out.safetensors").keys()
    assert names == load_file(one).keys() | {name for name in load_file(two) if name.endswith(".alpha")}
    check_close(by_definition(tmp_path / "out.safetensors"), weighted([by_definition(path) for path in (one, two)]))


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        (("qwen comfyui", "qwen lightning"), 0),
        (("wan musubi", "wan fun"), 0),
        (("qwen lycoris", "qwen musubi"), 0),
        (("wan musubi", "wan from images"), 1),
        (("hunyuan comfyui", "hunyuan official"), 1),
        (("flux.2 raw", "flux.2 comfyui"), 1),
    ],
)
def test_names_that_differ(tmp_path: Path, kinds: tuple[str, str], named: int) -> None:
    """The names are those of the first input that has some for all modules; a note says which."""
    files = [write(ROWS[kind], tmp_path / f"{n}.safetensors", n, 2, 2.0) for n, kind in enumerate(kinds)]
    done = merged(files, tmp_path / "out.safetensors")
    (said,) = [each for each in done.notices if "names differ" in each]
    assert said.endswith(f"the output has the names of {files[named]}")
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(files[named]).keys()


def test_names_of_no_input_alone(tmp_path: Path) -> None:
    """Where no input has a name for every module, the format has one."""
    attention = {name: shape for name, shape in ROWS["wan comfyui"].modules.items() if "attn" in name}
    kinds = (
        replace(ROWS["wan comfyui"], modules=attention),
        replace(ROWS["wan diffusers"], modules={"blocks.0.attn1.to_q": (8, 8), "blocks.0.ffn.net.2": (8, 16)}),
    )
    files = [write(row, tmp_path / f"{n}.safetensors", n, 2, 2.0) for n, row in enumerate(kinds)]
    done = merged(files, tmp_path / "out.safetensors")
    assert done.format == "diffusers"
    assert any(each.endswith("the output has the names of files of diffusers") for each in done.notices)
    taken = diffusers_reads(kinds[1], tmp_path / "out.safetensors")
    one, other = (diffusers_reads(row, path) for row, path in zip(kinds, files, strict=True))
    zeros = {name: torch.zeros_like(value) for name, value in taken.items()}
    check_close(taken, weighted([{**zeros, **one}, {**zeros, **other}]))


# ---- with a base, from packs


def test_a_base_changes_no_names(tmp_path: Path) -> None:
    """Where the base keeps apart what the files fuse, the merge fuses it again."""
    build("flux").save_pretrained(tmp_path / "base")
    prefix = "diffusion_model."
    files = []
    for seed in (1, 2):
        random = torch.Generator().manual_seed(seed)
        state = {}
        for module, (outputs, inputs) in FLUX.items():
            state[f"{prefix}{module}.lora_A.weight"] = torch.randn(2, inputs, generator=random)
            state[f"{prefix}{module}.lora_B.weight"] = torch.randn(outputs, 2, generator=random)
        save_file(state, tmp_path / f"{seed}.safetensors")
        files.append(tmp_path / f"{seed}.safetensors")
    out = tmp_path / "out.safetensors"
    merged(files, out, base=tmp_path / "base")
    assert load_file(out).keys() == load_file(files[0]).keys()
    check_close(by_definition(out), weighted([by_definition(path) for path in files]))


def test_packs_keep_names(tmp_path: Path) -> None:
    given = write(ROWS["z-image ai-toolkit"], tmp_path / "a.safetensors", 1, 2, None)
    merging.compress(given, tmp_path / "pack.safetensors", method="bands")
    merged([tmp_path / "pack.safetensors"], tmp_path / "out.safetensors", weights=1.0)
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(given).keys()


def test_xlabs_becomes_diffusers(tmp_path: Path) -> None:
    """Its one pair of factors for queries, keys and values makes three modules, which it has no names for."""
    state = {}
    for part, outputs in (("qkv", 24), ("proj", 8)):
        name = f"double_blocks.0.processor.{part}_lora1"
        state |= {f"{name}.down.weight": torch.randn(2, 8), f"{name}.up.weight": torch.randn(outputs, 2)}
    save_file(state, tmp_path / "a.safetensors")
    done = merged([tmp_path / "a.safetensors"] * 2, tmp_path / "out.safetensors")
    assert done.format == "diffusers"
    assert not any("names differ" in each for each in done.notices)
    modules = {name.partition(".lora_")[0] for name in load_file(tmp_path / "out.safetensors")}
    assert modules == {f"transformer.transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}


@pytest.mark.parametrize("out", ["folder", "bare.safetensors"])
def test_raw_names_of_peft_come_out_as_peft_saves_them(tmp_path: Path, out: str) -> None:
    """``.default`` is the name of an adapter in memory; PEFT writes none, and looks for none in a file."""
    values = {"lora_A": torch.randn(2, 8), "lora_B": torch.randn(8, 2)}
    raw = {f"base_model.model.blocks.0.self_attn.q.{leaf}.default.weight": value for leaf, value in values.items()}
    save_file(raw, tmp_path / "a.safetensors")
    merging.merge([tmp_path / "a.safetensors"], method="passthrough", output=tmp_path / out)
    written = tmp_path / out / "adapter_model.safetensors" if out == "folder" else tmp_path / out
    assert load_file(written).keys() == {name.replace(".default", "") for name in raw}
