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
        for name, value in build_video_denoiser(family).state_dict().items()
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
