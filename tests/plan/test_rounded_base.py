"""Which weights of a base are rounded as it was trained: those that transformers has bitsandbytes quantise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from merging.errors import InputError, OptionError
from merging.hub.open_model import open_model
from merging.maths.layers import Stacks
from merging.maths.site import inputs_by_outputs, site_of
from merging.plan.as_trained import AsTrained
from merging.plan.outputs.rounded_base import RoundedBase, round_base
from merging.sources import Checkpoint
from merging.sources.quantized.rounded_weights import TurnedRounded
from support.architectures import ARCHITECTURES, build
from support.denoisers import FAMILIES, build_denoiser
from support.paths import TESTS
from support.tiny import CONFIG, model, save

QUIRKS = {
    # the last parameter of these is a bias, by which transformers means to name the layer
    "wav2vec2": {"lm_head.weight"},
    # and of this one a projection for classes that no text model has
    "clip": {"text_projection.weight"},
}
"""Weights on which we differ from transformers, by architecture."""

SUBCLASSED = ("falcon", "falcon-new")
"""Models whose layers are of a subclass of linear layers: transformers 4 has them quantised, and transformers 5 not."""


def round_weights(path: Path, settings: AsTrained | None = None, dequantize: bool = False) -> RoundedBase:
    base = open_model(path, dequantize=dequantize)
    assert isinstance(base, Checkpoint)
    shapes = {name: stored.shape for name, stored in base.tensors.items()}
    stacks, turned = Stacks.from_names(shapes), inputs_by_outputs(shapes)
    sites = {name: site_of(name, shape, stacks, name in turned) for name, shape in shapes.items()}
    return round_base(settings or AsTrained(format="nf4"), base, [], sites, [])


def quantized_by_transformers(made: PreTrainedModel) -> set[bytes]:
    """The values of the weights that transformers 5 has bitsandbytes quantise."""
    kept = [*get_keys_to_not_convert(made), *(made._keep_in_fp32_modules or ())]
    return {
        values_of(module.weight)
        for name, module in made.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, kept)
    }


def values_of(weight: torch.Tensor) -> bytes:
    return bytes(weight.detach().float().reshape(-1).view(torch.uint8).numpy().tobytes())


def check_architecture(name: str, folder: Path) -> None:
    made = build(name, 0)
    made.save_pretrained(folder)
    base = open_model(folder)
    assert isinstance(base, Checkpoint)
    wanted = quantized_by_transformers(made)
    quantized = {each for each, stored in base.tensors.items() if values_of(stored.read()) in wanted}
    assert len(quantized) >= len(wanted) - 1  # each is found in the file; some share their values
    if not quantized:  # nothing but convolutions and experts
        with pytest.raises(InputError, match="holds no weight that bitsandbytes quantises"):
            round_weights(folder)
        return
    assert round_weights(folder).weights.keys() ^ quantized == QUIRKS.get(name, set())


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "t5", "qwen2-vl"])
def test_the_weights_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    check_architecture(name, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in SUBCLASSED])
def test_the_weights_of_every_architecture(name: str, tmp_path: Path) -> None:
    check_architecture(name, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_of_denoisers(name: str, tmp_path: Path) -> None:
    """All linear layers, but for those that diffusers keeps in float32."""
    made = build_denoiser(name)
    made.save_pretrained(tmp_path)
    kept = getattr(made, "_keep_in_fp32_modules", None) or ()
    linear = {f"{each}.weight" for each, module in made.named_modules() if isinstance(module, nn.Linear)}
    wanted = {each for each in linear if not any(part in each.split(".") for part in kept)}
    assert round_weights(tmp_path).weights.keys() == wanted


def test_layers_of_gpt2_are_turned(tmp_path: Path) -> None:
    build("gpt2", 0).save_pretrained(tmp_path)
    found = round_weights(tmp_path).weights
    assert found
    assert all(isinstance(each, TurnedRounded) for each in found.values())


def test_skipped_layers(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model())
    kept = round_weights(folder, AsTrained(format="nf4", skip=("layers.1",))).weights
    assert kept.keys() == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 2)}
    with pytest.raises(OptionError, match=r"'layers\.7' names no tensor"):
        round_weights(folder, AsTrained(format="nf4", skip=("layers.7",)))
    with pytest.raises(InputError, match="leave as_trained= out"):
        round_weights(folder, AsTrained(format="nf4", skip=("layers",)))


def test_experts_that_are_stored_apart(tmp_path: Path) -> None:
    """They stay as they are, as in memory they are stacked; a notice says so."""
    expert = {"model.layers.0.mlp.experts.0.up_proj.weight": torch.randn(16, 8)}
    gate = {"model.layers.0.mlp.gate.weight": torch.randn(2, 8)}
    found = round_weights(save(tmp_path / "m", model() | expert | gate, CONFIG))
    assert not {*expert, *gate} & found.weights.keys()
    assert "its experts and routers are not rounded" in found.notices[1]


def test_a_base_that_is_quantised_on_the_disk_is_not_rounded_again(tmp_path: Path) -> None:
    recorded = load_file(TESTS / "golden" / "bitsandbytes.safetensors")
    case, name = "nf4.bfloat16.double.uint8/weight", "model.layers.0.mlp.up_proj.weight"
    parts = {name + each.removeprefix(case): value for each, value in recorded.items() if each.startswith(case)}
    folder = save(tmp_path / "m", {each: value for each, value in model().items() if each != name} | parts)
    with pytest.raises(InputError, match=f"{name} is quantised by bitsandbytes, and so is already read as"):
        round_weights(folder, dequantize=True)
