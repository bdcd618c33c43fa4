"""Video families: diffusers' converters make its models of our published names, and each family is recognized."""

from __future__ import annotations

import re

import pytest
import torch

from merging.sources.denoisers import family_of, flat_name
from support.diffusion_models import State
from support.image_denoisers import as_published, shapes_of
from support.video_denoisers import VIDEO_FAMILIES, build_video_denoiser


def _state(family: str) -> State:
    """A family's tensors in diffusers, random, with modules as wide as its converter takes for granted."""
    random = torch.Generator().manual_seed(0)
    state = {
        name: torch.randint(-99, 99, value.shape, generator=random, dtype=torch.int8)
        for name, value in build_video_denoiser(family, **VIDEO_FAMILIES[family].converted).state_dict().items()
        if not re.search(VIDEO_FAMILIES[family].unnamed, name)
    }
    for module, (rows, columns) in VIDEO_FAMILIES[family].widths.items():
        numbers = torch.randint(-99, 99, (rows, 1), generator=random, dtype=torch.int8)
        state |= {f"{module}.weight": numbers.expand(rows, columns), f"{module}.bias": numbers[:, 0]}
    return state


def _check_equal(got: State, wanted: State) -> None:
    assert shapes_of(got) == shapes_of(wanted)
    assert not {name for name in wanted if not torch.equal(got[name], wanted[name])}


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_every_tensor_has_both_names(family: str) -> None:
    state, stated = _state(family), VIDEO_FAMILIES[family]
    published = as_published(state)
    for prefix in {"model.diffusion_model.", "", stated.prefix}:
        _check_equal(as_published({prefix + name: value for name, value in published.items()}, "diffusers"), state)
    if stated.convert is not None:
        _check_equal(stated.convert({stated.prefix + name: value for name, value in published.items()}), state)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_a_family_is_recognized_by_either_set_of_names(family: str) -> None:
    state = _state(family)
    for shapes in (shapes_of(state), shapes_of(as_published(state))):
        for named in (shapes, {flat_name(name): shape for name, shape in shapes.items()}):
            found = family_of(named)
            assert found is not None
            assert found.name == VIDEO_FAMILIES[family].name


_COMFYUI = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("_attn_proj.", "_attn.proj."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    (".q_norm.weight", ".norm.query_norm.scale"),
    (".k_norm.weight", ".norm.key_norm.scale"),
    (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.0.", "_in.in_layer."),
    ("_in.mlp.2.", "_in.out_layer."),
)
"""ComfyUI's names of HunyuanVideo's modules, by its own replacements of Tencent's."""


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.model."])
@pytest.mark.parametrize("family", ["hunyuan-video", "hunyuan-video-1.5"])
def test_comfyuis_names_of_hunyuan_video(family: str, prefix: str) -> None:
    """It joins the projections of 1.5, as our published names do, which Tencent keeps apart."""
    state = _state(family)
    comfyui = {}
    for name, value in as_published(state).items():
        for theirs, ours in _COMFYUI:
            name = name.replace(theirs, ours)
        comfyui[prefix + name] = value
    _check_equal(as_published(comfyui, "diffusers"), state)


def test_tencents_names_of_hunyuan_video_15() -> None:
    """Queries, keys and values are apart, as in diffusers, under names of their own."""
    state = _state("hunyuan-video-1.5")
    published = as_published(state)
    apart = {name: value for name, value in published.items() if "_blocks." not in name or "_attn_qkv." not in name}
    for name, value in published.items():
        if name.startswith("double_blocks.") and "_attn_qkv." in name:
            apart |= {name.replace("qkv", part): rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
    _check_equal(as_published(apart, "diffusers"), state)
    _check_equal(as_published(apart), published)
    found = family_of(shapes_of(apart))
    assert found is not None
    assert found.name == "HunyuanVideo 1.5"
