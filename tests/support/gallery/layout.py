"""One layout of adapters: the files that a program writes, and the weights that they make of a base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Draw", "Formula", "Kind", "Layout", "Part", "State"]

State = dict[str, Tensor]
Shape = tuple[int, ...]
Draw = Callable[..., Tensor]
"""A source of random tensors of a shape."""

Formula = Callable[[Tensor], Tensor]
"""The new weight, in float64, for the old one."""

Kind = Callable[[Draw, Shape], tuple[State, Formula]]
"""The tensors of a module by what follows its stem in the file, and what they make of a weight of a shape."""


@dataclass(frozen=True)
class Part:
    """Rows of a tensor of the base, from ``start`` on, with the shape that a module has in the adapter."""

    name: str
    shape: Shape
    start: int = 0
    kind: Kind | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of adapters.

    ``modules`` are the parts of the base by the stems of their modules in the file; a dot at the end tells a stem from
    another part of the same module. ``sizes`` are the full sizes of tensors with several parts, and ``shared`` are
    tensors of no module. ``dialect``, ``family`` and ``shown`` are how the file is recognised: its format, the family
    of its model, and its trainer.
    """

    trainer: str
    model: str
    version: str
    dialect: str
    family: str
    shown: str
    modules: Mapping[str, Part]
    kind: Kind
    sizes: Mapping[str, Shape] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    tags: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    weights: str = "lora.safetensors"
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    needs_base: bool = False

    @property
    def name(self) -> str:
        """The words by which a test or a row of the table is found."""
        return ", ".join(each for each in (self.trainer, self.model, self.version) if each)

    def row(self, facts: Mapping[str, Any]) -> str:
        """Return the layout's row in the table of the documentation, for the facts that `merge inspect` names."""
        held = {"factors": "as factors", "full tensors": "in full"}
        read = " and ".join(words for form, words in held.items() if form in facts["read_as"])
        return " | ".join(
            [f"| {self.trainer}", self.model, self.version, self.dialect, _shown(facts, "family"),
             _shown(facts, "trainer"), f"{read}{', with its base' if self.needs_base else ''} |"]
        )  # fmt: skip

    def write(self, folder: Path) -> tuple[Path, Path, State]:
        """Write the adapter and its base. Return their paths, and the weights that the adapter makes of the base."""
        generator = torch.Generator().manual_seed(len(self.name))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) * 0.3

        sizes = {part.name: part.shape for part in self.modules.values()} | dict(self.sizes)
        base = {name: draw(*shape) + 0.1 for name, shape in sizes.items()}
        wanted = {name: value.double() for name, value in base.items()}
        tensors = dict(self.shared)
        for stem, part in self.modules.items():
            found, formula = (part.kind or self.kind)(draw, part.shape)
            tensors |= {f"{stem.rstrip('.')}.{leaf}": value for leaf, value in found.items()}
            rows = slice(part.start, part.start + part.shape[0])
            wanted[part.name][rows] = formula(wanted[part.name][rows].clone())
        save_file({name: value.contiguous() for name, value in base.items()}, folder / "base.safetensors")
        return self._write_adapter(folder, tensors), folder / "base.safetensors", wanted

    def _write_adapter(self, folder: Path, tensors: State) -> Path:
        adapter = folder / "adapter"
        adapter.mkdir()
        if self.weights.endswith(".bin"):
            torch.save(tensors, adapter / self.weights)
        else:
            held = {name: value.contiguous() for name, value in tensors.items()}
            save_file(held, adapter / self.weights, dict(self.header) or None)
        if self.config is not None:
            (adapter / "adapter_config.json").write_text(json.dumps(self.config))
        if self.tags:
            (adapter / "README.md").write_text(f"---\ntags: {json.dumps(self.tags)}\n---\n# A LoRA\n")
        for name in self.files:
            (adapter / name).write_text("{}")
        return adapter if self.config is not None or self.tags else adapter / self.weights


def _shown(facts: Mapping[str, Any], fact: str) -> str:
    """Return a fact and the evidence for it, in words."""
    if facts[f"{fact}_evidence"] is None:
        return "unknown"
    return f"{facts[fact]}: {facts[f'{fact}_evidence']}".replace("_", r"\_")
