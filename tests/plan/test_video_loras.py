"""LoRAs of video models in the forms of their trainers: baked into both layouts, and converted for diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from support.diffusion_models import State
from support.image_denoisers import as_published
from support.video_denoisers import (
    FORMS,
    VIDEO_FAMILIES,
    bases,
    build_video_denoiser,
    fused_by_diffusers,
    write_form,
)

QUICK = ("wan-i2v", "hunyuan-video", "ltx2", "cosmos-predict2")


def _read(path: Path) -> State:
    """The tensors of a folder or a file, without the prefix of NVIDIA's files."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name.removeprefix("net."): value for file in files for name, value in load_file(file).items()}


def _bake(lora: Path, base: Path) -> State:
    out = lora.with_name(f"baked-{lora.stem}-{base.name}")
    merging.merge([lora], method="task_arithmetic", base=base, kind="model", output=out, threads=1)
    return _read(out)


def _check_close(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def _check_baked(tmp_path: Path, family: str, form: str) -> State:
    """Check the results in both layouts against the definition, and return the result in diffusers'."""
    changes = write_form(tmp_path / "lora.safetensors", family, form)
    state = build_video_denoiser(family).state_dict()
    style = FORMS[form].style
    before = as_published(state) if style == "published" else state
    wanted = {name: value + changes[name] if name in changes else value for name, value in before.items()}
    assert changes.keys() < wanted.keys()
    diffusers, published = (_bake(tmp_path / "lora.safetensors", base) for base in bases(family, tmp_path))
    _check_close(as_published(diffusers) if style == "published" else diffusers, wanted)
    _check_close(published, as_published(diffusers))
    return diffusers


def _check_converted(tmp_path: Path, family: str, baked: State, base: Path | None) -> None:
    """Check that diffusers' loader makes of the converted file what was baked."""
    out = tmp_path / ("based.safetensors" if base else "alone.safetensors")
    merging.merge([tmp_path / "lora.safetensors"], method="linear", format="diffusers", base=base, output=out)
    _check_close(fused_by_diffusers(family, out), baked)


@pytest.mark.parametrize("family", QUICK)
def test_a_form_of_each_family(tmp_path: Path, family: str) -> None:
    baked = _check_baked(tmp_path, family, "musubi-tuner")
    _check_converted(tmp_path, family, baked, None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_every_form_of_each_family(tmp_path: Path, family: str, form: str) -> None:
    """Also converted to Kohya's and PEFT's files, which change the model as the input does."""
    baked = _check_baked(tmp_path, family, form)
    base = tmp_path / "transformer"
    if VIDEO_FAMILIES[family].loader:
        _check_converted(tmp_path, family, baked, None)
        _check_converted(tmp_path, family, baked, base)
    for format in ("kohya", "peft"):
        out = tmp_path / f"{format}.safetensors"
        merging.merge([tmp_path / "lora.safetensors"], method="linear", format=format, base=base, output=out)
        _check_close(_bake(out, base), baked)


@pytest.mark.parametrize("layout", ["diffusers", "published"])
def test_changes_in_full(tmp_path: Path, layout: str) -> None:
    """lightx2v's files: norms, biases, modulations and whole layers next to factors."""
    changes = write_form(tmp_path / "lora.safetensors", "wan", "lightx2v")
    state = build_video_denoiser("wan").state_dict()
    before = as_published(state)
    leaves = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    full = {
        name: torch.full_like(before[name], number + 1.0)
        for number, name in enumerate(
            ("blocks.0.norm3.weight", "blocks.0.norm3.bias", "blocks.1.self_attn.q.bias", "blocks.1.modulation",
             "blocks.0.self_attn.norm_q.weight", "patch_embedding.weight", "patch_embedding.bias", "head.head.bias",
             "head.modulation", "time_projection.1.bias")
        )
    }  # fmt: skip
    named = {
        f"diffusion_model.{name.rpartition('.')[0]}.{leaves[name.rpartition('.')[2]]}": value
        for name, value in full.items()
    }
    save_file({**load_file(tmp_path / "lora.safetensors"), **named}, tmp_path / "lora.safetensors")
    base = bases("wan", tmp_path)[layout == "published"]
    got = _bake(tmp_path / "lora.safetensors", base)
    wanted = {name: value + {**changes, **full}.get(name, 0) for name, value in before.items()}
    _check_close(as_published(got) if layout == "diffusers" else got, wanted)
