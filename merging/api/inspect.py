"""The contents of a model or adapter: read from its headers, and from its values on request."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merging.api.block_table import describe_model_blocks
from merging.api.recipe_records import record_of
from merging.display.tables import Table, Tabular, count_notices
from merging.errors import FormatError, MergingError, option
from merging.hub.cards import stated_tags
from merging.hub.open_model import open_model
from merging.maths.layers import Stacks
from merging.output.header import RECIPE_KEY
from merging.plan.provenance import names_of
from merging.serving.contents import FILES
from merging.serving.subject import Subject, open_subject
from merging.sources import Adapter, Checkpoint, Model
from merging.sources.changes import Change
from merging.sources.model_families import family_by_config, family_by_names, family_by_statements
from merging.sources.packs.codings import Packed
from merging.sources.small_files import parse_json
from merging.sources.stored import Stored
from merging.sources.tied_weights import WITH_HEAD, embeddings_among, is_head, text_config
from merging.sources.trainers import Attribution, trainer_of

__all__ = ["Inspection", "inspect"]

_FLAT = re.compile(r"(lora_[a-z]+[0-9]?|lycoris|oft_unet)_(?:.*_[0-9]+_)?(.+)")
"""A flat name of Kohya's: the component, and the module behind the last number."""

_FORMATS = {".safetensors": "safetensors", ".gguf": "GGUF"}
"""The formats of weights files by their endings; all others are PyTorch's."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""The names that configs have for the number of experts in a block."""


class Inspection(Tabular, dict[str, Any]):
    """Facts about a model or adapter by name, as :func:`inspect` returns them."""

    __slots__ = ()

    def _display_table(self) -> Table:
        facts = {name: value for name, value in self.items() if name not in ("path", "notices", "by_block")}
        rows = [
            (name.replace("_", " "), _plain(value)) for name, value in facts.items() if value not in (None, [], {}, "")
        ]
        return Table(f"Inspection of {self.get('path')}", rows=rows, notes=count_notices(self.get("notices", ())))


def _plain(value: Any) -> str:
    """Return a fact as text on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {each:,}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def inspect(path: str | Path, *, values: bool = False, blocks: bool = False) -> Inspection:
    """Return facts about a model or adapter.

    Args:
        path: a file or folder, or a name on the Hub.
        values: whether values are read too, to find tensors with NaN or infinities.
        blocks: whether the blocks are listed that weights by block name.

    Returns:
        Plain values by name, such as ``kind``, ``base``, ``rank``, ``dtypes``, ``layers``, ``parameters``, ``bytes``
        and ``notices``, which are sentences for people. ``family`` is the family of models, and ``trainer`` the program
        that trained an adapter, ``unknown`` where nothing shows it; ``family_evidence`` and ``trainer_evidence`` name
        the names, entry, config or card that show it. ``merged_by`` and ``merged_from`` are the method and the models
        of the merge that wrote the files, if one did, and ``recipe`` is the place of its recipe: a header,
        ``mergekit_config.yml``, or a model card. Weights that are quantised in a simple way count as the ordinary ones
        that ``dequantize`` makes of them; ``dequantised`` is their number, and ``quantised`` has their types on
        the disk. Tensors of packs count as they are read; ``packed_bytes`` is their size in the file. ``nonfinite`` are
        the tensors with NaN or infinities, with ``values`` only. ``by_block`` has the blocks, their elements, and the
        lists of numbers that fit the model, with ``blocks`` only.

    Raises:
        MergingError: for files that are not understood.
    """
    model = open_model(path, dequantize=True)
    subject = open_subject(str(model.origin or path))
    if isinstance(model, Adapter):
        facts = _inspect_adapter(model, subject, values)
    else:
        facts = _inspect_checkpoint(model, subject, values)
    if blocks:
        facts["by_block"] = _list_blocks(model)
    return Inspection(facts)


def _list_blocks(model: Model) -> dict[str, Any]:
    """Return the blocks of a model or adapter."""
    if isinstance(model, Checkpoint):
        shapes = {name: stored.shape for name, stored in model.tensors.items() if stored.floating}
        return describe_model_blocks(shapes, Stacks.from_names(model.tensors, single=model.single))
    changed = {target: change.shape for target, change in model.changes.items() if not change.optional}
    return describe_model_blocks(changed, Stacks.from_names(model.changes, complete=False))


def _inspect_adapter(adapter: Adapter, subject: Subject, values: bool) -> dict[str, Any]:
    changes = [change for change in adapter.changes.values() if not change.optional]
    tensors = _tensors_of(changes)
    ranks = sorted({change.rank for change in changes if change.rank})
    components, modules = _split_modules(changes)
    origin = _read_origin(subject)
    forms = Counter("factors" if change.low_rank else "full tensors" for change in changes)
    scales = {getattr(change, "scale", None) for change in changes} - {None}
    return {
        "path": str(adapter.path),
        "kind": "pack of a model" if adapter.of_model else f"adapter ({adapter.dialect})",
        "about": adapter.about,
        "base": adapter.base,
        **_attribute("family", _find_family(adapter, subject), "unknown"),
        **_attribute("trainer", _find_trainer(subject, merged=origin["merged_by"] is not None), "unknown"),
        **origin,
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "scales": sorted(scales),
        "targets": len(changes),
        "parts": components if adapter.dialect in ("Kohya", "diffusers") else {},
        "read_as": dict(forms),
        "modules": modules,
        "needs_base": sorted({change.needs_base for change in changes if change.needs_base}),
        **_sizes(tensors, Stacks.from_names(adapter.changes, complete=False), values),
        "packed_bytes": _packed_bytes(tensors.values()),
        "notices": list(adapter.notices),
    }


def _find_family(adapter: Adapter, subject: Subject) -> Attribution | None:
    """Return the family of the model that an adapter is for: names are stronger evidence than statements."""
    if adapter.dialect == "XLabs":
        return Attribution("Flux.1", "the names of XLabs")
    shapes = {target: change.shape for target, change in adapter.changes.items()}
    return (
        family_by_names(shapes, subject.metadata)
        or family_by_config(adapter.config, subject.base)
        or family_by_statements(subject.metadata, adapter.base)
    )


def _find_trainer(subject: Subject, merged: bool) -> Attribution | None:
    """Return the program that trained an adapter, or merged it; a card that is not understood states nothing."""
    if merged:
        return Attribution("merging", "the recipe of its merge")
    tags: list[str] = []
    if subject.folder is not None:
        try:
            tags = stated_tags(subject.folder / "README.md")
        except MergingError:
            tags = []
    config = subject.config if subject.kind == "adapter" else None
    return trainer_of(subject.tensors, subject.metadata, config, tags=tags, files=subject.files)


def _attribute(fact: str, found: Attribution | None, unknown: str | None) -> dict[str, Any]:
    """Return a fact by its name, and the evidence for it."""
    return {fact: found.name if found else unknown, f"{fact}_evidence": found.evidence if found else None}


def _tensors_of(changes: Sequence[Change]) -> dict[str, Stored]:
    """Return the tensors of an adapter's file; tensors that modules share are there once."""
    named = {
        id(tensor): (f"{change.target} [{index}]", tensor)
        for change in changes
        for index, tensor in enumerate(change.tensors)
    }
    return dict(named.values())


def _split_modules(changes: Sequence[Change]) -> tuple[dict[str, int], list[str]]:
    """Return the number of targets in each component of a pipeline, and the last parts of the modules' names."""
    components: Counter[str] = Counter()
    names: set[str] = set()
    for change in changes:
        module = change.target.rpartition(".")[0] or change.target
        flat = _FLAT.fullmatch(module)
        components[flat[1] if flat else module.partition(".")[0]] += 1
        names.add(flat[2] if flat else module.rpartition(".")[2])
    return dict(components), sorted(names)


def _packed_bytes(tensors: Iterable[Stored]) -> int | None:
    """Return the size of a pack's tensors in its file; None for other tensors."""
    tensors = list(tensors)
    if not any(isinstance(stored, Packed) for stored in tensors):
        return None
    return sum(part.nbytes for stored in tensors for part in stored.made_of)


def _inspect_checkpoint(checkpoint: Checkpoint, subject: Subject, values: bool) -> dict[str, Any]:
    config, tensors = checkpoint.config, checkpoint.tensors
    codes = [stored.quantized for stored in tensors.values() if stored.quantized]
    embeddings = embeddings_among(tensors)
    architecture = next(iter(config.get("architectures") or []), None)
    parts = {id(part): part.nbytes for stored in tensors.values() for part in stored.made_of}
    return {
        "path": str(checkpoint.path),
        "kind": "checkpoint",
        "architecture": architecture or subject.stated.get("_class_name"),
        "type": config.get("model_type"),
        **_attribute("family", family_by_names({name: stored.shape for name, stored in tensors.items()}, {}), None),
        "library": checkpoint.library if subject.config is not None else None,
        "components": [name for name in checkpoint.components if name],
        **_read_origin(subject),
        "files": len(checkpoint.files),
        "format": _FORMATS.get(checkpoint.files[0].suffix, "PyTorch"),
        "quantised": dict(Counter(codes)),
        "dequantised": len(codes),
        "experts": _count_experts(config),
        "parameters": sum(stored.numel for stored in tensors.values()),
        "vocabulary": tensors[embeddings[0]].shape[0] if len(embeddings) == 1 else None,
        "head": _find_head(checkpoint) if embeddings else None,
        **_sizes(tensors, Stacks.from_names(tensors), values),
        "bytes": sum(parts.values()),
        "notices": _checkpoint_notices(subject, quantised=bool(codes)),
    }


def _checkpoint_notices(subject: Subject, quantised: bool) -> list[str]:
    notices = (
        [f"its weights are quantised, and read with {option('dequantize', True)} or {option('quantize', 'keep')}"]
        if quantised
        else []
    )
    findings = [each for each in FILES.findings(subject) if each.severity != "ok"]
    return [*notices, *(f"{each.what}: {each.where[0]}" for each in findings)]


def _count_experts(config: Mapping[str, Any]) -> int | None:
    """Return the number of experts in a block by the config, None where it states none."""
    text = text_config(config)
    stated = (text.get(key) for key in _EXPERTS)
    return next((number for number in stated if isinstance(number, int)), None)


def _find_head(checkpoint: Checkpoint) -> str | None:
    """Return the output head's name, or that it is tied, where the names or the config show it."""
    head = next((name for name in checkpoint.tensors if is_head(name)), None)
    architecture = str((checkpoint.config.get("architectures") or [""])[0])
    return head or ("tied to the embedding" if checkpoint.tied and architecture.endswith(WITH_HEAD) else None)


def _read_origin(subject: Subject) -> dict[str, Any]:
    """Return the method and the models of the merge that wrote the files, and the place of its recipe.

    The recipe is in the header, in mergekit's file, or on the model card; a recipe that is not understood is none.
    """
    try:
        record = record_of(subject)
        if record is None:
            return {"merged_by": None, "merged_from": [], "recipe": None}
        recipe = record.recipe(lenient=True)
    except MergingError:
        return {**_read_header(subject.metadata), "recipe": None}
    names = list(dict.fromkeys(names_of(recipe)))
    models = [name for name in names if name != recipe.base] or names
    return {"merged_by": recipe.method.chain, "merged_from": models, "recipe": record.where}


def _read_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the method and the models that a header names, although its method is not installed here."""
    try:
        recipe = parse_json(metadata.get(RECIPE_KEY, "{}"), "its recipe")
        models = [each for each in recipe.get("models", []) if isinstance(each, str)]
        return {"merged_by": recipe.get("method"), "merged_from": models}
    except (FormatError, TypeError):
        return {"merged_by": None, "merged_from": []}


def _sizes(tensors: Mapping[str, Stored], stacks: Stacks, values: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "tensors": len(tensors),
        "dtypes": dict(Counter(stored.dtype_name for stored in tensors.values()).most_common()),
        "layers": dict(stacks.lengths),
        "bytes": sum(stored.nbytes for stored in tensors.values()),
    }
    if values:
        facts["nonfinite"] = [name for name, stored in tensors.items() if stored.floating and not stored.finite()]
    return facts
