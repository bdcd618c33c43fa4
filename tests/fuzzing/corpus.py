"""Valid files to begin with, as PEFT, LyCORIS, diffusers, transformers and torch write them: tiny, always the same."""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fuzzing.weights import BITS, Weights
from support.tiny import CONFIG, fine_tune, model, save

__all__ = ["QUICK", "Adapted", "Corpus", "gathered"]

QUICK = ("LoHa", "LoKr", "VeRA", "OFT", "MiSS", "IA3", "BOFT", "SHiRA", "trainable tokens", "KaSA", "BD-LoRA")
"""The types of PEFT's that a short run begins with."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """An adapter: what it is called, the folder of a base that it fits, its weights, and its config if it has one."""

    name: str
    base: str
    weights: Weights
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Valid files. ``folder`` holds the bases; what is harmed lies in memory."""

    folder: Path
    peft: list[Adapted] = field(default_factory=list)
    diffusion: list[Adapted] = field(default_factory=list)
    packs: list[Adapted] = field(default_factory=list)
    files: list[Weights] = field(default_factory=list)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    pickles: list[bytes] = field(default_factory=list)


def gathered(folder: Path, cases: Iterable[str] | None = None) -> Corpus:
    """A corpus whose bases lie in a folder. ``cases`` are the types of PEFT's in it; by default all, and diffusers'."""
    made = Corpus(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _peft(made, cases)
        _lycoris(made)
        if cases is None:
            _pipelines(made)
    _packs(made)
    _files(made)
    _pickles(made)
    return made


def _peft(made: Corpus, cases: Iterable[str] | None) -> None:
    from support import peft_types
    from support.adapters import peft
    from support.architectures import build

    settings: dict[str, dict[str, Any]] = {
        "LoRA": {},
        "rsLoRA patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 3}},
        "DoRA": {"use_dora": True},
        "PiSSA": {"init_lora_weights": "pissa"},
        "OLoRA": {"init_lora_weights": "olora"},
        "LoRA saved": {"modules_to_save": ["lm_head"], "bias": "all"},
        "LoRA tokens": {"trainable_token_indices": [1, 2, 3]},
        "LoRA bias": {"lora_bias": True},
    }
    architectures = {}
    for name, more in settings.items():
        folder = made.folder / "adapters" / name
        base = "llama-biases" if name == "LoRA bias" else "llama"
        chosen = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], **more)
        peft.get_peft_model(build(base, 0, torch.float32), chosen).save_pretrained(folder)
        architectures[name] = base
    for name in peft_types.CASES if cases is None else cases:
        peft_types.make(made.folder / "adapters" / name, name)
        architectures[name] = peft_types.CASES[name][0]
    for name, architecture in architectures.items():
        folder = made.folder / "adapters" / name
        weights = Weights.read((folder / "adapter_model.safetensors").read_bytes())
        config = json.loads((folder / "adapter_config.json").read_text())
        made.peft.append(Adapted(name, architecture, weights, config))
    for architecture in sorted({*architectures.values()}):
        build(architecture, 0, torch.float32).save_pretrained(made.folder / architecture)
        made.configs[architecture] = json.loads((made.folder / architecture / "config.json").read_text())


def _packs(made: Corpus) -> None:
    """Adapters, and a model, as `merge compress` writes them, in every coding."""
    from merging.compression import compress

    tuned = save(made.folder / "tuned", fine_tune(model(layers=2, width=16), 1))
    save(made.folder / "tiny", model(layers=2, width=16))
    settings: list[tuple[str, str, dict[str, Any]]] = [
        ("adapters/LoRA", "llama", {"method": "ternary"}),
        ("adapters/LoRA", "llama", {"method": "ternary", "coding": "bitmap", "density": 0.5}),
        ("adapters/LoRA", "llama", {"method": "bands", "bands": "1@8,1@4,*@2"}),
        (str(tuned), "tiny", {"method": "bands", "base": made.folder / "tiny"}),
        (str(tuned), "tiny", {"method": "ternary", "base": made.folder / "tiny"}),
    ]
    for number, (of, base, more) in enumerate(settings):
        path = made.folder / f"pack{number}.safetensors"
        compress(made.folder / of, path, **more)
        made.packs.append(Adapted(path.stem, base, Weights.read(path.read_bytes())))


def _lycoris(made: Corpus) -> None:
    """One file of each method of LyCORIS, for a module of a U-Net."""
    from lycoris import modules

    layers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(12, 16),
        "convolution": lambda: nn.Conv2d(12, 16, 3, padding=1),
    }
    methods: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
        "LoCon": (modules.LoConModule, {}),
        "LoCon DoRA": (modules.LoConModule, {"weight_decompose": True}),
        "LoHa": (modules.LohaModule, {}),
        "LoKr": (modules.LokrModule, {"lora_dim": 1}),
        "LoKr full": (modules.LokrModule, {"full_matrix": True}),
        "IA3": (modules.IA3Module, {}),
        "GLoRA": (modules.GLoRAModule, {}),
        "OFT": (modules.DiagOFTModule, {"constraint": 0.01, "rescaled": True}),
        "BOFT": (modules.ButterflyOFTModule, {"lora_dim": 4}),
    }
    tucker = {"LoCon": modules.LoConModule, "LoHa": modules.LohaModule, "LoKr": modules.LokrModule}
    for kind, layer in layers.items():
        base = layer()
        module = "mid_block.attentions.0.proj_in"
        state = {f"unet.{module}.{name}": value.detach().clone() for name, value in base.state_dict().items()}
        (made.folder / f"{kind}.safetensors").write_bytes(_of(state).file())
        chosen = dict(methods)
        if kind == "convolution":
            chosen |= {f"{name} Tucker": (cls, {"use_tucker": True, "lora_dim": 1}) for name, cls in tucker.items()}
        for name, (cls, settings) in chosen.items():
            torch.manual_seed(0)
            trained = cls("x", layer(), **{"lora_dim": 2, "alpha": 2, **settings})
            flat = f"lora_unet_{module.replace('.', '_')}"
            tensors = {f"{flat}.{part}": value.detach() for part, value in trained.state_dict().items()}
            weights = _of(tensors)
            weights.metadata = {
                "ss_network_module": "lycoris.kohya",
                "ss_base_model_version": "sd_v1",
                "ss_v2": "False",
            }
            made.diffusion.append(Adapted(f"{name} {kind}", f"{kind}.safetensors", weights))


def _pipelines(made: Corpus) -> None:
    """LoRA files of diffusion models in the names of several programs, and the models."""
    from support.diffusion_models import build, components, factors, state_of

    for name in ("sd", "sdxl", "flux"):
        pipeline = build(name)
        tensors = {key: value.contiguous() for key, value in state_of(pipeline).items()}
        save_file(tensors, made.folder / f"{name}.safetensors")
        for part, network in components(pipeline).items():
            modules = {
                each: tuple(m.weight.shape)
                for each, m in network.named_modules()
                if isinstance(m, (nn.Linear, nn.Conv2d))
            }
            names = dict(list(modules.items())[:: max(1, len(modules) // 4)])
            flat = {
                "unet": "lora_unet",
                "transformer": "lora_transformer",
                "text_encoder": "lora_te1",
                "text_encoder_2": "lora_te2",
            }
            spelled = {
                "Kohya": {f"{flat[part]}_{key.replace('.', '_')}": (shape, 1.0) for key, shape in names.items()},
                "diffusers": {f"{part}.{key}": (shape, None) for key, shape in names.items()},
            }
            if not part.startswith("text"):
                spelled["ComfyUI"] = {f"diffusion_model.{key}": (shape, 2.0) for key, shape in names.items()}
            for style, chosen in spelled.items():
                path = factors(made.folder / "factors.safetensors", chosen)
                weights = Weights.read(path.read_bytes())
                if style == "diffusers":
                    swap = {".lora_down.": ".lora_A.", ".lora_up.": ".lora_B."}
                    weights.tensors = {_swapped(key, swap): value for key, value in weights.tensors.items()}
                    weights.metadata = {
                        "format": "pt",
                        "lora_adapter_metadata": json.dumps({f"{part}.r": 2, f"{part}.lora_alpha": 4}),
                    }
                made.diffusion.append(Adapted(f"{style} {name} {part}", f"{name}.safetensors", weights))


def _swapped(name: str, swap: dict[str, str]) -> str:
    for old, new in swap.items():
        name = name.replace(old, new)
    return name


def _of(tensors: dict[str, Tensor]) -> Weights:
    from safetensors.torch import save

    return Weights.read(save({name: value.contiguous() for name, value in tensors.items()}))


def _files(made: Corpus) -> None:
    """A checkpoint, files of every type and of odd shapes, and one of many small tensors."""
    made.files.append(_of(fine_tune(model(layers=2, width=4, vocab=6), 1)))
    chance = random.Random(0)
    every = {f"a.{kind}": (kind, (2, 4), chance.randbytes(bits)) for kind, bits in BITS.items()}
    made.files.append(Weights(every, {"format": "pt", "note": "é\u2028"}))
    shapes = {"scalar": (), "empty": (0,), "wide": (0, 5, 7), "deep": (1,) * 9, "é.模型": (3,)}
    odd = {name: ("I8", shape, bytes(3 if shape == (3,) else 0 if 0 in shape else 1)) for name, shape in shapes.items()}
    made.files.append(Weights(odd))
    made.files.append(Weights({f"layers.{i}.weight": ("F16", (1,), b"\0\0") for i in range(60)}))
    made.files.extend(each.weights for each in made.peft[:4])


def _pickles(made: Corpus) -> None:
    state = model(layers=1, width=4, vocab=6)
    tied = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    odd = {
        "view": torch.arange(12.0).reshape(3, 4).T, "half": torch.ones(2, dtype=torch.float16), "n": torch.tensor(3),
        "expanded": torch.ones(1).expand(5), "empty": torch.empty(0, 2), "parameter": nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    for saved in (state, tied, odd, {"state_dict": state, "epoch": 3}, [1, 2], {"a": {"b": torch.ones(2)}}):
        stream = io.BytesIO()
        torch.save(saved, stream)
        made.pickles.append(stream.getvalue())
    stream = io.BytesIO()
    torch.save(state, stream, _use_new_zipfile_serialization=False)
    made.pickles.append(stream.getvalue())
    made.configs["tiny"] = {**CONFIG, "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 12, "dtype": "float32"}
