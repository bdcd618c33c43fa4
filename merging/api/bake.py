"""Baking adapters into their base: the recipe of a full model, of the adapters alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from merging.api.arguments import check_entries, check_method, check_path, check_report
from merging.api.merge_files import Merged, merge_plan, merge_recipe, plan_for
from merging.api.options import MergeOptions
from merging.display.progress import Progress, resolve_progress
from merging.engine.resources import pick_devices
from merging.errors import InputError, OptionError, QuantizedError, option
from merging.hub.cards import stated_quantization
from merging.hub.open_model import open_model, require_full
from merging.maths.lazy_torch import torch
from merging.methods.contract.method import Method
from merging.object_stores.store_path import output_path
from merging.plan.as_trained import stated_format
from merging.plan.find_base import FoundBase, find_base
from merging.plan.inputs.adapter_tokenizer import GENERATION, adapter_folder, find_saved_tokenizer
from merging.plan.recipe import FIELDS, Entry, Recipe
from merging.plan.tokens.chat_templates import read_chat_template
from merging.sources import Adapter
from merging.sources.small_files import is_there, read_text
from merging.sources.tied_weights import is_table
from merging.type_checks import check_types

__all__ = ["BakeRecipe", "bake", "bake_recipe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeRecipe:
    """The recipe that bakes adapters into their base, and remarks on what was found for it."""

    recipe: Recipe
    notices: tuple[str, ...]


@check_types("method", "max_memory", "progress")
def bake(
    adapters: Sequence[Path | str],
    *,
    output: str | Path,
    method: str | Method | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    max_memory: int | str | None = None,
    overwrite: bool = False,
    stream: bool = False,
    progress: Progress | bool | None = None,
    resume: bool | None = None,
    report: str | Path | None = None,
    **options: Unpack[MergeOptions],
) -> Merged:
    """Bake adapters into their base: write a full model.

    The base is found from the adapters' configs: a path, the library's cache, or the Hub. For a quantised copy of a
    model its 16-bit twin is taken. Everything that the adapters trained goes along: embeddings, heads, modules saved in
    full, rows of tokens; and the first tokenizer that is saved with one of them, for whose tokens the base gets rows.

    Args:
        adapters: the adapters: paths, or names on the Hub.
        output: the output. A name ending in ``.safetensors`` is a single file, any other a folder.
        method: a method, or a chain as it is written. By default the changes are added up, each times its weight.
        device: ``cpu``, ``cuda`` for all such GPUs, ``cuda:0,1`` for some, ``mps``, ``xpu``, or ``auto``.
        threads: the number of threads; by default one for each processor core, as far as the memory allows.
        max_memory: the most memory to take, in bytes or as ``"500MB"``, above the memory of the imports.
        overwrite: whether an output that exists is replaced.
        stream: whether models of the Hub and of stores pass through the disk file by file, and are not kept in a cache.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.
        resume: whether a merge that stopped is gone on with, as for :func:`merging.merge`.
        report: a page to write of the merge, as for :func:`merging.merge`.
        **options: ``base``, for another base than the adapters state; ``as_trained`` (``"nf4"``, ``"fp4"``, ``"int8"``)
            for the base as bitsandbytes quantised it; and the other options of :func:`merging.merge`.

    Returns:
        The path and the kind of the output, its size, and remarks: the base that was found, and files that stay behind.

    Raises:
        MergingError: for adapters without a base that is found, and for everything that :func:`merging.merge` refuses.

    Example:
        >>> import merging
        >>> baked = merging.bake(["a"], base="base", output="baked")
        >>> baked.kind, baked.path.name
        ('model', 'baked')
    """
    progress = resolve_progress(progress)
    destination = output_path(check_path(output, "output"))
    prepared = bake_recipe(adapters, method, options)
    plan = plan_for(prepared.recipe, destination)
    return merge_plan(
        replace(plan, notices=(*prepared.notices, *plan.notices)),
        destination,
        devices=pick_devices(device, plan),
        threads=threads,
        max_memory=max_memory,
        overwrite=overwrite,
        stream=stream,
        progress=progress,
        resume=resume,
        report=check_report(report),
    )


def bake_recipe(adapters: object, method: str | Method | None, options: Mapping[str, Any]) -> BakeRecipe:
    """Return the recipe that bakes adapters into their base. Headers, configs and small files are read.

    Args:
        adapters: the adapters: a list of paths, or names on the Hub.
        method: the method; None for the sum of the changes.
        options: the recipe's options and the method's parameters by name.

    Raises:
        MergingError: for anything but adapters, options of merged adapters, and a base that is not found.
    """
    if method is not None:
        check_method(method)
    stated = {name: value for name, value in options.items() if value is not None}
    _refuse_idle(stated)
    names = [_check_name(each) for each in check_entries(adapters, "adapters")]
    if not names:
        raise OptionError("there is nothing to bake: name at least one adapter")
    opened = [_open_adapter(name, stated.get("lora_alpha")) for name in names]
    found = _add_base(stated, opened) if stated.get("base") is None else None
    notices = [found.notice] if found else []
    quantization = found.quantization if found and found.quantization else _stated_in_cards(opened)
    trained = found.trained if found and found.trained else stated_format(quantization or {})
    if trained is not None and not {"as_trained", "dequantise", "dequantize"} & stated.keys():
        notices.append(
            f"{option('as_trained', trained)} adds the change to {stated['base']} as it was quantised for the training"
        )
    if not {"tokenizer", "vocabulary"} & stated.keys():
        notices += _add_tokenizer(stated, names, opened)
    if method is None:
        method = "linear" if len(names) == 1 and stated.keys() <= FIELDS else "task_arithmetic"
    recipe = merge_recipe(names, method, {**stated, "kind": "model"})
    if recipe.as_trained is not None and quantization is not None and isinstance(recipe.base, str):
        opened_base = open_model(recipe.base, dequantize=recipe.dequantise)
        base = require_full(opened_base, recipe.base, option("base"))
        filled = recipe.as_trained.fill(quantization, list(base.tensors))
        recipe = recipe.model_copy(update={"as_trained": filled})
    return BakeRecipe(recipe=recipe, notices=tuple(notices))


def _refuse_idle(options: Mapping[str, Any]) -> None:
    """Refuse options of merged adapters. Raises :class:`~merging.errors.OptionError`."""
    for name in ("kind", "as", "format", "rank", "experts"):
        if name in options:
            raise OptionError(f"baking makes a full model: leave {option(name)} out, or use merge")


def _check_name(entry: Entry) -> str:
    if not isinstance(entry, str):
        raise OptionError("baking takes adapters by their paths or names: for recipes and stacks of layers, use merge")
    return entry


def _open_adapter(name: str, alpha: float | None) -> Adapter:
    try:
        model = open_model(name, alpha)
    except QuantizedError:  # only full models are quantised
        model = None
    if not isinstance(model, Adapter):
        raise InputError(f"{name}: is a full model, and baking takes adapters: full models are merged by merge")
    return model


def _add_base(options: dict[str, Any], adapters: Sequence[Adapter]) -> FoundBase:
    """Add the base that adapters state to the options, and return it."""
    as_it_is = options.get("quantize") in ("keep", "none")
    found = find_base(adapters, bool(as_it_is or options.get("dequantise") or options.get("dequantize")))
    options["base"] = found.name
    if found.dequantize:
        options.pop("dequantize", None)
        options["dequantise"] = True
    return found


def _stated_in_cards(adapters: Sequence[Adapter]) -> Mapping[str, Any] | None:
    """Return the config of bitsandbytes that the card of an adapter states, None if none does."""
    folders = [folder for adapter in adapters if (folder := adapter_folder(adapter)) is not None]
    return next((stated for each in folders if (stated := stated_quantization(each / "README.md"))), None)


def _add_tokenizer(options: dict[str, Any], names: Sequence[str], adapters: Sequence[Adapter]) -> list[str]:
    """Add the first saved tokenizer to the options, else a chat template, and a vocabulary as large as trained tables.

    Returns remarks on files of the adapters that are not taken.
    """
    folders = [adapter_folder(adapter) for adapter in adapters]
    saved = [(name, found) for name, each in zip(names, adapters, strict=True) if (found := find_saved_tokenizer(each))]
    notices = [
        f"{adapter.path}: its {GENERATION} stays behind: the output has the base's"
        for adapter, folder in zip(adapters, folders, strict=True)
        if folder and is_there(folder / GENERATION) and not (saved and saved[0][1].adapter is adapter)
    ]
    if saved:
        name, first = saved[0]
        options["tokenizer"] = name
        taken = first.tokens, read_chat_template(first.as_checkpoint)
        return notices + [
            f"{other.adapter.path}: its tokenizer stays behind: it differs from the tokenizer of {first.adapter.path}"
            for _, other in saved[1:]
            if (other.tokens, read_chat_template(other.as_checkpoint)) != taken
        ]
    if any(is_table(target) for adapter in adapters for target in adapter.changes):
        options["vocabulary"] = "largest"
    template = next((path for folder in folders if folder and is_there(path := folder / "chat_template.jinja")), None)
    if template is not None and "chat_template" not in options:
        options["chat_template"] = read_text(template)
        notices.append(f"the chat template comes from {template.parent.name}/{template.name}")
    return notices
