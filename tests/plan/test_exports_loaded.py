"""Merged LoRAs in the formats of PEFT, diffusers and Kohya: each program makes of them the sum of what was merged."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from lycoris.kohya import create_network_from_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import merging
from merging.sources.diffusion_names import known_names
from support.adapters import quiet, save_base, train
from support.diffusion_models import (
    State,
    build,
    components,
    factors,
    fused,
    kohya_modules,
    quietly,
    trained,
)
from support.exported import WEIGHTS, Made, check_close, merge, metadata, modules


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        pytest.param(model, kinds, marks=() if kinds == "dk" else pytest.mark.exhaustive)
        for model, kinds in product(("sd", "sdxl"), ("dd", "kk", "dk"))
    ],
)
def test_diffusers_loads_the_sum(made: Made, tmp_path: Path, model: str, kinds: str, format: str) -> None:
    """From either format or both into each: U-Net, its convolutions, and one text encoder or two."""
    file = merge(made.pair(model, kinds), tmp_path / "out", base=made.base(model), format=format)
    check_close(fused(build(model), file), made.together(model, kinds))


def test_diffusers_loads_a_transformer(made: Made, tmp_path: Path) -> None:
    file = merge(made.pair("flux", "dd"), tmp_path / "out.safetensors", base=made.base("flux"))
    check_close(fused(build("flux"), file), made.together("flux", "dd"))


@pytest.mark.parametrize("kinds", ["dd", "kk"])
def test_without_a_base_the_format_stays(made: Made, tmp_path: Path, kinds: str) -> None:
    file = merge(made.pair("sd", kinds), tmp_path / "out")
    assert modules(file) == set.union(*map(modules, made.pair("sd", kinds)))
    check_close(fused(build("sd"), file), made.together("sd", kinds))


def published(state: State) -> State:
    """A transformer of diffusers as it was published."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return {
        known.name: torch.cat([state[part.name][part.start : part.start + part.length] for part in known.rows])
        for known in known_names(shapes)
        if known.component == "transformer" and "published" in known.styles
    }


def changes(file: Path) -> State:
    """What a file of Kohya's changes, by the definition: alpha / rank times the product of the factors."""
    state = load_file(file)
    found = {}
    for name in state:
        module, _, part = name.partition(".")
        if part == "lora_up.weight":
            up, down = state[name].flatten(1), state[f"{module}.lora_down.weight"].flatten(1)
            found[module] = float(state[f"{module}.alpha"]) / len(down) * up @ down
    return found


@pytest.mark.parametrize(
    ("kinds", "base"), [("dd", "pipeline"), ("kk", "pipeline"), ("dk", "pipeline"), ("dk", "single file")]
)
def test_flux_as_it_was_published(made: Made, tmp_path: Path, kinds: str, base: str) -> None:
    """Projections that diffusers keeps apart are fused, with zeros where nothing was trained, halves in their order."""
    before = made.before("flux")
    given = made.base("flux")
    if base == "single file":
        given = tmp_path / "single.safetensors"
        text = {
            name.replace("text_encoder.", "text_encoders.clip_l.transformer."): value
            for name, value in before.items()
            if name.startswith("text_encoder.")
        }
        transformer = {f"model.diffusion_model.{name}": value for name, value in published(before).items()}
        save_file(transformer | text, given)
    file = merge(made.pair("flux", kinds), tmp_path / "out", base=given, format="kohya")
    wanted: dict[str, Tensor] = {}
    for lora, weight in zip(made.pair("flux", kinds), WEIGHTS, strict=True):
        if lora.name == "pytorch_lora_weights.safetensors":
            after = fused(build("flux"), lora)
            now, then = published(after), published(before)
            own = {f"lora_unet_{n.removesuffix('.weight')}".replace(".", "_"): now[n] - then[n] for n in then}
            own |= {
                f"lora_te1_text_model_{n.removesuffix('.weight').partition('.')[2]}".replace(".", "_"): after[n] - value
                for n, value in before.items()
                if n.startswith("text_encoder.")
            }
        else:
            own = changes(lora)
        for name, change in own.items():
            if change.any():
                wanted[name] = wanted.get(name, 0) + weight * change
    check_close(changes(file), wanted)


def test_flux_at_its_width_is_read_by_diffusers(tmp_path: Path) -> None:
    """diffusers takes the fused layers of Kohya's files apart as we have put them together."""
    width = 3072
    sizes = {
        "transformer_blocks.0.attn.to_q": (width, width),
        "transformer_blocks.0.attn.to_k": (width, width),
        "transformer_blocks.0.attn.to_v": (width, width),
        "transformer_blocks.0.ff.net.2": (width, 4 * width),
        "single_transformer_blocks.0.attn.to_q": (width, width),
        "single_transformer_blocks.0.attn.to_k": (width, width),
        "single_transformer_blocks.0.attn.to_v": (width, width),
        "single_transformer_blocks.0.proj_mlp": (4 * width, width),
    }
    given = {}
    for name, (outputs, inputs) in sizes.items():
        given[f"transformer.{name}.lora_A.weight"] = torch.randn(2, inputs)
        given[f"transformer.{name}.lora_B.weight"] = torch.randn(outputs, 2)
    save_file(given, tmp_path / "a.safetensors")
    file = merge([tmp_path / "a.safetensors"], tmp_path / "out.safetensors", format="kohya", weights=1.0)
    assert {name.partition(".")[0] for name in load_file(file)} == {
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_double_blocks_0_img_mlp_2",
        "lora_unet_single_blocks_0_linear1",
    }
    got = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(load_file(file))
    for name, (_, inputs) in sizes.items():
        probe = torch.randn(inputs)
        one, other = (
            state[f"transformer.{name}.lora_B.weight"] @ (state[f"transformer.{name}.lora_A.weight"] @ probe)
            for state in (got, given)
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_baked_in_they_are_what_diffusers_fuses(made: Made, tmp_path: Path) -> None:
    """The same sum written into the pipeline, whose components load."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"weights": WEIGHTS, "base": made.base("sdxl"), "kind": "model", "output": out}
    merging.merge(made.pair("sdxl", "dk"), method="task_arithmetic", **options)
    wanted = made.together("sdxl", "dk")
    for name, module in components(build("sdxl")).items():
        loaded = type(module).from_pretrained(out, subfolder=name).state_dict()
        check_close(dict(loaded), {key: wanted[f"{name}.{key}"] for key in loaded})


def tree(state: State) -> nn.Module:
    """Modules of these names, with the weights of linear layers and convolutions."""
    root = nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        if leaf != "weight" or value.dim() not in (2, 4):
            continue
        sizes = (value.shape[1], value.shape[0])
        layer = nn.Linear(*sizes, bias=False) if value.dim() == 2 else nn.Conv2d(*sizes, tuple(value.shape[2:]))
        layer.weight.data = value.clone()
        module = root
        for part in path[:-1]:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.add_module(path[-1], layer)
    return root


def as_trained(state: State, model: str) -> dict[str, State]:
    """The components as sd-scripts has them: SDXL's U-Net as published, and text encoders by their old names."""
    found: dict[str, State] = {}
    style = "published" if model == "sdxl" else "diffusers"
    for known in known_names({name: tuple(value.shape) for name, value in state.items()}):
        if style in known.styles:
            found.setdefault(known.component, {})[known.name] = state[known.rows[0].name]
    return found


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_lycoris_makes_the_sum_of_a_kohya_file(made: Made, tmp_path: Path, model: str) -> None:
    file = merge(made.pair(model, "dk"), tmp_path / "out", base=made.base(model), format="kohya")
    trees = {name: tree(state) for name, state in as_trained(made.before(model), model).items()}
    texts = [module for name, module in trees.items() if name.startswith("text")]
    with quietly():
        network, _ = create_network_from_weights(
            1.0, str(file), None, texts if model == "sdxl" else texts[0], trees["unet"]
        )
        assert len(network.unet_loras + network.text_encoder_loras) == len(modules(file))
        for each in network.unet_loras + network.text_encoder_loras:
            each.merge_to(1.0)
    wanted = as_trained(made.together(model, "dk"), model)
    for name, module in trees.items():
        got = {key: value for key, value in module.state_dict().items() if key.endswith("weight")}
        check_close(got, {key: wanted[name][key] for key in got})


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_peft_loads_one_component(made: Made, tmp_path: Path, component: str) -> None:
    """From both of the others' formats, as a folder of the portable profile."""
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[component]
    own = {name: each for name, each in kohya_modules("sd", 1).items() if name.startswith(prefix)}
    loras = [
        trained("sd", tmp_path / "a", parts=(component,), lora_alpha=3),
        factors(tmp_path / "b.safetensors", own, seed=2),
    ]
    file = merge(loras, tmp_path / "out", base=made.base("sd"), format="peft")
    before = made.before("sd")
    wanted = dict(before)
    for lora, weight in zip(loras, WEIGHTS, strict=True):
        after = fused(build("sd"), lora)
        wanted = {name: value + weight * (after[name] - before[name]) for name, value in wanted.items()}
    model = getattr(build("sd"), component)
    with quietly():
        loaded = PeftModel.from_pretrained(model, file.parent)
    names = {name.removeprefix("base_model.model.") for name in load_file(file)}
    assert names == {
        name.removeprefix("base_model.model.").replace(".default", "")
        for name in loaded.state_dict()
        if ".lora_" in name
    }
    merged = loaded.merge_and_unload().state_dict()
    check_close(dict(merged), {name: wanted[f"{component}.{name}"] for name in merged})
    check_portable(file.parent, rank=8)


def check_portable(folder: Path, rank: int) -> None:
    """What every server reads: one rank of those that all take, scales in the factors, no variants."""
    config = json.loads((folder / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "inference_mode": True,
    }
    assert {name: config[name] for name in wanted} == wanted
    state = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") and ".default" not in name for name in state)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in state)
    assert {value.shape["lora_B" in name] for name, value in state.items()} == {rank}
    assert metadata(folder / "adapter_model.safetensors")["format"] == "pt"


def test_language_models_keep_the_portable_profile(tmp_path: Path) -> None:
    with quiet():
        base = save_base(tmp_path / "base", "llama")
        one = train(tmp_path / "one", base, 1, ["q_proj", "up_proj"], r=6, use_rslora=True)
        two = train(tmp_path / "two", base, 2, ["q_proj"], r=3, lora_alpha=7, rank_pattern={"q_proj": 4})
    merge([one, two], tmp_path / "out")
    check_portable(tmp_path / "out", rank=16)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_from_peft(made: Made, tmp_path: Path, format: str) -> None:
    """What PEFT saves of a U-Net, which pipelines do not read, becomes what they do."""
    pipeline = build("sd")
    torch.manual_seed(3)
    model = get_peft_model(pipeline.unet, LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv1"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    model.save_pretrained(tmp_path / "peft")
    file = merge([tmp_path / "peft"], tmp_path / "out", base=made.base("sd"), format=format, weights=1.0)
    wanted = made.before("sd") | {f"unet.{name}": each for name, each in model.merge_and_unload().state_dict().items()}
    check_close(fused(build("sd"), file), wanted)
