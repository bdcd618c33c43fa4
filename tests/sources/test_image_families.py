"""Image families: diffusers' converters make its models of our published names, and each family is recognized."""

from __future__ import annotations

import re

import pytest
import torch

from merging.sources.denoisers import FAMILIES, family_of, flat_name, respell
from merging.sources.diffusion_names import known_names
from support.diffusion_models import State
from support.image_denoisers import IMAGE_FAMILIES, as_published, build_image_denoiser, shapes_of

_WITHOUT_RULE = {
    "krea2": r"scale_shift_table$",  # published with another number of axes
    "ideogram4": r"^(?!layers\.)|\.norm_[qk]\.",  # of which no file with published names is known
}
"""Tensors without a name in published files."""


def _state(family: str) -> State:
    """A family's tensors in diffusers, with random norms, and modules as wide as its converter takes for granted."""
    random = torch.Generator().manual_seed(0)
    state = {
        name: torch.randint(-99, 99, value.shape, generator=random, dtype=torch.int8)
        for name, value in build_image_denoiser(family).state_dict().items()
        if not re.search(_WITHOUT_RULE.get(family, "^$"), name)
    }
    for module, (rows, columns) in IMAGE_FAMILIES[family].widths.items():
        numbers = torch.randint(-99, 99, (rows, 1), generator=random, dtype=torch.int8)
        state[f"{module}.weight"] = numbers.expand(rows, columns)
        if f"{module}.bias" in state:
            state[f"{module}.bias"] = numbers[:, 0]
    return state


def _check_equal(got: State, wanted: State) -> None:
    assert shapes_of(got) == shapes_of(wanted)
    assert not {name for name in wanted if not torch.equal(got[name], wanted[name])}


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_every_tensor_has_both_names(family: str) -> None:
    state = _state(family)
    published = as_published(state)
    _check_equal(as_published(published, "diffusers"), state)
    _check_equal(as_published({f"model.diffusion_model.{n}": v for n, v in published.items()}, "diffusers"), state)
    convert = IMAGE_FAMILIES[family].convert
    if convert is not None:
        _check_equal(convert(dict(published)), state)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_a_family_is_recognized_by_either_set_of_names(family: str) -> None:
    state = _state(family)
    for shapes in (shapes_of(state), shapes_of(as_published(state))):
        for named in (shapes, {flat_name(name): shape for name, shape in shapes.items()}):
            found = family_of(named)
            assert found is not None and found.name == IMAGE_FAMILIES[family].name


@pytest.mark.parametrize(
    ("name", "usual"),
    [
        ("double_blocks_0_img_mlp_fc1.weight", "double_blocks_0_img_mlp_0.weight"),
        ("joint_blocks_0_x_block_mlp_fc1.weight", "joint_blocks_0_x_block_mlp_fc1.weight"),
        ("blocks_0_mlp_fc2.weight", "blocks_0_mlp_fc2.weight"),
    ],
)
def test_spellings_of_one_family_leave_others_alone(name: str, usual: str) -> None:
    assert respell(name) == usual


def test_names_of_families_differ() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert known_names({"model.embed_tokens.weight": (4, 4), "model.layers.0.mlp.weight": (4, 4)}, strict=True) == []
