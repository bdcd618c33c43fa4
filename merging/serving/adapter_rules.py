"""Rules about the files of adapters, for all programs: factors must fit together, the config, and the base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from merging.errors import MergingError
from merging.hub.open_model import open_model
from merging.plan.inputs.task_heads import NO_HEADS, find_task_heads
from merging.plan.names.targets import adapter_targets
from merging.serving.peft import TASK_HEADS
from merging.serving.rules import SAVE_AGAIN, Rule
from merging.serving.subject import Subject
from merging.sources import Adapter
from merging.sources.changes import AddedBias
from merging.sources.checkpoint import Checkpoint, config_layers

__all__ = ["ADAPTER_RULES", "LORA_FILE_RULES"]

_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|block|blocks)\.([0-9]+)\.")
_PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
_MATES = (
    ("lora_A.weight", "lora_B.weight"), ("lora_B.weight", "lora_A.weight"),
    (".lora_down.", ".lora_up."), (".lora_up.", ".lora_down."),
    ("lora.down.", "lora.up."), ("lora.up.", "lora.down."),
)  # fmt: skip


def _factors(subject: Subject) -> Iterator[str]:
    if subject.method not in ("LORA", "ADALORA"):
        return
    for path, parts in subject.modules.items():
        for down, up in _PAIRS.items():
            if (down in parts) != (up in parts):
                yield f"{path} has no {up if down in parts else down}"
        if subject.stated.get("use_dora") and "lora_magnitude_vector" not in parts and "lora_A" in parts:
            yield f"{path} has no lora_magnitude_vector"
        # The factors of experts hold the ranks of all experts; block-diagonal factors hold the ranks of a block.
        if subject.stated.get("use_bdlora") or subject.stated.get("target_parameters"):
            continue
        for one, other in ((parts.get(down), parts.get(up)) for down, up in _PAIRS.items()):
            if one and other and (len(one.shape) < 2 or len(other.shape) < 2 or one.shape[0] != other.shape[1]):
                yield f"{path}: {list(one.shape)} and {list(other.shape)} do not multiply"


def _halves(subject: Subject) -> Iterator[str]:
    for name in subject.tensors:
        mates = {name.replace(one, other) for one, other in _MATES if one in name} - {name}
        yield from (f"{name} has no {mate}" for mate in mates if mate not in subject.tensors)


def _ranks(subject: Subject) -> Iterator[str]:
    if subject.config is None or subject.method != "LORA" or subject.stated.get("target_parameters"):
        return
    config = subject.settings
    for path, rank in subject.ranks.items():
        try:
            stated = config.pattern("rank_pattern", path, config.get("r", 8))
        except MergingError as error:
            yield str(error).removeprefix(f"{subject.name}: ")
            return
        if stated != rank:
            yield f"{path} has rank {rank}, the config says {stated}"


def _beyond(subject: Subject) -> Iterator[str]:
    count = 0 if subject.stated.get("layer_replication") else config_layers(subject.base) or 0
    for path in subject.modules if count else ():
        block = _BLOCK.search(path)
        if block and int(block[1]) >= count:
            yield f"{path}: the base has {count} blocks"


def _misfit(subject: Subject) -> Iterator[str]:
    base = _open(subject.base_path)
    if isinstance(base, Adapter):
        yield f"{base.path} is an adapter itself"
    elif base is not None:
        yield from _without_place(subject, base, biases=not subject.stated.get("lora_bias"))


def _biases_alone(subject: Subject) -> Iterator[str]:
    """Yield biases of factors on layers without biases, if all else fits the base."""
    base = _open(subject.base_path) if subject.stated.get("lora_bias") else None
    if isinstance(base, Checkpoint) and not any(_misfit(subject)):
        yield from _without_place(subject, base, biases=True)


def _without_place(subject: Subject, base: Checkpoint, biases: bool) -> Iterator[str]:
    """Yield the parts of an adapter, with or without the biases of its factors, that do not fit its base."""
    adapter = _open(subject.pinned)
    if not isinstance(adapter, Adapter):
        return
    changes = {name: each for name, each in adapter.changes.items() if biases or not isinstance(each, AddedBias)}
    placed = replace(adapter, changes=changes)
    # A head that the base lacks is new if the task needs one.
    heads = find_task_heads([placed], base, ()) if subject.stated.get("task_type") in TASK_HEADS else NO_HEADS
    try:
        adapter_targets([placed], heads.on_base(base), heads)
    except MergingError as error:
        yield str(error).removeprefix(f"{subject.pinned}: ")


def _open(path: str | Path | None) -> Adapter | Checkpoint | None:
    """Return the adapter or model at a path, None if it cannot be read."""
    try:
        return open_model(path, dequantize=True) if path is not None else None
    except MergingError:
        return None


def _unread(subject: Subject) -> Iterator[str]:
    try:
        open_model(subject.pinned)
    except MergingError as error:
        yield str(error).removeprefix(f"{subject.pinned}: ")


_MISFIT = Rule(
    "refuses", "it does not fit its base", _misfit, "take the base it was made for; for a new head, set task_type"
)
_BIASES = Rule(
    "warns", "factors have biases on layers without: PEFT runs them, and they cannot be merged", _biases_alone,
    "serve it with PEFT, unmerged",
)  # fmt: skip
_UNREAD = Rule("warns", "merge itself does not read this", _unread, "it may be served all the same, and not merged")

ADAPTER_RULES = (
    Rule("ignores", "blocks are adapted that the base does not have", _beyond, "take the base it was made for"),
    _MISFIT,
    Rule("refuses", "factors are missing or do not fit together", _factors, SAVE_AGAIN),
    Rule("refuses", "tensors and config differ in rank", _ranks, "take the config it was saved with"),
    _BIASES,
    _UNREAD,
)
"""Rules for PEFT's adapters in all programs."""

LORA_FILE_RULES = (Rule("refuses", "factors are missing", _halves, SAVE_AGAIN), _MISFIT, _UNREAD)
"""Rules for LoRA files of diffusion models in all programs."""
