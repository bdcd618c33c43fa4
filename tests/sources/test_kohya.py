"""Kohya's flat names: what a file changes in a base is what diffusers changes with it, whatever names the base has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from merging.sources.diffusion_names import known_names
from support.diffusion_models import (
    BLOCK,
    PUBLISHED,
    TEXT,
    State,
    build,
    check_closest,
    factors,
    fused,
    kohya_modules,
    on_disk,
    quietly,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline of each kind, which no test changes."""
    folder = tmp_path_factory.mktemp("models")
    with quietly():
        for name in ("sd", "sdxl"):
            build(name).save_pretrained(folder / name)
    return folder


def merged(lora: Path, base: Path, out: Path) -> Path:
    merging.merge([lora], method="task_arithmetic", base=base, kind="model", output=out)
    return out


@pytest.mark.parametrize("alpha", [1, None])
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_into_a_pipeline(models: Path, tmp_path: Path, model: str, alpha: float | None) -> None:
    lora = factors(tmp_path / "a.safetensors", kohya_modules(model, alpha))
    before = on_disk(models / model)
    wanted = fused(build(model), lora)
    changed = len(kohya_modules(model, alpha))
    check_closest(on_disk(merged(lora, models / model, tmp_path / "out")), wanted, before, changed)


def published(state: State) -> State:
    """A pipeline's weights as single files have them."""
    single: State = {}
    prefixes = {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
    }
    for known in known_names({name: tuple(value.shape) for name, value in state.items()}):
        name = prefixes.get(known.component, "model.diffusion_model.") + known.name
        if "published" in known.styles:
            single[name] = torch.cat([state[part.name][part.start : part.start + part.length] for part in known.rows])
    return single


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_into_a_single_file(models: Path, tmp_path: Path, model: str) -> None:
    """The names of a single file are neither those of the pipeline nor those of the LoRA."""
    lora = factors(tmp_path / "a.safetensors", kohya_modules(model, 1))
    before = published(on_disk(models / model))
    save_file(before, tmp_path / "single.safetensors")
    wanted = published(fused(build(model), lora))
    got = load_file(merged(lora, tmp_path / "single.safetensors", tmp_path / "out.safetensors"))
    check_closest(got, wanted, before, len(kohya_modules(model, 1)))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_into_a_component(models: Path, tmp_path: Path, component: str) -> None:
    """A LoRA of one component, and that component's folder; of several components it is refused."""
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[component]
    own = {name: given for name, given in kohya_modules("sd", 1).items() if name.startswith(prefix)}
    lora = factors(tmp_path / "a.safetensors", own)
    out = merged(lora, models / "sd" / component, tmp_path / "out")
    got = {
        f"{component}.{name}": value for file in out.glob("*.safetensors") for name, value in load_file(file).items()
    }
    wanted, before = fused(build("sd"), lora), on_disk(models / "sd")
    check_closest(got, {n: wanted[n] for n in got}, {n: before[n] for n in got}, len(own))
    both = factors(tmp_path / "b.safetensors", kohya_modules("sd", 1))
    with pytest.raises(InputError, match=r"is not a tensor of the base \(\d+ of \d+ targets have no place\): "):
        merged(both, models / "sd" / component, tmp_path / "other")


def test_alphas_and_ranks_of_their_own(models: Path, tmp_path: Path) -> None:
    """Each module's alpha counts for it alone; diffusers gives its attention layers the one that most modules have."""
    lora, state = tmp_path / "a.safetensors", {}
    wanted, attention = on_disk(models / "sd"), "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    for number, (module, name) in enumerate(
        {
            f"{BLOCK}_transformer_blocks_0_attn1_to_q": f"{attention}.to_q",
            f"{BLOCK}_transformer_blocks_0_attn1_to_k": f"{attention}.to_k",
            f"lora_te_{TEXT}_self_attn_k_proj": "text_encoder.encoder.layers.0.self_attn.k_proj",
        }.items()
    ):
        size, rank = wanted[f"{name}.weight"].shape[0], 1 + number
        down, up = torch.randn(rank, size), torch.randn(size, rank)
        state |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        state[f"{module}.alpha"] = torch.tensor(2.0 + number).half()
        wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + (2 + number) / rank * up @ down
    save_file(state, lora)
    got = on_disk(merged(lora, models / "sd", tmp_path / "out"))
    check_closest(got, wanted, on_disk(models / "sd"), 3)


def test_without_a_base_flat_names_meet_flat_names(models: Path, tmp_path: Path) -> None:
    """Two files merge by their own names, and what comes out changes a base as the two together."""
    one = factors(tmp_path / "a.safetensors", kohya_modules("sd", 1), seed=1)
    some = dict(list(kohya_modules("sd", 2).items())[3:])
    two = factors(tmp_path / "b.safetensors", some, seed=2)
    merging.merge([one, two], method="task_arithmetic", weights=(0.5, -1.0), output=tmp_path / "m.safetensors")
    got = on_disk(merged(tmp_path / "m.safetensors", models / "sd", tmp_path / "out"))
    before = on_disk(models / "sd")
    first, second = (on_disk(merged(each, models / "sd", tmp_path / each.stem)) for each in (one, two))
    wanted = {n: value + 0.5 * (first[n] - value) - (second[n] - value) for n, value in before.items()}
    check_closest(got, wanted, before, len(kohya_modules("sd", 1)))


def test_names_that_mean_one_tensor(models: Path, tmp_path: Path) -> None:
    name = "transformer_blocks_0_attn1_to_q"
    lora = factors(tmp_path / "a.safetensors", {f"{BLOCK}_{name}": ((16, 16), 1), f"{PUBLISHED}_{name}": ((16, 16), 1)})
    with pytest.raises(InputError, match=f"{PUBLISHED}_{name}.weight are one tensor of the base"):
        merged(lora, models / "sd", tmp_path / "out")


def test_shape_of_another_model(models: Path, tmp_path: Path) -> None:
    lora = factors(tmp_path / "a.safetensors", {f"{BLOCK}_transformer_blocks_0_attn1_to_q": ((24, 24), 1)})
    with pytest.raises(InputError, match=re.escape("has the shape (24, 24), and the base's tensor (16, 16)")):
        merged(lora, models / "sd", tmp_path / "out")


def test_metadata(tmp_path: Path) -> None:
    """What a file says of its base keeps LoRAs of different families apart."""
    paths = []
    for number, version in enumerate(("sd_v1", "sdxl_base_v1-0")):
        state = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 2)}
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(state, paths[-1], {"ss_base_model_version": version, "ss_tag_frequency": "private"})
    assert open_model(paths[1]).base == "sdxl_base_v1-0"
    with pytest.raises(InputError, match=r"trained on sdxl_base_v1-0, and .* on sd_v1"):
        merging.merge(paths, method="linear", output=tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "name", ["bundle_emb.token.string_to_param.*", "lora_unet_x.hada_w1_c", "unet.conv_in.weight", "stray"]
)
def test_names_without_a_place(tmp_path: Path, name: str) -> None:
    state = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 2)}
    save_file({**state, name: torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=re.escape(name)):
        open_model(tmp_path / "a.safetensors")


# ---- alphas of 0, which programs read in two ways


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("stem", ["lora_unet_{}", "diffusion_model.{}"])
def test_an_alpha_of_zero_is_read_as_the_rank_and_said(tmp_path: Path, stem: str, zero: bool) -> None:
    torch.manual_seed(0)
    module = stem.format("double_blocks_0_img_mlp_0" if "unet" in stem else "double_blocks.0.img_mlp.0")
    down, up = torch.randn(2, 8), torch.randn(6, 2)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(0.0 if zero else 2.0)}
    path = tmp_path / "a.safetensors"
    save_file({f"{module}.{leaf}": value for leaf, value in parts.items()}, path)
    merging.merge([path], method="passthrough", output=tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    got = out[f"{module}.lora_up.weight"] @ out[f"{module}.lora_down.weight"] * (out[f"{module}.alpha"] / 2)
    torch.testing.assert_close(got, up @ down)
    told = open_model(path).notices
    assert [bool(re.search(r"alpha of 1 of its modules is 0 .* lora_alpha=", each)) for each in told] == [True] * zero
    assert open_model(path, 1.0).notices == ()
