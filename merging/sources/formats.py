"""All formats, collected from their readers: how each is read, and which are refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from merging.sources import DIALECTS
from merging.sources.loose_factors import FOREIGN
from merging.sources.peft.adapter_types import PEFT_TYPES, BaseNeed
from merging.sources.peft.unsupported_types import UNSUPPORTED
from merging.sources.quantized.quantized_weights import QUANTIZED, SIMPLE

__all__ = ["Format", "formats"]

_CHECKPOINTS = {
    "safetensors": "one file, shards with an index, or a variant of them (fp16)",
    "PyTorch": ".bin, .pt, .pth, and .ckpt of Lightning: read at their places, and no code in them is run",
    "GGUF": "files of llama.cpp, in shards too: F32, F16 and BF16 as they are, all else with --dequantize",
    "DCP": "folders of torch.distributed.checkpoint, in shards: the model in them, without the optimizer",
    "pipelines": "folders of diffusers and of sentence-transformers, component by component",
}
_PACKS = {
    "pack of an adapter": "by merge compress: its factors as signs or in a few bits, all else as it is",
    "pack of a model": "by merge compress: what it changed, as singular directions in a few bits, or as signs",
}
_PEFT = "Adapters of PEFT, by type"


@dataclass(frozen=True)
class Format:
    """One format: how its changes are held (``read``), and whether they need their base."""

    name: str
    group: str
    summary: str
    read: Literal["in full", "as factors", "mixed", "refused"]
    base: BaseNeed | Literal[""] = ""


def formats() -> Iterator[Format]:
    """Yield full checkpoints, LoRA files of diffusion models, and PEFT's types; refused formats close each group."""
    for name, summary in _CHECKPOINTS.items():
        yield Format(name, "Full checkpoints", summary, "in full")
    quantised = list(dict.fromkeys(QUANTIZED.values()))
    asked = ", ".join(kind for kind in quantised if kind in SIMPLE)
    yield Format(
        asked,
        "Full checkpoints",
        "quantised (FP8 also without scales); as ordinary numbers with --dequantize",
        "in full",
    )
    others = ", ".join(kind for kind in quantised if kind not in SIMPLE)
    reason = "quantised: merge the model it was made from, and quantise the result"
    yield Format(others, "Full checkpoints", reason, "refused")
    for dialect in DIALECTS:
        if dialect.name not in ("GGUF", "MLX", "PEFT", "pack"):
            yield Format(dialect.name, "LoRA files of diffusion models", dialect.summary, "mixed", "some")
    for name, summary in _PACKS.items():
        yield Format(name, "Packs, decoded as they are read", summary, "mixed", "some" if "adapter" in name else "no")
    for name, kind in PEFT_TYPES.items():
        if kind is not PEFT_TYPES.get("MISS") or name == "MISS":
            yield Format(name, _PEFT, kind.summary, "as factors" if kind.kept == "factors" else "in full", kind.base)
    refused: defaultdict[str, list[str]] = defaultdict(list)
    for name, why in UNSUPPORTED.items():
        refused[why].append(name)
    for why, names in refused.items():
        yield Format(", ".join(names), _PEFT, why, "refused")
    for dialect in DIALECTS:
        if dialect.name in ("GGUF", "MLX"):
            yield Format(dialect.name, "Adapters of other programs", dialect.summary, "mixed", "some")
    for program, remedy in FOREIGN.items():
        yield Format(program, "Adapters of other programs", remedy, "refused")
