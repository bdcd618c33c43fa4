"""Every method of LyCORIS: a layer with what we read added to it computes what LyCORIS's own module computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import modules
from safetensors.torch import save_file
from torch import Tensor, nn

from merging.errors import FormatError
from merging.hub.open_model import open_model
from merging.sources import Adapter

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 16),
    "linear without bias": lambda: nn.Linear(16, 8, bias=False),
    "conv1d": lambda: nn.Conv1d(12, 16, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(12, 16, 3, padding=1),
    "conv2d 1x1": lambda: nn.Conv2d(12, 16, 1),
    "conv3d": lambda: nn.Conv3d(8, 4, 3, padding=1),
}
LINEAR, CONVOLUTIONS = ("linear", "linear without bias"), ("conv1d", "conv2d", "conv2d 1x1", "conv3d")
EVERY = (*LINEAR, *CONVOLUTIONS)

METHODS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[str, ...]]] = {
    "locon": (modules.LoConModule, {}, EVERY),
    "locon alpha": (modules.LoConModule, {"alpha": 3}, EVERY),
    "locon rslora": (modules.LoConModule, {"alpha": 3, "rs_lora": True}, EVERY),
    "locon tucker": (modules.LoConModule, {"alpha": 2, "use_tucker": True}, CONVOLUTIONS),
    "locon dora": (modules.LoConModule, {"alpha": 2, "weight_decompose": True}, EVERY),
    "locon dora on inputs": (modules.LoConModule, {"alpha": 2, "weight_decompose": True, "wd_on_out": False}, EVERY),
    "locon scalar": (modules.LoConModule, {"alpha": 2, "use_scalar": True}, EVERY),
    "loha": (modules.LohaModule, {"alpha": 3}, EVERY),
    "loha tucker": (modules.LohaModule, {"alpha": 3, "use_tucker": True}, CONVOLUTIONS),
    "loha dora": (modules.LohaModule, {"alpha": 3, "weight_decompose": True}, EVERY),
    "lokr": (modules.LokrModule, {"alpha": 2, "lora_dim": 1}, EVERY),
    "lokr both": (modules.LokrModule, {"alpha": 2, "lora_dim": 1, "decompose_both": True, "factor": 4}, EVERY),
    "lokr full": (modules.LokrModule, {"alpha": 2, "full_matrix": True}, EVERY),
    "lokr tucker": (modules.LokrModule, {"alpha": 2, "lora_dim": 1, "use_tucker": True}, CONVOLUTIONS),
    "lokr dora": (modules.LokrModule, {"alpha": 2, "lora_dim": 1, "weight_decompose": True}, EVERY),
    "full": (modules.FullModule, {}, EVERY),
    "ia3": (modules.IA3Module, {}, EVERY),
    "ia3 on inputs": (modules.IA3Module, {"train_on_input": True}, EVERY),
    "glora": (modules.GLoRAModule, {"alpha": 3}, EVERY),
    "diag-oft": (modules.DiagOFTModule, {}, EVERY),
    "diag-oft bounded": (modules.DiagOFTModule, {"constraint": 0.01, "rescaled": True}, EVERY),
    "boft": (modules.ButterflyOFTModule, {"lora_dim": 4}, EVERY),
    "boft bounded": (modules.ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.01, "rescaled": True}, EVERY),
}
CASES = [(method, layer) for method, (_, _, layers) in METHODS.items() for layer in layers]


def trained(module: nn.Module) -> nn.Module:
    """A module with random numbers in the place of training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def saved(module: nn.Module, path: Path, name: str = "lora_unet_block_0_x") -> Adapter:
    """A file with what the module saves, opened."""
    tensors = {f"{name}.{part}": value.detach().contiguous() for part, value in module.state_dict().items()}
    save_file(tensors, path / "a.safetensors")
    found = open_model(path / "a.safetensors")
    assert isinstance(found, Adapter)
    return found


def changed(layer: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The parameters of a layer with the adapter's changes added, by "weight" and "bias"."""
    parameters = {name: value.detach().clone() for name, value in layer.named_parameters()}
    for target, change in adapter.changes.items():
        base = parameters[target.rpartition(".")[2]]
        assert change.fits(tuple(base.shape))
        before = base.clone()
        base += change.read(tuple(base.shape), lambda before=before: before, torch.float32).dense()
    return parameters


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_method(tmp_path: Path, method: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    cls, settings, _ = METHODS[method]
    module = cls("lora_unet_block_0_x", copy.deepcopy(layer), **{"lora_dim": 2, "alpha": 2, **settings})
    if method == "full":
        module.apply_to()  # until then what it takes for its change is not what it saves
    trained(module).eval()
    inputs = torch.randn(3, layer.weight.shape[1], *[5] * (layer.weight.dim() - 2))
    with torch.no_grad():
        before, wanted = layer(inputs), module(inputs)
        got = torch.func.functional_call(layer, changed(layer, saved(module, tmp_path)), (inputs,))
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert float((wanted - before).abs().max()) > 1e-3


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.GroupNorm(2, 8)], ids=["layer", "group"])
def test_norms(tmp_path: Path, norm: nn.Module) -> None:
    module = trained(modules.NormModule("lora_unet_norm", norm))
    weight, bias = module.get_merged_weight()
    got = changed(norm, saved(module, tmp_path))
    assert torch.equal(got["weight"], weight.detach())
    assert torch.equal(got["bias"], bias.detach())


@pytest.mark.parametrize("kind", EVERY)
def test_dylora(tmp_path: Path, kind: str) -> None:
    """All of its ranks, as its file has them: LyCORIS itself then reads a LoCon."""
    layer = LAYERS[kind]()
    module = trained(modules.DyLoraModule("x", layer, lora_dim=4, block_size=2, alpha=2))
    state = module.state_dict()
    down, up = state["lora_down.weight"], state["lora_up.weight"]
    wanted = (up @ down.flatten(1) / 2).reshape(layer.weight.shape)
    change = saved(module, tmp_path).changes["lora_unet_block_0_x.weight"]
    got = change.read(tuple(layer.weight.shape), lambda: layer.weight, torch.float32)
    torch.testing.assert_close(got.dense(), wanted)


def test_old_glora(tmp_path: Path) -> None:
    """Files of the first versions hold each pair of factors the other way round."""
    torch.manual_seed(0)
    weight = torch.randn(7, 5)
    a1, a2, b1, b2 = (torch.randn(*shape) for shape in ((2, 5), (5, 2), (2, 5), (7, 2)))
    tensors = {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    state = {f"lora_unet_x.{name}.weight": value for name, value in tensors.items()}
    save_file({**state, "lora_unet_x.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    (change,) = open_model(tmp_path / "a.safetensors").changes.values()
    got = change.read((7, 5), lambda: weight, torch.float32).dense()
    torch.testing.assert_close(got, 0.5 * (weight @ a2 @ a1 + b2 @ b1))


X = "lora_unet_x"
DOWN, UP = torch.ones(2, 3), torch.ones(4, 2)
REFUSED = {
    "half a pair": ({"lora_down.weight": DOWN}, r"lora_unet_x has no lora_up"),
    "other half": ({"lora_up.weight": UP}, r"has lora_up, and nothing that it goes with"),
    "no product": ({"lora_down.weight": DOWN, "lora_up.weight": UP.T.contiguous()}, "its parts do not belong together"),
    "alone": ({"alpha": torch.tensor(1.0)}, "has alpha, and nothing that it goes with"),
    "alpha": ({"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.ones(2)}, "alpha should be one number"),
    "infinite": (
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(float("inf"))},
        "or not finite",
    ),
    "T-LoRA": ({"q_layer.weight": DOWN, "p_layer.weight": UP}, "[pq]_layer.weight is not a tensor that a Kohya"),
    "two methods": (
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "diff": UP.clone()},
        "x.diff has no place next to",
    ),
    "integers": ({"lora_down.weight": DOWN.int(), "lora_up.weight": UP}, "holds I32 factors"),
    "reshaped": ({"reshape_weight": DOWN, "diff": UP}, "reshape_weight is not a tensor that a Kohya"),
    "IA3": ({"on_input": torch.tensor(1)}, "not the weight of IA3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    """What is incomplete or of a kind that is not read is refused by its name."""
    tensors, reason = REFUSED[case]
    save_file({f"{X}.{name}": value for name, value in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=reason):
        open_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (1.0, 0.5), (8.0, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_alpha(tmp_path: Path, alpha: float | None, scale: float, dtype: torch.dtype) -> None:
    tensors = {f"{X}.lora_down.weight": DOWN, f"{X}.lora_up.weight": UP}
    if alpha is not None:
        tensors[f"{X}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, tmp_path / "a.safetensors")
    (change,) = open_model(tmp_path / "a.safetensors").changes.values()
    assert torch.equal(change.read((4, 3), lambda: torch.zeros(4, 3), torch.float32).dense(), scale * UP @ DOWN)
    (change,) = open_model(tmp_path / "a.safetensors", 6.0).changes.values()
    assert torch.equal(change.read((4, 3), lambda: torch.zeros(4, 3), torch.float32).dense(), 3 * UP @ DOWN)
