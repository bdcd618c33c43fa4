"""What a tensor is, told from its name and shape, against the modules of real architectures."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from merging.maths.layers import LayerPosition, Stacks
from merging.maths.site import Site, inputs_by_outputs, site_of
from support.architectures import ARCHITECTURES, build


def kind_of(module: torch.nn.Module, shape: tuple[int, ...]) -> str | None:
    """What a parameter is, where its module tells."""
    if len(shape) == 1 or "Norm" in type(module).__name__:
        return "vector"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if isinstance(module, (torch.nn.Linear, Conv1D)):
        return "matrix"
    if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
        return "conv" if shape[0] > 1 else None
    return "experts" if type(module).__name__.endswith("Experts") and len(shape) == 3 else None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kinds(architecture: str) -> None:
    model = build(architecture, 0)
    names = [name for name, _ in model.named_parameters()]
    stacks = Stacks.from_names(names)
    told = 0
    for prefix, module in model.named_modules():
        for name, value in module.named_parameters(prefix, recurse=False):
            want = kind_of(module, tuple(value.shape))
            if want is not None:
                told += 1
                assert site_of(name, tuple(value.shape), stacks).kind == want, name
    assert told > len(names) / 2


@pytest.mark.parametrize("config", [transformers.GPT2Config, transformers.GPTBigCodeConfig], ids=["gpt2", "bigcode"])
def test_axis_of_inputs(config: type[transformers.PreTrainedConfig]) -> None:
    """GPT-2's linear layers are stored as inputs by outputs, those of others with the same names are not."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config(n_layer=1))
    linear = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    told = inputs_by_outputs({name: tuple(value.shape) for name, value in model.state_dict().items()})
    assert told == {name for name, module in linear.items() if isinstance(module, Conv1D)}
    assert bool(told) == (config is transformers.GPT2Config)


def test_depth() -> None:
    assert [Site("a", (), LayerPosition(None, layer, 3)).depth for layer in (None, 0, 1, 2, 7)] == [0, 0, 0.5, 1, 1]
    assert Site("a", (), LayerPosition(None, 0, 1)).depth == 1
