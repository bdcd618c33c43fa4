"""LoRA files with dotted names change what diffusers changes with them; Flux fused or apart, in bases of both kinds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from merging.sources.diffusion_names import known_names
from support.diffusion_models import FLUX, State, build, check_closest, factors, fused, on_disk, quietly, trained


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline of each kind, which no test changes."""
    folder = tmp_path_factory.mktemp("models")
    with quietly():
        for name in ("sd", "sdxl", "flux"):
            build(name).save_pretrained(folder / name)
    return folder


def merged(lora: Path, base: Path, out: Path) -> State:
    """The base with one LoRA baked in by us."""
    merging.merge([lora], method="task_arithmetic", base=base, kind="model", output=out)
    return on_disk(out) if out.is_dir() else load_file(out)


def modules_of(lora: Path) -> int:
    """The modules that a file changes."""
    return len({re.sub(r"[._]lora[._].*", "", name) for name in load_file(lora)})


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 3},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "patterns": {"rank_pattern": {"to_q": 3, "q_proj": 1}, "alpha_pattern": {"to_k": 5, "conv1": 1}},
    "dora": {"use_dora": True, "parts": ("unet",)},
    "without its config": {"stated": False},
    "PEFT's names": {"converted": ()},
    "attention alone": {"converted": ("unet",), "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "q_proj"]},
    "ranks without a config": {"stated": False, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 3}},
}
EVERYDAY = ("dora", "patterns", "PEFT's names", "ranks without a config")


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("sdxl", "alpha"),
        ("flux", "plain"),
        *(pytest.param("sd", each, marks=() if each in EVERYDAY else pytest.mark.exhaustive) for each in CONFIGS),
        pytest.param("flux", "alpha", marks=pytest.mark.exhaustive),
    ],
)
def test_as_diffusers_saves_it(models: Path, tmp_path: Path, model: str, config: str) -> None:
    lora = trained(model, tmp_path / "lora", **CONFIGS[config])
    wanted, before = fused(build(model), lora), on_disk(models / model)
    check_closest(merged(lora, models / model, tmp_path / "out"), wanted, before, modules_of(lora))
    check_closest(merged(lora.parent, models / model, tmp_path / "again"), wanted, before, modules_of(lora))


def old_names(state: State) -> State:
    """As diffusers called them before it used PEFT."""
    names = (
        (r"^(unet.*)\.to_out\.0\.lora_([AB])", r"\1.processor.to_out_lora.lora_\2"),
        (r"^(unet.*)\.to_([qkv])\.lora_([AB])", r"\1.processor.to_\2_lora.lora_\3"),
        (r"^(text.*)\.(q|k|v|out)_proj\.lora_([AB])", r"\1.to_\2_lora.lora_\3"),
        (r"_lora\.lora_A", "_lora.down"),
        (r"_lora\.lora_B", "_lora.up"),
        (r"\.lora_A", ".lora.down"),
        (r"\.lora_B", ".lora.up"),
    )
    renamed = {}
    for name, value in state.items():
        for pattern, meant in names:
            name = re.sub(pattern, meant, name)
        renamed[name] = value
    return renamed


def test_as_old_versions_saved_it(models: Path, tmp_path: Path) -> None:
    new = trained("sd", tmp_path / "new", stated=False, converted=())
    lora = tmp_path / "old.safetensors"
    save_file(old_names(load_file(new)), lora)
    assert not any("lora_A" in name or "lora_B" in name for name in load_file(lora))
    wanted, before = fused(build("sd"), lora), on_disk(models / "sd")
    check_closest(merged(lora, models / "sd", tmp_path / "out"), wanted, before, modules_of(new))


# ---- Flux, whose projections are fused as published, and in the LoRA files of all programs but diffusers


def kohya_flux(path: Path, alpha: float | None = 1) -> Path:
    text = {f"lora_te1_text_model_encoder_layers_1_self_attn_{part}_proj": (8, 8) for part in ("q", "k", "v", "out")}
    flat = {"lora_unet_" + name.replace(".", "_"): shape for name, shape in FLUX.items()}
    return factors(path, {name: (shape, alpha) for name, shape in {**flat, **text}.items()})


def published(state: State) -> State:
    """A transformer of diffusers as it was published."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return {
        known.name: torch.cat([state[part.name][part.start : part.start + part.length] for part in known.rows])
        for known in known_names(shapes)
        if known.component == "transformer" and "published" in known.styles
    }


def applied(lora: State, state: State, scale: float = 0.5) -> State:
    """Published weights with the factors of flat names added, by the definition."""
    wanted = dict(state)
    for name in state:
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{flat}.lora_up.weight" in lora:
            wanted[name] = state[name] + scale * lora[f"{flat}.lora_up.weight"] @ lora[f"{flat}.lora_down.weight"]
    return wanted


def test_fused_lora_on_a_base_that_is_not(models: Path, tmp_path: Path) -> None:
    """sd-scripts' names on a pipeline of diffusers: queries, keys, values and more get their rows."""
    lora = kohya_flux(tmp_path / "a.safetensors")
    before = on_disk(models / "flux")
    got = merged(lora, models / "flux", tmp_path / "out")
    wanted = applied(load_file(lora), published(before))
    check_close(published(got), wanted)
    assert sum(not torch.equal(got[name], before[name]) for name in got) == len(FLUX) + 4 + 2 * 2 + 3


def check_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    off = {name: float((got[name] - wanted[name]).abs().max()) for name in wanted}
    wrong = {name: error for name, error in off.items() if not error <= 2e-6}
    assert not wrong


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_separate_projections_on_a_fused_base(models: Path, tmp_path: Path, prefix: str) -> None:
    """diffusers' names on a single file as published: what fuses the result of diffusers is what comes out."""
    lora = trained("flux", tmp_path / "lora", lora_alpha=3)
    own = {name: value for name, value in load_file(lora).items() if name.startswith("transformer.")}
    save_file(own, tmp_path / "own.safetensors")
    before = published(on_disk(models / "flux"))
    save_file({prefix + name: value for name, value in before.items()}, tmp_path / "base.safetensors")
    got = merged(tmp_path / "own.safetensors", tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    wanted = published(fused(build("flux"), tmp_path / "own.safetensors"))
    check_closest({name.removeprefix(prefix): value for name, value in got.items()}, wanted, before, 5)


COMFY = {
    "": lambda name, part: f"diffusion_model.{name}.{part}",
    "lora_A": lambda name, part: (
        f"diffusion_model.{name}.{part.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"
    ),
    "default": lambda name, part: (
        f"transformer.{name}.{part.replace('lora_down', 'lora_A.default').replace('lora_up', 'lora_B.default')}"
    ),
}


@pytest.mark.parametrize("spelling", COMFY)
def test_comfyui_and_its_kin(models: Path, tmp_path: Path, spelling: str) -> None:
    """The same factors under dotted names of the publisher's change the same."""
    kohya = load_file(kohya_flux(tmp_path / "kohya.safetensors"))
    flat = {"lora_unet_" + name.replace(".", "_"): name for name in FLUX}
    state = {}
    for name, value in kohya.items():
        module, _, part = name.partition(".")
        if module in flat:
            state[COMFY[spelling](flat[module], part)] = value
        else:
            layer = module.removeprefix("lora_te1_text_model_encoder_layers_1_self_attn_")
            state[f"text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.{layer}.{part}"] = value
    save_file(state, tmp_path / "comfy.safetensors")
    got = merged(tmp_path / "comfy.safetensors", models / "flux", tmp_path / "out")
    check_close(got, merged(tmp_path / "kohya.safetensors", models / "flux", tmp_path / "other"))


def test_xlabs(models: Path, tmp_path: Path) -> None:
    shapes = {
        "double_blocks.0.processor.qkv_lora1": (48, 16),
        "double_blocks.0.processor.qkv_lora2": (48, 16),
        "double_blocks.0.processor.proj_lora1": (16, 16),
        "double_blocks.0.processor.proj_lora2": (16, 16),
        "single_blocks.0.processor.qkv_lora": (48, 16),
        "single_blocks.0.processor.proj_lora": (16, 80),
    }
    state: State = {}
    for name, (outputs, inputs) in shapes.items():
        state |= {f"{name}.down.weight": torch.randn(2, inputs), f"{name}.up.weight": torch.randn(outputs, 2)}
    lora = tmp_path / "a.safetensors"
    save_file(state, lora)
    wanted, before = fused(build("flux"), lora), on_disk(models / "flux")
    check_closest(merged(lora, models / "flux", tmp_path / "out"), wanted, before, 3 * 3 + 3)


def test_lokr_of_fused_projections(models: Path, tmp_path: Path) -> None:
    """A full change of a fused tensor is cut into the rows of its parts."""
    w1, w2 = torch.randn(4, 2), torch.randn(12, 8)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file(
        {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors"
    )
    before = published(on_disk(models / "flux"))
    got = published(merged(tmp_path / "a.safetensors", models / "flux", tmp_path / "out"))
    qkv = "double_blocks.0.img_attn.qkv.weight"
    check_close(got, before | {qkv: before[qkv] + torch.kron(w1, w2)})


def test_both_kinds_together(models: Path, tmp_path: Path) -> None:
    """A fused LoRA and one that is not, merged as adapters on a base, are the sum of the two."""
    one, two = kohya_flux(tmp_path / "a.safetensors"), trained("flux", tmp_path / "lora")
    before = on_disk(models / "flux")
    merging.merge([one, two], method="task_arithmetic", base=models / "flux", kind="model", output=tmp_path / "both")
    first, second = (merged(lora, models / "flux", tmp_path / str(n)) for n, lora in enumerate((one, two)))
    check_close(
        on_disk(tmp_path / "both"), {name: first[name] + second[name] - value for name, value in before.items()}
    )


DOWN, UP = torch.ones(2, 16), torch.ones(16, 2)
Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP}
STATED = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2})}
REFUSED: dict[str, tuple[State, dict[str, str], str]] = {
    "alphas twice": ({**PAIR, f"{Q}.alpha": torch.tensor(1.0)}, STATED, "states its alphas twice"),
    "no config for a part": ({**PAIR, f"text_encoder{Q[4:]}.lora_A.weight": DOWN + 1}, STATED, "no config for them"),
    "no JSON": (PAIR, {"lora_adapter_metadata": "{"}, "is not valid JSON"),
    "another rank": (PAIR, {"lora_adapter_metadata": json.dumps({"unet.r": 4})}, "rank"),
    "half a pair": ({f"{Q}.lora_A.weight": DOWN}, {}, "has no lora_up"),
    "stray": ({**PAIR, "unet.x.weight": UP.clone()}, {}, "unet.x.weight is not a tensor that a LoRA"),
    "embedding": ({"emb_params": UP}, {}, "textual-inversion embedding"),
    "embeddings": ({"clip_l": UP, "clip_g": UP.clone()}, {}, "textual-inversion embedding"),
    "beside": ({**PAIR, "bundle_emb.x.string_to_param.*": UP.clone()}, {}, "textual-inversion embedding"),
    "control": (
        {"transformer.double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(2), **PAIR}, {}, "control LoRA"
    ),
    "twice": (
        {**PAIR, f"{Q.replace('.to_q', '.processor.to_q_lora')}.down.weight": DOWN.clone()}, {}, "is there twice"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    state, metadata, reason = REFUSED[case]
    save_file(state, tmp_path / "a.safetensors", metadata)
    with pytest.raises(FormatError, match=reason):
        open_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "name", ["transformer.h.0.attn.c_attn", "transformer.blocks.0.attn.Wqkv", "bert.layer.0.query"]
)
def test_language_models_keep_to_peft(tmp_path: Path, name: str) -> None:
    """Without PEFT's prefix the names of some language models begin as those of a component."""
    save_file({f"{name}.lora_A.weight": DOWN, f"{name}.lora_B.weight": UP}, tmp_path / "a.safetensors")
    assert open_model(tmp_path / "a.safetensors").dialect == "PEFT LORA"


def test_names_of_no_base(models: Path, tmp_path: Path) -> None:
    state = {name.replace("down_blocks.1", "down_blocks.7"): value for name, value in PAIR.items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"down_blocks\.7.* is not a tensor of the base"):
        merged(tmp_path / "a.safetensors", models / "sd", tmp_path / "out")


def test_factors_in_eight_bits_are_refused_with_a_way_out(tmp_path: Path) -> None:
    factors = {"lora_A": torch.randn(2, 8), "lora_B": torch.randn(8, 2)}
    state = {f"diffusion_model.blocks.0.self_attn.q.{name}.weight": value for name, value in factors.items()}
    eight = {name: value.to(torch.float8_e4m3fn) for name, value in state.items()}
    save_file(eight, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"also with dequantize=True: convert them first \(load_file, .to"):
        open_model(tmp_path / "a.safetensors", dequantize=True)
    save_file(
        {name: v.to(torch.bfloat16) for name, v in load_file(tmp_path / "a.safetensors").items()},
        tmp_path / "b.safetensors",
    )
    merging.merge([tmp_path / "b.safetensors"], method="passthrough", output=tmp_path / "out.safetensors")


def test_parts_of_two_models_are_not_said_to_be_one_module(tmp_path: Path) -> None:
    """Wan's second model is called transformer_2 beside bare names of the first."""
    factors = {"lora_A": torch.randn(2, 8), "lora_B": torch.randn(8, 2)}
    paths = []
    for number, prefix in enumerate(("", "transformer_2.")):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({f"{prefix}blocks.0.self_attn.q.{name}.weight": v for name, v in factors.items()}, paths[-1])
    out = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match=r"no tensor in common.*allow_different_bases=True to put them side by side"):
        merging.merge(paths, method="linear", output=out)
    merging.merge(paths, method="linear", allow_different_bases=True, output=out)
    assert load_file(out).keys() == load_file(paths[0]).keys() | load_file(paths[1]).keys()
