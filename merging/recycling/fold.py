"""Fold a mixture into one LoRA of any rank, and write it as a folder for PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn.functional import pad

from merging.errors import OptionError, option
from merging.hub.open_model import open_model
from merging.maths.delta import LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import balance_terms, squared_norm, truncate
from merging.maths.sums import safe_ratio
from merging.output.licences import licence_sentence, source_of, strictest
from merging.output.markdown import card, prose, sources_listed
from merging.output.model_card import HUB_ID
from merging.output.peft_config import NO_VARIANTS, SAVED, lora_config
from merging.plan import PORTABLE_RANKS
from merging.recycling.hooks import HookPoint
from merging.recycling.pool_adapters import Expert
from merging.recycling.problem import Problem, WeightedAdapters
from merging.sources.dtypes import DTYPE_NAMES
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter
from merging.version import __version__

__all__ = ["FoldedLora", "fold", "write_adapter"]

_PREFIX = "base_model.model."
_STEM = "adapter_model"


@dataclass(frozen=True, slots=True, eq=False)
class FoldedLora:
    """One low-rank change a module.

    Attributes:
        deltas: The changes by weight.
        rank: The rank of all changes when they are written.
        lost: The share of its energy (squared norm) that a change lost, where it lost any.
        kept: The share of the whole mixture's energy that is kept.
    """

    deltas: Mapping[str, LowRank]
    rank: int
    lost: Mapping[str, float]
    kept: float

    @property
    def expert(self) -> Expert:
        """The folded adapter, to be measured."""
        return Expert("folded", self.deltas)


def fold(mixed: WeightedAdapters, problem: Problem, modules: Sequence[str], rank: int | None) -> FoldedLora:
    """Fold a mixture into one low-rank change a module.

    Args:
        mixed: The adapters at their coefficients. Ranks whose coefficient is zero are dropped.
        problem: The task, with the network.
        modules: The weights on which the base without adapters folds to zeros.
        rank: The rank to truncate to, by singular values. By default nothing is truncated, and the rank is padded with
            zeros to the next rank that every server takes.
    """
    exact: dict[str, LowRank] = {}
    for name, delta in mixed.mixture(problem).deltas(mixed.coefficients).items() if mixed.experts else ():
        used = (delta.up != 0).any(0) & (delta.down != 0).any(1)
        kept = LowRank(delta.up[:, used], delta.down[used], delta.shape, delta.transposed)
        exact[name] = truncate(kept, min(*delta.shape))[0]
    if not exact:
        exact = {name: _zero(problem.model.hook_points[name]) for name in modules}
    needed = max(1, *(delta.rank for delta in exact.values()))
    wanted = rank or next((step for step in PORTABLE_RANKS if step >= needed), needed)
    cut = {name: truncate(delta, wanted) for name, delta in exact.items()}
    energies = {name: float(squared_norm(delta)) for name, delta in exact.items()}
    gone = sum(energies[name] * lost for name, (_, lost) in cut.items())
    lost = {name: share for name, (_, share) in cut.items() if share > 0}
    return FoldedLora(
        {name: delta for name, (delta, _) in cut.items()}, wanted, lost, 1 - safe_ratio(gone, sum(energies.values()))
    )


def _zero(point: HookPoint) -> LowRank:
    return LowRank(torch.zeros(point.outputs, 0), torch.zeros(0, point.inputs), point.shape, point.transposed)


def write_adapter(
    folded: FoldedLora, problem: Problem, *, folder: Path, base: str, experts: Sequence[Expert], remark: str
) -> None:
    """Write weights, config and model card into a folder. ``remark`` is the card's sentence about the result.

    Raises :class:`~merging.errors.OutputError` where the disk refuses.
    """
    dtype = problem.model.dtype
    tensors: dict[str, Tensor] = {}
    for name, delta in folded.deltas.items():
        point = problem.model.hook_points[name]
        down, up = _pad(balance_terms(delta, dtype), folded.rank)
        module = _PREFIX + name.removesuffix(".weight")
        if point.kind == "embedding":
            tensors |= {f"{module}.lora_embedding_A": down, f"{module}.lora_embedding_B": up}
        else:
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise OptionError(f"the mixture does not fit into {dtype}: run it with {option('dtype', 'float32')}")
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
    (folder / "README.md").write_text(_card(experts, stated, remark), encoding="utf-8")


def _pad(delta: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - delta.rank
    return pad(delta.down, (0, 0, 0, missing)), pad(delta.up, (0, missing))


def _config(folded: FoldedLora, problem: Problem, base: str) -> dict[str, Any]:
    """Return PEFT's config, with the modules named in full."""
    points = problem.model.hook_points
    return lora_config(
        rank=folded.rank,
        target_modules=(name.removesuffix(".weight") for name in folded.deltas),
        base_model_name_or_path=base,
        task_type=problem.model.task_type,
        fan_in_fan_out=any(points[name].transposed and points[name].kind == "linear" for name in folded.deltas),
        **NO_VARIANTS,
        **SAVED,
    )


def _card(experts: Sequence[Expert], base: str, remark: str) -> str:
    """Return the README of the output: metadata for the Hub, the adapters that were mixed, and the report's verdict."""
    sources = [source_of(open_model(expert.path)) for expert in experts if expert.path]
    licence = strictest([each.licence for each in sources])
    facts: dict[str, Any] = {"base_model": base} if HUB_ID.fullmatch(base) and not Path(base).exists() else {}
    facts |= {"base_model_relation": "adapter", "library_name": "peft", **({"license": licence} if licence else {})}
    facts["tags"] = ["merge", "lora", "recycled"]
    made = sources_listed(sources) or "- a LoRA trained on the examples"
    return card(facts, "Recycled adapter", [prose(remark), "Mixed of", made, prose(licence_sentence(licence))])
