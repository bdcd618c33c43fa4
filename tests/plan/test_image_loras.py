"""LoRAs of the image families in the layouts of their trainers: baked into both layouts of the model, and converted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from support.diffusion_models import State
from support.image_denoisers import IMAGE_FAMILIES, as_published, build_image_denoiser, fused_by_diffusers
from support.pairs import third_of_pairs

FAMILIES = [family for family in IMAGE_FAMILIES if family not in ("krea2", "ideogram4")]
"""Families with two names for every module."""


@dataclass(frozen=True)
class Layout:
    """The names in a trainer's files: of published modules or diffusers', after a prefix, perhaps flat."""

    style: str
    prefix: str
    flat: bool = False
    leaves: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    alpha: float | None = None

    def stem(self, module: str) -> str:
        return self.prefix + (module.replace(".", "_") if self.flat else module)


T5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
_DOWN_UP = ("lora_down.weight", "lora_up.weight")
_DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
LAYOUTS = {
    "ai-toolkit": Layout("published", "diffusion_model."),
    "ai-toolkit, diffusers' names": Layout("diffusers", "diffusion_model."),
    "ComfyUI with alphas": Layout("published", "diffusion_model.", leaves=_DOWN_UP, alpha=3),
    "diffusers": Layout("diffusers", "transformer."),
    "sd-scripts": Layout("published", "lora_unet_", flat=True, leaves=_DOWN_UP, alpha=3),
    "musubi-tuner": Layout("diffusers", "lora_unet_", flat=True, leaves=_DOWN_UP, alpha=3),
    "OneTrainer": Layout("diffusers", "lora_transformer_", flat=True, leaves=_DOWN_UP, alpha=3),
    "OneTrainer, dotted": Layout("diffusers", "transformer.", leaves=_DOWN_UP, alpha=3),
    "LyCORIS": Layout("diffusers", "lycoris_", flat=True, leaves=_DOWN_UP, alpha=3),
    "PEFT": Layout("diffusers", "base_model.model."),
    "PEFT of the published model": Layout("published", "base_model.model."),
    "DiffSynth": Layout("diffusers", "", leaves=_DEFAULT),
    "DiffSynth, published names": Layout("published", "", leaves=_DEFAULT),
    "bare": Layout("diffusers", "", leaves=_DOWN_UP, alpha=3),
    "bare, published names": Layout("published", "", leaves=_DOWN_UP, alpha=3),
}


@dataclass(frozen=True)
class Case:
    """A LoRA of all linear layers of a tiny denoiser, and the weights with it, in both layouts of the model."""

    family: str
    file: Path
    wanted: dict[str, State]
    changes: dict[str, State]

    def base(self, style: str) -> Path:
        """The denoiser in one layout."""
        path = self.file.with_name("base" if style == "diffusers" else "published.safetensors")
        model = build_image_denoiser(self.family)
        if style == "diffusers":
            model.save_pretrained(path)  # type: ignore[operator]
        else:
            state = {f"model.diffusion_model.{n}": v.contiguous() for n, v in as_published(model.state_dict()).items()}
            save_file(state, path)
        return path


def make(family: str, layout: Layout, folder: Path) -> Case:
    """Write such a LoRA in a layout; the weights with it follow from the definition."""
    before = build_image_denoiser(family).state_dict()
    styles: dict[str, Callable[[State], State]] = {
        "diffusers": lambda state: as_published(state, "diffusers"),
        "published": as_published,
    }
    own, random, lora = styles[layout.style](before), torch.Generator().manual_seed(1), {}
    after = dict(own)
    for name, value in own.items():
        if name.endswith(".weight") and value.dim() == 2 and not name.endswith(".gate.weight"):  # of HiDream's experts
            stem, (rows, columns) = layout.stem(name.removesuffix(".weight")), value.shape
            down, up = (0.3 * torch.randn(shape, generator=random) for shape in ((2, columns), (rows, 2)))
            lora |= {f"{stem}.{layout.leaves[0]}": down, f"{stem}.{layout.leaves[1]}": up}
            if layout.alpha is not None:
                lora[f"{stem}.alpha"] = torch.tensor(layout.alpha)
            after[name] = value + (layout.alpha or 2) / 2 * up @ down
    save_file(lora, folder / "lora.safetensors")
    wanted = {style: make_state(after) for style, make_state in styles.items()}
    changes = {
        style: {
            name.removesuffix(".weight"): wanted[style][name] - value
            for name, value in make_state(before).items()
            if not torch.equal(wanted[style][name], value)
        }
        for style, make_state in styles.items()
    }
    return Case(family, folder / "lora.safetensors", wanted, changes)


def check_close(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    assert not {name for name in wanted if not (got[name] - wanted[name]).abs().max() <= 5e-6}


def changes_in(file: Path) -> State:
    """What a file changes, by the definition: alpha / rank times the product of its factors."""
    state, found = load_file(file), {}
    for name, down in state.items():
        stem, _, leaf = name.partition(".lora_")
        if leaf in ("A.weight", "down.weight"):
            up = state[f"{stem}.lora_{'B' if leaf[0] == 'A' else 'up'}.weight"]
            found[stem] = float(state.get(f"{stem}.alpha", torch.tensor(len(down)))) / len(down) * up @ down
    return found


def check_baked(case: Case, style: str, out: Path) -> None:
    """Whatever names the LoRA has, what is baked into a layout is that layout of the same model."""
    if style == "diffusers":
        merging.bake([case.file], base=case.base(style), output=out)
        got = load_file(out / "diffusion_pytorch_model.safetensors")
    else:
        out = out.with_suffix(".safetensors")
        merging.bake([case.file], base=case.base(style), output=out)
        got = {name.removeprefix("model.diffusion_model."): value for name, value in load_file(out).items()}
    check_close(got, case.wanted[style])


def check_converted(case: Case, format: str, base: Path | None, out: Path) -> None:
    merging.merge([case.file], method="linear", format=format, base=base, output=out, overwrite=True)  # type: ignore[arg-type]
    prefix, style = {
        "kohya": ("lora_unet_", "published"),
        "diffusers": ("transformer.", "diffusers"),
        "peft": ("base_model.model.", "diffusers"),
    }[format]
    wanted = case.changes[style]
    flat = {name.replace(".", "_"): value for name, value in wanted.items()}
    check_close(changes_in(out), {prefix + n: value for n, value in (flat if format == "kohya" else wanted).items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(tmp_path: Path, family: str) -> None:
    """sd-scripts' names: baked into both layouts, converted without the model, and loaded by diffusers."""
    case = make(family, LAYOUTS["sd-scripts"], tmp_path)
    for style in case.wanted:
        check_baked(case, style, tmp_path / f"baked-{style}")
    out = tmp_path / "as-diffusers.safetensors"
    check_converted(case, "diffusers", None, out)
    check_close(fused_by_diffusers(family, out), case.wanted["diffusers"])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "layout"), third_of_pairs(FAMILIES, LAYOUTS))
def test_every_layout(tmp_path: Path, family: str, layout: str) -> None:
    case = make(family, LAYOUTS[layout], tmp_path)
    bases = {style: case.base(style) for style in case.wanted}
    for style in bases:
        check_baked(case, style, tmp_path / f"baked-{style}")
    kept = layout == "PEFT of the published model"  # its names are right for the model that PEFT wrapped
    by_width = family == "sd3" and LAYOUTS[layout].style == "diffusers"  # what is left of such names
    for base in (None, *bases.values()):
        for format in ("kohya", "diffusers", "peft"):
            if not (kept and format == "peft" and base != bases["diffusers"]) and not (by_width and base is None):
                check_converted(case, format, base, tmp_path / "converted.safetensors")
    for base in (None, *bases.values()):  # without a format the names stay
        out = tmp_path / "same.safetensors"
        merging.merge([case.file], method="linear", base=base, output=out, overwrite=True)
        names = {name.replace(".default.", ".") for name in load_file(case.file)}
        if not (kept and base == bases["diffusers"]):
            assert {name.replace(".default.", ".") for name in load_file(out)} == names


@pytest.mark.parametrize("clips", [1, 2])
def test_t5_is_the_encoder_behind_the_clips_of_its_file(tmp_path: Path, clips: int) -> None:
    """Kohya's files call it the third in any case."""
    stems = [f"lora_te{number}_text_model_encoder_layers_0_mlp_fc1" for number in range(1, clips + 1)]
    factors = {f"{stem}.{leaf}": torch.ones(4, 4) for stem in [*stems, T5] for leaf in _DOWN_UP}
    save_file(factors, tmp_path / "a.safetensors")
    merging.merge([tmp_path / "a.safetensors"], method="linear", format="diffusers", output=tmp_path / "b.safetensors")
    found = {name.partition(".")[0] for name in load_file(tmp_path / "b.safetensors") if "SelfAttention" in name}
    assert found == {f"text_encoder_{clips + 1}"}
