"""Every layout of LoRA files is read as the program reads that it is for, or refused by name: never as a full model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.errors import FormatError
from merging.hub.open_model import open_model
from merging.sources import Adapter, Checkpoint
from support.denoisers import FAMILIES, Shape, applied_by_diffusers, build_denoiser, write_lora
from support.diffusion_models import State

MODULES: dict[str, dict[str, Shape]] = {
    "z-image": {
        "layers.0.attention.to_q": (16, 16),
        "layers.1.attention.to_out.0": (16, 16),
        "layers.1.feed_forward.w1": (42, 16),
        "layers.0.adaLN_modulation.0": (64, 16),
    },
    "ernie-image": {"layers.0.self_attention.to_k": (16, 16), "layers.1.self_attention.to_out.0": (16, 16)},
    "qwen-image": {
        "transformer_blocks.0.attn.to_q": (16, 16),
        "transformer_blocks.1.attn.add_k_proj": (16, 16),
        "transformer_blocks.1.img_mlp.net.2": (16, 64),
    },
}


def named(prefix: str, down: str, up: str) -> Callable[[str, str], str]:
    leaves = {"down": down, "up": up, "alpha": "alpha"}
    return lambda module, part: f"{prefix}{module}.{leaves[part]}"


def flat(prefix: str) -> Callable[[str, str], str]:
    name = named("", "lora_down.weight", "lora_up.weight")
    return lambda module, part: prefix + name(module.replace(".", "_"), part)


DOWN_UP = ("lora_down.weight", "lora_up.weight")
A_B = ("lora_A.weight", "lora_B.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
LAYOUTS: dict[str, tuple[Callable[[str, str], str], float | None]] = {
    "diffusers": (named("transformer.", *A_B), None),
    "ComfyUI": (named("diffusion_model.", *A_B), None),
    "ComfyUI with alphas": (named("diffusion_model.", *DOWN_UP), 3),
    "bare down and up": (named("", *DOWN_UP), 3),
    "bare, of PEFT's default": (named("", *DEFAULT), None),
    "OneTrainer": (named("transformer.", *DOWN_UP), 3),
    "musubi-tuner": (flat("lora_unet_"), 3),
}
TAKEN = [("z-image", layout) for layout in LAYOUTS] + [("ernie-image", "diffusers"), ("ernie-image", "OneTrainer")]
TAKEN += [("qwen-image", layout) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        build_denoiser(family).save_pretrained(folder / family)  # type: ignore[operator]
    return folder


def merged(lora: Path, base: Path, out: Path) -> Mapping[str, torch.Tensor]:
    merging.merge([lora], method="task_arithmetic", base=base, kind="model", output=out)
    return load_file(out / "diffusion_pytorch_model.safetensors")


def by_definition(family: str, layout: str, lora: Path) -> State:
    """The denoiser's weights with alpha / rank times the product of the factors added."""
    name, alpha = LAYOUTS[layout]
    wanted, state = dict(build_denoiser(family).state_dict()), load_file(lora)
    for module in MODULES[family]:
        up, down = state[name(module, "up")], state[name(module, "down")]
        wanted[f"{module}.weight"] = wanted[f"{module}.weight"] + (alpha or len(down)) / len(down) * up @ down
    return wanted


def check_equal(family: str, lora: Path, wanted: State, bases: Path, out: Path) -> None:
    """What we bake into the family's base is what is wanted, and it is something."""
    before = build_denoiser(family).state_dict()
    got = merged(lora, bases / family, out)
    check_close(got, wanted)
    changed = {name.removesuffix(".weight") for name in wanted if not torch.equal(wanted[name], before[name])}
    assert changed == MODULES[family].keys()


def check_close(got: Mapping[str, torch.Tensor], wanted: State) -> None:
    assert got.keys() == wanted.keys()
    assert not {name for name in wanted if not (got[name] - wanted[name]).abs().max() <= 2e-6}


@pytest.mark.parametrize(("family", "layout"), TAKEN)
def test_layouts(bases: Path, tmp_path: Path, family: str, layout: str) -> None:
    name, alpha = LAYOUTS[layout]
    lora = write_lora(tmp_path / "a.safetensors", MODULES[family], name, alpha=alpha)
    wanted = by_definition(family, layout, lora)
    check_equal(family, lora, wanted, bases, tmp_path / "out")
    if layout != "OneTrainer":  # diffusers knows no alphas behind its own names
        check_close(applied_by_diffusers(family, lora), wanted)


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 2, "lora_alpha": 8},
    "rslora": {"r": 2, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2, "to_k": 2, "to_out.0": 2, "w1": 2,
                 "adaLN_modulation.0": 2, "add_k_proj": 2, "net.2": 2}, "alpha_pattern": {"to_q": 5, "to_k": 5}},
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", MODULES)
def test_config_in_the_header(bases: Path, tmp_path: Path, family: str, config: str) -> None:
    settings = {"target_modules": sorted(MODULES[family]), **CONFIGS[config]}
    lora = write_lora(tmp_path / "a.safetensors", MODULES[family], LAYOUTS["diffusers"][0], config=settings)
    check_equal(family, lora, applied_by_diffusers(family, lora), bases, tmp_path / "out")


PAIR = {"down": torch.ones(2, 16), "up": torch.ones(16, 2)}


def opened(path: Path, name: Callable[[str, str], str], module: str, header: dict[str, str], **more: float) -> Adapter:
    """The adapter of a file with one module's factors, and numbers beside them."""
    state = {name(module, part): value for part, value in PAIR.items()}
    state |= {name(module, part): torch.tensor(value) for part, value in more.items()}
    save_file(state, path, header or None)
    model = open_model(path)
    assert isinstance(model, Adapter)
    return model


def scale(adapter: Adapter) -> float:
    (change,) = adapter.changes.values()
    return change.scale  # type: ignore[attr-defined,no-any-return]


STATED = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})}
READERS = {
    "diffusers": (named("transformer.", *A_B), "layers.0.attention.to_q", "diffusers"),
    "one whose names tell nothing": (named("transformer.", *A_B), "layers.0.mlp.gate", "diffusers"),
    "wrapped": (named("transformer.base_model.model.", *A_B), "layers.0.attention.to_q", "diffusers"),
    "ComfyUI": (named("diffusion_model.", *A_B), "layers.0.attention.to_q", "ComfyUI"),
    "bare": (named("", *DEFAULT), "layers.0.attention.to_q", "diffusers"),
    "Kohya": (flat("lora_unet_"), "layers.0.attention.to_q", "Kohya"),
    "PEFT": (named("base_model.model.", *A_B), "layers.0.attention.to_q", "PEFT LORA"),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_takes_the_config(tmp_path: Path, reader: str) -> None:
    """diffusers' entry counts in whatever dialect the names are."""
    name, module, dialect = READERS[reader]
    adapter = opened(tmp_path / "a.safetensors", name, module, STATED)
    assert adapter.dialect == dialect
    assert scale(adapter) == 4
    assert not adapter.notices


@pytest.mark.parametrize("reader", ["ComfyUI", "Kohya", "diffusers"])
def test_alphas_beside_the_factors_and_in_the_header(tmp_path: Path, reader: str) -> None:
    name, module, _ = READERS[reader]
    assert scale(opened(tmp_path / "a.safetensors", name, module, STATED, alpha=8)) == 4
    with pytest.raises(FormatError, match="states its alphas twice"):
        opened(tmp_path / "b.safetensors", name, module, STATED, alpha=2)


def test_flat_names_and_patterns(tmp_path: Path) -> None:
    fields = {"r": 2, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"attention.to_q": 3}}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in fields.items()})}
    name = flat("lora_unet_")
    assert scale(opened(tmp_path / "a.safetensors", name, "layers.0.attention.to_q", header)) == pytest.approx(
        3 / sqrt(2)
    )
    assert scale(opened(tmp_path / "b.safetensors", name, "layers.0.attention.to_k", header)) == pytest.approx(
        8 / sqrt(2)
    )


@pytest.mark.parametrize("reader", ["ComfyUI", "Kohya", "diffusers", "PEFT"])
def test_an_alpha_that_only_the_header_states(tmp_path: Path, reader: str) -> None:
    """Programs go by tensors, and musubi-tuner's converter leaves the header when it has folded the scale in."""
    name, module, _ = READERS[reader]
    header = {"ss_network_alpha": "1.0", "ss_network_dim": "2"}
    adapter = opened(tmp_path / "a.safetensors", name, module, header)
    assert scale(adapter) == 1
    assert "its header states alpha 1.0 at rank 2" in adapter.notices[0]
    if reader != "PEFT":
        assert not opened(tmp_path / "b.safetensors", name, module, header, alpha=1).notices
        assert not opened(tmp_path / "c.safetensors", name, module, {**header, "ss_network_alpha": "2"}).notices


def test_language_models_are_not_mistaken(tmp_path: Path) -> None:
    names = ("transformer.layers.0.attn.qkv_proj", "transformer.h.0.attn.c_attn", "layers.0.q_proj")
    for number, module in enumerate((*names, "transformer.encoder.layers.0.self_attention.query_key_value")):
        adapter = opened(tmp_path / f"{number}.safetensors", named("", *A_B), module, {})
        assert adapter.dialect == "PEFT LORA", module


def test_hunyuan_video_of_tencent(tmp_path: Path) -> None:
    name = flat("Hunyuan_video_I2V_lora_")
    adapter = opened(tmp_path / "a.safetensors", name, "double_blocks.0.img_attn_qkv", {}, alpha=1)
    assert adapter.dialect == "Kohya"
    assert list(adapter.changes) == ["Hunyuan_video_I2V_lora_double_blocks_0_img_attn_qkv.weight"]
    assert scale(adapter) == 0.5


def test_flat_names_behind_any_prefix(tmp_path: Path) -> None:
    adapter = opened(tmp_path / "a.safetensors", flat("another_trainer_"), "blocks.0.attn", {}, alpha=1)
    assert adapter.dialect == "Kohya"
    assert scale(adapter) == 0.5


def test_lightx2v(tmp_path: Path) -> None:
    """Changes in full beside factors; that of a modulation is of a parameter without a module of its own."""
    block = "diffusion_model.blocks.0"
    state = {
        f"{block}.self_attn.q.lora_down.weight": PAIR["down"],
        f"{block}.self_attn.q.lora_up.weight": PAIR["up"],
        f"{block}.self_attn.q.diff_b": torch.full((16,), 2.0),
        f"{block}.norm3.diff": torch.full((16,), 3.0),
        f"{block}.diff_m": torch.full((1, 6, 16), 4.0),
        "diffusion_model.blocks.1.modulation.diff": torch.full((1, 6, 16), 5.0),
        "diffusion_model.head.diff_m": torch.full((1, 2, 16), 6.0),
        "diffusion_model.patch_embedding.diff": torch.full((16, 4, 1, 2, 2), 7.0),
    }
    save_file(state, tmp_path / "a.safetensors")
    adapter = open_model(tmp_path / "a.safetensors")
    assert isinstance(adapter, Adapter)
    wanted = {
        f"{block}.self_attn.q.weight": 2.0,
        f"{block}.self_attn.q.bias": 2.0,
        f"{block}.norm3.weight": 3.0,
        f"{block}.modulation": 4.0,
        "diffusion_model.blocks.1.modulation": 5.0,
        "diffusion_model.head.modulation": 6.0,
        "diffusion_model.patch_embedding.weight": 7.0,
    }
    assert adapter.changes.keys() == wanted.keys()
    for target, value in wanted.items():
        change = adapter.changes[target]
        delta = change.read(change.shape, lambda: torch.zeros(()), torch.float32).dense()
        torch.testing.assert_close(delta, torch.full(change.shape, value))


# ---- what is never a full model

FACTORS: dict[str, dict[str, Shape]] = {
    "one factor": {"layers.0.q_proj.lora_a": (16, 2)},
    "LoKr without alphas": {"layers.0.q_proj.lokr_w1": (4, 4), "layers.0.q_proj.lokr_w2": (4, 4)},
    "LoHa": {f"layers.0.q_proj.hada_w{n}_{part}": (4, 4) for n in "12" for part in "ab"},
    "OFT": {"layers.0.q_proj.oft_blocks": (2, 8, 8)},
    "changes in full": {"layers.0.q_proj.diff": (16, 16), "layers.0.q_proj.diff_b": (16,)},
    "VeRA": {"layers.0.q_proj.vera_lambda_b": (16,), "layers.0.q_proj.vera_lambda_d": (2,)},
    "another program": {"layers.0.q_proj_lora.a.weight": (2, 16), "layers.0.q_proj_lora.b.weight": (16, 2)},
    "a magnitude among weights": {"layers.0.q_proj.weight": (16, 16), "layers.0.q_proj.dora_scale": (16, 1)},
}  # fmt: skip


def of_shapes(path: Path, shapes: Mapping[str, Shape]) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}])
@pytest.mark.parametrize("layout", FACTORS)
def test_factors_are_no_model(tmp_path: Path, layout: str, config: dict[str, str] | None) -> None:
    """Neither as a file nor as a folder with the config of a model."""
    path = of_shapes(tmp_path / "a" / "model.safetensors", FACTORS[layout])
    if config:
        (path.parent / "config.json").write_text(json.dumps(config))
    for given in (path, path.parent):
        if layout == "a magnitude among weights" and config:
            continue  # a parameter of its own beside its module's weight
        with pytest.raises(FormatError, match=r"is a part of an adapter, and no full.*layout is not known: read are"):
            open_model(given)


def test_state_dicts_of_adapters_are_no_models() -> None:
    states = [{"q.lora_A.weight": torch.ones(2, 16), "q.lora_B.weight": torch.ones(16, 2)}] * 2
    with pytest.raises(FormatError, match=r"q.lora_A.weight is a part of an adapter.*merge_deltas"):
        merging.merge_state_dicts(states, method="linear")


def test_a_wrapped_model_is_no_model(tmp_path: Path) -> None:
    """What a trainer saves of a model with PEFT's wrappers still around its layers."""
    linear = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{linear}.base_layer.weight": (16, 16), f"{linear}.lora_A.default.weight": (2, 16)}
    folder = of_shapes(
        tmp_path / "a" / "model.safetensors", {**shapes, f"{linear}.lora_B.default.weight": (16, 2)}
    ).parent
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(FormatError, match=r"an adapter that is not merged into it.*merge_and_unload"):
        open_model(folder)


ORDINARY: dict[str, dict[str, Shape]] = {
    "alphas": {"act.alpha": (16,), "transformer.blocks.0.act.alpha": (16,), "unet.mix.alpha": (1,), "l.weight": (4, 4)},
    "letters": {"layers.0.a1.weight": (4, 4), "layers.0.b1.weight": (4, 4), "layers.0.w.weight": (4, 4)},
    "differences": {"head.diff.weight": (4, 4), "layers.0.rescale": (4,), "layers.0.norm.weight": (4,)},
    "latent attention": {"layers.0.q_a_proj.weight": (4, 8), "layers.0.q_b_proj.weight": (8, 4)},
    "RWKV": {"layers.0.attn.w_lora.lora.0.weight": (4, 8), "layers.0.attn.w_lora.lora.2.weight": (8, 4)},
}  # fmt: skip
OWN: dict[str, dict[str, Shape]] = {
    "Jina": {f"layers.0.Wqkv.parametrizations.weight.{part}": (4, 4) for part in ("original", "0.lora_A", "0.lora_B")},
    "Phi-4": {f"layers.0.q_proj.{part}": (4, 4)
              for part in ("base_layer.weight", "lora_A.vision.weight", "lora_B.vision.weight")},
}  # fmt: skip


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_models_are_models(tmp_path: Path, kind: str) -> None:
    assert isinstance(open_model(of_shapes(tmp_path / "a.safetensors", ORDINARY[kind])), Checkpoint)


@pytest.mark.parametrize("kind", OWN)
def test_factors_of_an_architecture_itself(tmp_path: Path, kind: str) -> None:
    """Some models have LoRA built in: their config says so, and the weights lie beside."""
    folder = of_shapes(tmp_path / "a" / "model.safetensors", OWN[kind]).parent
    (folder / "config.json").write_text(json.dumps({"model_type": "phi4mm"}))
    assert isinstance(open_model(folder), Checkpoint)
