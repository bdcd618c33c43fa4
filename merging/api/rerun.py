"""Making an output once more from the recipe that it states."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.api.arguments import check_path, check_report
from merging.api.merge_files import Merged, default_destination, merge_plan, plan_for
from merging.api.recipe_records import RecipeRecord, read_record
from merging.display.progress import Progress, resolve_progress
from merging.engine.resources import pick_devices
from merging.errors import InputError, OptionError, nearest, option
from merging.hub.address import hub_address, local_path, path_of_name
from merging.hub.open_model import open_model
from merging.maths.lazy_torch import torch
from merging.object_stores.store_path import StorePath, output_path
from merging.plan import Plan
from merging.plan.provenance import describe_change, names_of, record_source
from merging.plan.recipe import Recipe
from merging.plan.recipe_document import Keys
from merging.plan.recipe_values import make_recipe, map_names
from merging.type_checks import check_types
from merging.version import __version__

__all__ = ["PlannedRerun", "compare_weights", "hash_weights", "plan_rerun", "rerun"]

_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class PlannedRerun:
    """A merge that is to be made once more.

    Attributes:
        path: the output that exists.
        record: the recipe that it states.
        plan: the plan, which reads the sources where they are now.
        shown: the plan that the new output's header describes, with the sources' names as they were.
        digests: hashes of the weights files that exist; None where they are not on this machine, or not wanted.
        changed: sentences that name the sources which differ from their records.
        notices: remarks for people.
    """

    path: Path
    record: RecipeRecord
    plan: Plan
    shown: Plan
    digests: tuple[bytes, ...] | None
    changed: tuple[str, ...]
    notices: tuple[str, ...]

    def compare(self, made: Path) -> str:
        """Return a remark that compares all weights of the new output with the old ones."""
        if self.digests is None:
            return ""
        if isinstance(made, StorePath):
            return f"{made} is in an object store, and is not compared with {self.path}"
        cause = "its sources changed" if self.changed else "another version or processor made it, or it was changed"
        return compare_weights(made, self.path, self.digests, cause)


@check_types("max_memory", "progress")
def rerun(
    path: str | Path,
    *,
    output: str | Path | None = None,
    sources: Mapping[str, str | Path] | None = None,
    allow_changed: bool = False,
    lenient: bool = False,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    stream: bool = False,
    progress: Progress | bool | None = None,
    resume: bool | None = None,
    report: str | Path | None = None,
) -> Merged:
    """Make an output once more from the recipe that it states.

    The sources are compared with the records in the output's header. The new weights are compared with the old ones
    byte by byte; ``notices`` of the result has the outcome.

    Args:
        path: the output: a folder or weights file, its model card, or its name on the Hub. Outputs of mergekit state
            their recipe too.
        output: the file or folder to write; by default as for :func:`~merging.merge`.
        sources: places of models that were moved, by their names in the recipe.
        allow_changed: whether sources may differ from their records.
        lenient: whether what mergekit ignores in its recipes is ignored, and not refused.
        device: ``cpu``, ``cuda`` for all such GPUs, ``cuda:0,1`` for some, ``mps``, ``xpu``, or ``auto``.
        threads: the number of threads; by default one for each processor core, as far as the memory allows.
        max_memory: the most memory to take, in bytes or as ``"500MB"``, above the memory of the imports.
        overwrite: whether an output that exists is replaced.
        stream: whether models of the Hub and of stores pass through the disk file by file.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.
        resume: whether a merge that stopped is gone on with, as for :func:`merging.merge`.
        report: a page to write of the merge, as for :func:`merging.merge`.

    Raises:
        InputError: if the output states no recipe, or a source is missing or has changed.
        MergingError: for everything that :func:`~merging.merge` refuses.

    Example:
        >>> import merging
        >>> merged = merging.merge(["a", "b"], method="linear", output="first")
        >>> again = merging.rerun("first", output="second")
        >>> again.tensors == merged.tensors
        True
    """
    destination = None if output is None else output_path(check_path(output, "output"))
    planned = plan_rerun(path, destination, sources or {}, allow_changed=allow_changed, lenient=lenient)
    made = destination or default_destination(planned.plan.recipe)
    merged = merge_plan(
        planned.plan,
        made,
        devices=pick_devices(device, planned.plan),
        threads=threads,
        max_memory=max_memory,
        overwrite=overwrite,
        stream=stream,
        progress=resolve_progress(progress),
        resume=resume,
        report=check_report(report),
        shown=planned.shown,
    )
    return replace(merged, notices=(*planned.notices, *merged.notices, *filter(None, [planned.compare(made)])))


def plan_rerun(
    path: str | Path,
    destination: Path | None,
    sources: Mapping[str, str | Path],
    *,
    allow_changed: bool = False,
    lenient: bool = False,
    hashes: bool = True,
) -> PlannedRerun:
    """Read the recipe of an output, find its sources, and plan the merge.

    ``hashes`` says whether the weights that exist are hashed. For the other arguments see :func:`rerun`.
    """
    record = read_record(path)
    recipe = record.recipe(lenient)
    places = dict(_find_sources(recipe, record, {name: str(place) for name, place in sources.items()}))
    changed = _check_sources(recipe, record, places, allow_changed)

    def locate(name: str, keys: Keys) -> str:
        if "chat_template" in keys:
            raise InputError(
                f"{record.where}: states the chat template by the name of a file, {name}, which is no part of the "
                f"output: write the template's text in its place, or run the recipe by itself"
            )
        return places.get(name, name)

    plan = plan_for(make_recipe(map_names(recipe.to_dict(), locate), record.where), destination)
    place = local_path(str(path))
    ours = bool(record.versions) and place.exists()
    return PlannedRerun(
        path=place,
        record=record,
        plan=plan,
        digests=hash_weights(place) if ours and hashes else None,
        shown=_describe(plan, recipe, {place: name for name, place in places.items()}),
        changed=tuple(changed),
        notices=(*changed, *_notices(record, places)),
    )


def _find_sources(recipe: Recipe, record: RecipeRecord, given: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each name of the recipe, and the name by which its model is opened now.

    A relative path is looked for in the working folder, and then next to the output. Raises
    :class:`~merging.errors.MergingError` for a model that is in neither, and for a place of an unknown name.
    """
    names = tuple(dict.fromkeys(names_of(recipe)))
    for name in given:
        if name not in names:
            raise OptionError(f"{record.where}: the recipe names no {name}{nearest(name, names)}: {', '.join(names)}")
    for name in names:
        if name in given:
            yield name, given[name]
            continue
        found = [place for place in _places(name, record) if hub_address(place) or local_path(place).exists()]
        if not found:
            tried = " or ".join(dict.fromkeys(str(Path(place).absolute()) for place in _places(name, record)))
            raise InputError(
                f"{name}, a source of {record.where}, is not at hand: it was looked for as {tried}. If it was "
                f"moved, give its place: {option('source', f'{name}=PATH')}"
            )
        alike = (place for place in found if _change(name, place, record, recipe) is None)
        yield name, next(alike, found[0])


def _places(name: str, record: RecipeRecord) -> list[str]:
    """Return the names by which a model may be found."""
    relative = record.folder is not None and not Path(name).expanduser().is_absolute() and "://" not in name
    beside = [str(record.folder.parent / name)] if relative and record.folder else []
    return [name, *beside]


def _change(name: str, place: str, record: RecipeRecord, recipe: Recipe) -> str | None:
    """Return the difference of a model from its record; None if nothing shows one."""
    then = record.sources.get(name)
    if then is None:
        return None
    now = record_source(name, open_model(place, recipe.lora_alpha, recipe.dequantise))
    return describe_change(then, now)


def _check_sources(recipe: Recipe, record: RecipeRecord, places: Mapping[str, str], allow_changed: bool) -> list[str]:
    """Compare the sources with their records, and return remarks. Raises :class:`~merging.errors.InputError`."""
    changes = {name: _change(name, place, record, recipe) for name, place in places.items()}
    changed = [f"{places[name]} {change}" for name, change in changes.items() if change]
    if changed and not allow_changed:
        raise InputError(
            f"{'; '.join(changed)}: so the output would differ. If that is meant, use {option('allow_changed', True)}"
        )
    return changed


def _notices(record: RecipeRecord, places: Mapping[str, str]) -> list[str]:
    """Return remarks on missing keys of sources, on versions that differ, and on another device."""
    if not record.sources:
        unpinned = [name for name in places if (at := hub_address(name)) and at.revision is None]
        newest = f"; of {', '.join(unpinned)} the newest version is read" if unpinned else ""
        return [f"{record.where} states no keys of its sources, so that nothing shows whether they changed{newest}"]
    now = {"merging_version": __version__, "torch_version": torch.__version__}
    remarks = [
        f"{record.where} was written with {key.removesuffix('_version')} {then}, and this is {now[key]}: the bytes may "
        f"differ"
        for key, then in record.versions.items()
        if then != now[key]
    ]
    if record.device != "cpu":
        remarks.append(f"{record.where} was made on {record.device}: on another device the bytes may differ")
    return remarks


def _describe(plan: Plan, recipe: Recipe, names: Mapping[str, str]) -> Plan:
    """Return the plan with the names that the sources had, for the header and the card."""

    def rename(model: Any) -> Any:
        return replace(model, path=path_of_name(names[str(model.path)])) if str(model.path) in names else model

    sources = tuple(replace(each, model=names.get(each.model, each.model)) for each in plan.sources)
    base = None if plan.base is None else rename(plan.base)
    return replace(plan, recipe=recipe, sources=sources, models=tuple(map(rename, plan.models)), base=base)


def compare_weights(made: Path, path: Path, digests: tuple[bytes, ...], cause: str) -> str:
    """Return a remark that compares the weights of a new output with the hashes of a former one.

    ``cause`` is the likely cause of a difference. An output that cannot be read is in place all the same.
    """
    try:
        same = hash_weights(made) == digests
    except OSError as error:
        return f"warning: {made} is in place, and cannot be compared with {path}: {error.strerror or error}"
    if same:
        return f"{made} has the same bytes as {'before' if made == path else path}"
    return f"warning: {made} has other bytes than {path}: {cause}"


def hash_weights(path: Path) -> tuple[bytes, ...]:
    """Return a hash of the whole content of each weights file, in the order of their names."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    return tuple(map(_hash_file, files))


def _hash_file(file: Path) -> bytes:
    digest = hashlib.sha256()
    with os.fdopen(os_calls.open_regular(file), "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.digest()
