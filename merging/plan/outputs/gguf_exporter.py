"""A merged LoRA in the GGUF file that llama.cpp takes: by its names, experts stacked, queries and keys by heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merging.errors import InputError, option
from merging.maths.shapes import Shapes
from merging.maths.site import Site
from merging.plan.items import Constant, Item, Placing
from merging.plan.names.resolve import Resolver
from merging.plan.outputs.exporter import Changes, Exporter, is_experts
from merging.plan.recipe import AdapterFormat
from merging.sources import Checkpoint
from merging.sources.denoisers import is_denoiser
from merging.sources.gguf.architectures import ARCHITECTURES, Architecture, architecture_of_config
from merging.sources.gguf.model_config import heads_of
from merging.sources.stored import Stored
from merging.sources.tied_weights import text_config
from merging.storage.output_tensor import OutputTensor

__all__ = ["GgufExporter"]

_TABLES = ("token_embd", "output")


@dataclass(frozen=True, slots=True)
class _TargetPart:
    """The part of a target in one tensor of llama.cpp.

    ``stack`` is the number of an expert in its stack there, and ``expert`` the number in the target; None outside of
    stacks.
    """

    name: str
    module: str
    rows: slice
    inputs: int
    stack: int | None = None
    expert: int | None = None

    @property
    def outputs(self) -> int:
        return int(self.rows.stop - self.rows.start)


class GgufExporter(Exporter):
    """Lays out the items of a merged LoRA as llama.cpp does.

    Args:
        base: the base, whose config states the architecture and the number of heads.
        factored: the shapes of the targets that become factors.
        targets: the changes of each target.
        ranks: the rank of the factors of each.
        dtype_name: the type of every tensor.
        resolver: finds tensors in the base.

    Raises:
        InputError: for an architecture or a tensor that has no name in llama.cpp.
    """

    format = "gguf"
    header: AdapterFormat | None = "gguf"

    def __init__(
        self,
        base: Checkpoint | None,
        *,
        factored: Shapes,
        targets: Mapping[str, Changes],
        ranks: Mapping[str, int],
        dtype_name: str,
        resolver: Resolver | None,
    ) -> None:
        if base is None or resolver is None:
            raise InputError(
                f"a LoRA in the format of gguf has llama.cpp's names, which depend on the architecture: give the model "
                f"with {option('base')}"
            )
        self._base, self._resolver = base, resolver
        self._config = text_config(base.config)
        self._architecture = _find_architecture(base, self._config.get("model_type"))
        self._dtype_name = "F32" if dtype_name == "F64" else dtype_name
        self.ranks = dict(ranks)
        self._parts = {name: self._parts_of(name, targets[name], factored[name]) for name in factored}
        self._stacks: defaultdict[str, dict[int, _TargetPart]] = defaultdict(dict)
        for name, parts in self._parts.items():
            for part in parts:
                if part.stack is not None:
                    self._stacks[part.name][part.stack] = part
                    self._check_rank(name, part)

    def _parts_of(self, target: str, changes: Changes, shape: tuple[int, ...]) -> list[_TargetPart]:
        """Return the parts of a target in llama.cpp's tensors."""
        stacked = is_experts(changes)
        first = next(each for each in changes if each)
        transposed = first.is_transposed(shape) or first.kind == "embedding"
        outer, inner = (-1, -2) if transposed else (-2, -1)
        parts = []
        for stored, piece in self._resolver.holders(target):
            columns = piece.box[inner]
            if columns != slice(0, shape[inner]) or len(shape) > 2 + stacked:
                raise self._error(target, "is stored in another layout than llama.cpp's")
            rows, inputs = piece.box[outer], shape[inner]
            expert = piece.box[0].start if stacked else None
            name, module, stack = self._name(target, stored)
            if module in _TABLES and self._base.tied:
                raise self._error(target, "is embedding and head in one, and llama.cpp loads no factors on either")
            parts.append(_TargetPart(name, module, rows=rows, inputs=inputs, stack=stack, expert=expert))
        return parts

    def _name(self, target: str, stored: str) -> tuple[str, str, int | None]:
        """Return llama.cpp's name of a tensor on the disk, its module there, and the number of an expert."""
        plain = stored.replace("language_model.model.", "model.").replace("model.language_model.", "model.")
        found = self._architecture[1].name_in_gguf(plain)
        if found is not None and found[0].endswith(".weight"):
            return *found, None
        expert = self._architecture[1].expert_in_gguf(plain)
        if expert is None:
            raise self._error(target, f"has no name in llama.cpp's {self._architecture[0]}")
        return expert

    def _error(self, target: str, reason: str) -> InputError:
        return InputError(f"{target} {reason}: make a model with {option('kind', 'model')}, or leave it out")

    def _check_rank(self, target: str, part: _TargetPart) -> None:
        """Refuse experts of one stack with factors of several ranks."""
        ranks = {self.ranks[name] for name, parts in self._parts.items() for each in parts if each.name == part.name}
        if len(ranks) > 1:
            raise InputError(
                f"{target}: the experts of its layer have factors of the ranks {min(ranks)} to {max(ranks)}, and "
                f"llama.cpp stacks them: choose one rank with {option('rank')}"
            )

    def item(self, site: Site, changes: Changes, stored: Stored | None) -> Item:
        """Return the item of a target."""
        if site.name not in self._parts:
            raise InputError(
                f"{site.name} is changed in full, which LoRA files in the format of {self.format} do not hold: make a "
                f"model with {option('kind', 'model')}"
            )
        placings = tuple(self._placing(part, self.ranks[site.name]) for part in self._parts[site.name])
        outs = tuple(dict.fromkeys(out for each in placings for out in (each.down, each.up) if out))
        written = self.ranks[site.name] / self.rank
        return Item(site, changes, stored, outs, "factors", written=written, placings=placings)

    def _placing(self, part: _TargetPart, rank: int) -> Placing:
        down, up = self._factors(part, rank)
        permuted = self._architecture[1].permuted and part.module in ("attn_q", "attn_k")
        return Placing(
            down,
            up,
            part.rows,
            first=(part.stack or 0) * part.outputs,
            term=0,
            expert=part.expert,
            stack=part.stack,
            heads=heads_of(self._config, part.module) if permuted else 0,
            turned=part.module == "token_embd",
        )

    def _factors(self, part: _TargetPart, rank: int) -> tuple[OutputTensor, OutputTensor]:
        stack = (self._experts(part.name),) if part.stack is not None else ()
        lower = (part.inputs, rank) if part.module == "token_embd" else (*stack, rank, part.inputs)
        return (
            OutputTensor(f"{part.name}.lora_a", self._dtype_name, lower),
            OutputTensor(f"{part.name}.lora_b", self._dtype_name, (*stack, part.outputs, rank)),
        )

    def _experts(self, name: str) -> int:
        """Return the number of experts in a stack."""
        stated = next((self._config[key] for key in ("num_local_experts", "num_experts") if key in self._config), 0)
        return max(int(stated or 0), max(self._stacks[name]) + 1)

    def constants(self) -> tuple[Constant, ...]:
        """Return zeros for the experts that no adapter changes, in the stacks of the others."""
        found: list[Constant] = []
        for name, parts in self._stacks.items():
            some = next(iter(parts.values()))
            rank = next(self.ranks[target] for target, each in self._parts.items() if some in each)
            outs = self._factors(some, rank)
            for number in range(self._experts(name)):
                if number not in parts:
                    sizes = [out.shape[1] * out.shape[2] for out in outs]
                    found += [Constant(out, 0.0, number * size, size) for out, size in zip(outs, sizes, strict=True)]
        return tuple(found)

    def check(self, items: Sequence[Item]) -> None:
        """Accept all items: each was checked on its own."""


def _find_architecture(base: Checkpoint, model_type: object) -> tuple[str, Architecture]:
    found = architecture_of_config(model_type if isinstance(model_type, str) else None)
    if found is None:
        modules = (name.rpartition(".")[0] for name in base.tensors)
        if base.library == "diffusers" or (model_type is None and any(map(is_denoiser, modules))):
            raise InputError(
                f"{base.path}: is a diffusion model, and llama.cpp has none: leave {option('format', 'gguf')} out"
            )
        of = f"is of the type {str(model_type)[:40]!r}" if model_type else "has no config that states its type"
        raise InputError(
            f"{base.path}: {of}, and llama.cpp's names are known here of "
            f"{', '.join(sorted({each.model_type for each in ARCHITECTURES.values()}))}: leave "
            f"{option('format', 'gguf')} out, and convert the output with llama.cpp's convert_lora_to_gguf.py"
        )
    return found
