"""LoRAs of video models in the forms of their trainers: baked into both layouts, and converted for diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.api.inspect import inspect
from merging.errors import InputError
from support.diffusion_models import State
from support.image_denoisers import as_published
from support.pairs import third_of_pairs
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
@pytest.mark.parametrize(("family", "form"), third_of_pairs(VIDEO_FAMILIES, FORMS))
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


# ---- full models


def _tune(path: Path, base: Path, seed: int) -> Path:
    """Write a fine-tune of a base, in the base's layout, without a folder."""
    random = torch.Generator().manual_seed(seed)
    state = {name: value + torch.randn(value.shape, generator=random) for name, value in _read(base).items()}
    save_file(state, path)
    return path


def _mark(family: str) -> object:
    return family if family in QUICK else pytest.param(family, marks=pytest.mark.exhaustive)


BOTH_LAYOUTS = [_mark(family) for family, stated in VIDEO_FAMILIES.items() if stated.unnamed == "$^"]
"""All but Mochi, with one tensor whose published name is not known."""


@pytest.mark.parametrize("family", BOTH_LAYOUTS)
def test_full_models_in_both_layouts(tmp_path: Path, family: str) -> None:
    """Fine-tunes in two layouts over a base in either one: the result has the base's layout."""
    diffusers, published = bases(family, tmp_path)
    one, two = _tune(tmp_path / "1.safetensors", diffusers, 1), _tune(tmp_path / "2.safetensors", published, 2)
    before, first, second = _read(published), as_published(_read(one)), _read(two)
    wanted = {
        name: value + 0.5 * (first[name] - value) + 0.25 * (second[name] - value) for name, value in before.items()
    }
    for base in (diffusers, published):
        out = tmp_path / f"out-{base.name}"
        settings = {"method": "task_arithmetic", "weights": (0.5, 0.25), "kind": "model"}
        done = merging.merge([one, two], base=base, output=out, threads=1, **settings)
        got = _read(out)
        _check_close(as_published(got) if base is diffusers else got, wanted)
        said = any("its tensors are matched with the names of" in each for each in done.notices)
        assert said == (family != "cogvideox")


def test_a_tensor_without_a_name_in_the_other_layout(tmp_path: Path) -> None:
    diffusers, published = bases("mochi", tmp_path)
    with pytest.raises(InputError, match=r"blocks\.1\.norm1_context\.linear_1\.\w+.*on_mismatch="):
        merging.merge([published], base=diffusers, method="linear", kind="model", output=tmp_path / "out")


def test_a_lora_out_of_a_fine_tune_in_the_other_layout(tmp_path: Path) -> None:
    diffusers, published = bases("wan", tmp_path)
    tuned = _read(published)
    name = "blocks.1.self_attn.v.weight"
    change = torch.outer(torch.arange(24.0), torch.ones(24)) / 24
    save_file(tuned | {name: tuned[name] + change}, tmp_path / "tuned.safetensors")
    merging.extract(tmp_path / "tuned.safetensors", base=diffusers, output=tmp_path / "out", rank=1)
    (lora,) = (tmp_path / "out").glob("*.safetensors")
    got = load_file(lora)
    down, up = (next(value for key, value in got.items() if f"lora_{part}" in key) for part in "AB")
    torch.testing.assert_close(up @ down, change, atol=1e-4, rtol=1e-4)
    assert all("blocks.1.attn1.to_v" in key for key in got)


# ---- Wan 2.2 has two denoisers


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A pipeline of Wan 2.2, with the same weights in both denoisers."""
    diffusers, _ = bases("wan", tmp_path / "pair")
    shutil.copytree(diffusers, diffusers.with_name("transformer_2"))
    classes = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    (tmp_path / "pair" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **classes}))
    return tmp_path / "pair"


@pytest.mark.parametrize("components", [(), ("transformer_2",)])
def test_a_lora_of_one_of_two_denoisers(tmp_path: Path, pair: Path, components: tuple[str, ...]) -> None:
    """Names that do not say which mean the first, with a remark, or the one that is asked for."""
    write_form(tmp_path / "lora.safetensors", "wan", "lightx2v")
    wanted = _bake(tmp_path / "lora.safetensors", pair / "transformer")
    settings = {"components": components} if components else {}
    plan = merging.preview([tmp_path / "lora.safetensors"], method="linear", base=pair, kind="model", **settings)
    said = any(
        'in transformer; for the other of the two use components="transformer_2"' in each for each in plan.matched
    )
    assert said == (not components)
    merging.merge(
        [tmp_path / "lora.safetensors"], method="linear", base=pair, kind="model", output=tmp_path / "out", **settings
    )
    parts = {name: _read(tmp_path / "out" / name) for name in ("transformer", "transformer_2")}
    _check_close(parts.pop(components[0] if components else "transformer"), wanted)
    (other,) = parts.values()
    _check_close(other, _read(pair / "transformer"))


def test_the_family_of_a_pair(tmp_path: Path, pair: Path) -> None:
    assert inspect(pair)["family"] == "Wan 2.2"
    for form, prefix, family in (
        ("diffusers", "transformer_2.", "Wan 2.2"),
        ("diffusers", "transformer.", "Wan 2.1 or 2.2"),
        ("musubi-tuner", "lora_unet_", "Wan 2.1 or 2.2"),
    ):
        write_form(tmp_path / "a.safetensors", "wan", form)
        state = load_file(tmp_path / "a.safetensors")
        save_file(
            {name.replace("transformer.", prefix): value for name, value in state.items()}, tmp_path / "a.safetensors"
        )
        assert inspect(tmp_path / "a.safetensors")["family"] == family


def test_a_lora_of_another_family(tmp_path: Path) -> None:
    for form in ("diffusion-pipe", "musubi-tuner"):
        write_form(tmp_path / "lora.safetensors", "ltx", form)
        diffusers, _ = bases("wan", tmp_path / form)
        with pytest.raises(InputError, match=r"looks like a LoRA of LTX-Video, and the base like Wan 2\.1 or 2\.2$"):
            merging.merge([tmp_path / "lora.safetensors"], base=diffusers, method="linear", output=tmp_path / "out")
