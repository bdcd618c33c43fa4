"""A mixture as one LoRA of any rank, in the folder that PEFT loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from merging.errors import OptionError
from merging.hub.open_model import open_model
from merging.maths.delta import LowRank
from merging.maths.linalg import even, safe_ratio, squared_norm, truncate
from merging.output.licences import licence_sentence, source_of, strictest
from merging.output.markdown import card, prose, sources_listed
from merging.output.model_card import HUB_ID
from merging.output.peft_config import NO_VARIANTS, SAVED, lora_config
from merging.plan import PORTABLE_RANKS
from merging.recycling.experts import Expert
from merging.recycling.places import Place
from merging.recycling.problem import Mixed, Problem
from merging.sources.stored import DTYPE_NAMES
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter
from merging.version import __version__

__all__ = ["Folded", "fold", "write_adapter"]

_PREFIX = "base_model.model."
_STEM = "adapter_model"


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """One low-rank change a module, all of one ``rank`` when written, and the share of energy each one has lost."""

    deltas: Mapping[str, LowRank]
    rank: int
    lost: Mapping[str, float]
    kept: float
    """Share of the whole mixture's energy (its squared norm) that is kept."""

    @property
    def expert(self) -> Expert:
        """The folded adapter, to be measured."""
        return Expert("folded", self.deltas)


def fold(mixed: Mixed, problem: Problem, modules: Sequence[str], rank: int | None) -> Folded:
    """Fold a mixture: exactly, at the rank that it has, or truncated to ``rank`` in the best way there is.

    Ranks whose coefficient is zero cost nothing. The base itself folds to zeros on ``modules``. A rank that was not
    asked for is raised, by zeros, to the next that every server takes.
    """
    exact: dict[str, LowRank] = {}
    for name, delta in mixed.mixture(problem).deltas(mixed.coefficients).items() if mixed.experts else ():
        used = (delta.up != 0).any(0) & (delta.down != 0).any(1)
        kept = LowRank(delta.up[:, used], delta.down[used], delta.shape, delta.transposed)
        exact[name] = truncate(kept, min(*delta.shape))[0]
    if not exact:
        exact = {name: _nothing(problem.model.places[name]) for name in modules}
    needed = max(1, *(delta.rank for delta in exact.values()))
    wanted = rank or next((step for step in PORTABLE_RANKS if step >= needed), needed)
    cut = {name: truncate(delta, wanted) for name, delta in exact.items()}
    energies = {name: float(squared_norm(delta)) for name, delta in exact.items()}
    gone = sum(energies[name] * lost for name, (_, lost) in cut.items())
    lost = {name: share for name, (_, share) in cut.items() if share > 0}
    return Folded(
        {name: delta for name, (delta, _) in cut.items()}, wanted, lost, 1 - safe_ratio(gone, sum(energies.values()))
    )


def _nothing(place: Place) -> LowRank:
    return LowRank(torch.zeros(place.outputs, 0), torch.zeros(0, place.inputs), place.shape, place.transposed)


def write_adapter(
    folded: Folded, problem: Problem, base: str, experts: Sequence[Expert], folder: Path, told: str
) -> None:
    """Write weights, config and card into a folder. ``told`` is what the card says of how it was made and what it is.

    Raises :class:`~merging.errors.OutputError` for what the disk refuses.
    """
    dtype = problem.model.dtype
    tensors: dict[str, Tensor] = {}
    for name, delta in folded.deltas.items():
        place = problem.model.places[name]
        down, up = _padded(even(delta, dtype), folded.rank)
        module = _PREFIX + name.removesuffix(".weight")
        if place.kind == "embedding":
            tensors |= {f"{module}.lora_embedding_A": down, f"{module}.lora_embedding_B": up}
        else:
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise OptionError(f"the mixture does not fit into {dtype}: run it with --dtype float32")
    outs = [OutputTensor(name, DTYPE_NAMES[dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = TensorWriter(folder, _STEM, outs, {"merging_version": __version__}, None)
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor.contiguous().flatten())
        writer.finish()
    finally:
        writer.close()
    stated = next((expert.base for expert in experts if expert.base), base)
    config = _config(folded, problem, stated)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(experts, stated, told), encoding="utf-8")


def _padded(delta: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - delta.rank
    return pad(delta.down, (0, 0, 0, missing)), pad(delta.up, (0, missing))


def _config(folded: Folded, problem: Problem, base: str) -> dict[str, Any]:
    """PEFT's config: one rank, alpha equal to it, the modules in full, no variants."""
    places = problem.model.places
    return lora_config(
        rank=folded.rank,
        target_modules=(name.removesuffix(".weight") for name in folded.deltas),
        base_model_name_or_path=base,
        task_type=problem.model.task_type,
        fan_in_fan_out=any(places[name].transposed and places[name].kind == "linear" for name in folded.deltas),
        **NO_VARIANTS,
        **SAVED,
    )


def _card(experts: Sequence[Expert], base: str, told: str) -> str:
    """The README of the output: metadata that the Hub reads, what it was made of, and what the report says of it."""
    sources = [source_of(open_model(expert.path)) for expert in experts if expert.path]
    licence = strictest([each.licence for each in sources])
    facts: dict[str, Any] = {"base_model": base} if HUB_ID.fullmatch(base) and not Path(base).exists() else {}
    facts |= {"base_model_relation": "adapter", "library_name": "peft", **({"license": licence} if licence else {})}
    facts["tags"] = ["merge", "lora", "recycled"]
    made = sources_listed(sources) or "- a LoRA trained on the examples"
    return card(facts, "Recycled adapter", [prose(told), "Mixed of", made, prose(licence_sentence(licence))])
