"""Adapters as PEFT trains, saves, loads and merges them, on tiny models of real architectures."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from support.architectures import DECODER, build, tiny

__all__ = [
    "LLAMA",
    "QUIRKS",
    "State",
    "Trained",
    "assert_close",
    "baked",
    "base_state",
    "change_of",
    "copied",
    "deep_base",
    "edit_config",
    "edit_tensors",
    "llama_adapters",
    "peft",
    "quiet",
    "reload",
    "save_base",
    "train",
    "trained",
]

LLAMA = ["q_proj", "k_proj", "up_proj"]
"""Targets of three shapes, one of them square."""

QUIRKS = [
    # PEFT 0.21 asks transformers 5 for an attribute that has a new name
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # and takes the bias of a lora_B for a factor that FSDP has cut
    pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor.*lora_B\.bias"),
    # and says that it saves the embedding along with the factors on it
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
"""Warnings of PEFT's that call for nothing; every other one stays an error."""

State = dict[str, Tensor]


def save_base(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """One of the tiny architectures on disk."""
    build(name, 0, dtype).save_pretrained(folder)
    return folder


def deep_base(folder: Path, layers: int = 4, **settings: Any) -> Path:
    """A tiny Llama on disk, deep enough that LiNeS has several factors."""
    torch.manual_seed(7)
    tiny("LlamaConfig", "LlamaForCausalLM", DECODER, num_hidden_layers=layers, **settings)().save_pretrained(folder)
    return folder


def reload(folder: Path) -> PreTrainedModel:
    """The model of a folder by the class its config names; a missing or unexpected tensor is an error."""
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not {kind: keys for kind, keys in report.items() if keys}
    return model.eval()


def base_state(folder: Path) -> State:
    """All tensors of a model as transformers names them in memory."""
    return {name: value.clone() for name, value in reload(folder).state_dict().items()}


def train(folder: Path, base: Path, seed: int, targets: Sequence[str] | str, **config: Any) -> Path:
    """An adapter that PEFT made and saved: random numbers in the place of training, none of them zero.

    ``dtype`` among the settings is the type it is saved in, ``pickle`` saves adapter_model.bin.
    """
    dtype, pickle = config.pop("dtype", None), config.pop("pickle", False)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": targets, **config}
    model = peft.get_peft_model(reload(base), peft.LoraConfig(**settings))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                noise = torch.randn(value.shape, generator=random)
                value.copy_(value * (1 + 0.2 * noise) if "magnitude" in name else value + 0.1 * noise)
    model.save_pretrained(folder)
    if pickle:
        torch.save(peft.get_peft_model_state_dict(model), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    if dtype is not None:
        edit_tensors(folder, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Fixtures of a module live outside of the marks of its tests: the same warning, ignored for them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".is_gradient_checkpointing. is deprecated")
        yield


def llama_adapters(folder: Path) -> Path:
    """A folder with a tiny Llama (base) and adapters of it: plain, dora, pissa."""
    with quiet():
        save_base(folder / "base", "llama")
        train(folder / "plain", folder / "base", 1, LLAMA)
        train(folder / "dora", folder / "base", 2, LLAMA, use_dora=True)
        train(folder / "pissa", folder / "base", 3, LLAMA, init_lora_weights="pissa")
    return folder


def copied(llama: Path, folder: Path, name: str = "plain") -> Path:
    """One of those adapters, to be changed."""
    return Path(shutil.copytree(llama / name, folder))


def baked(base: Path, adapter: Path) -> State:
    """What PEFT makes of base and adapter: it loads without missing or unexpected keys, and merges."""
    model = peft.PeftModel.from_pretrained(reload(base), adapter)
    weights = peft.load_peft_weights(str(adapter))
    result = peft.set_peft_model_state_dict(model, weights)
    assert not result.unexpected_keys
    held = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert held.keys() == {name for name in weights if not name.endswith(".base_layer.weight")}
    return {name: value.clone() for name, value in model.merge_and_unload().state_dict().items()}


def change_of(base: Path, adapter: Path) -> State:
    """What an adapter changes, by PEFT, in float64 and for every tensor of the model."""
    before = base_state(base)
    return {name: value.double() - before[name].double() for name, value in baked(base, adapter).items()}


def assert_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """The same names, and no element further off than the tolerance."""
    assert got.keys() == wanted.keys()
    off = {name: float((got[name].double() - wanted[name].double()).abs().max()) for name in wanted}
    wrong = {name: error for name, error in off.items() if not error <= tolerance}
    assert not wrong, wrong


@dataclass(frozen=True)
class Trained:
    """A base, adapters of it, and what each of them changes."""

    base: Path
    adapters: list[Path]
    changes: list[State]

    def plus(self, *weights: float, factor: Callable[[str], float] | None = None) -> State:
        """The base and the weighted sum of the changes, at each tensor times its factor, in float64."""
        wanted: State = {}
        for name, value in base_state(self.base).items():
            total = sum(weight * change[name] for weight, change in zip(weights, self.changes, strict=True))
            wanted[name] = value.double() + total * (factor(name) if factor else 1.0)
        return wanted


def trained(base: Path, *adapters: Path) -> Trained:
    return Trained(base, list(adapters), [change_of(base, adapter) for adapter in adapters])


def edit_config(folder: Path, **fields: Any) -> Path:
    """Replace fields of an adapter's config; None removes one."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def edit_tensors(folder: Path, edit: Any) -> Path:
    """Replace an adapter's tensors by what ``edit`` makes of them."""
    path = folder / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in edit(load_file(path)).items()}, path, {"format": "pt"})
    return folder
