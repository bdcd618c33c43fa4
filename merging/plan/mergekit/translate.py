"""A recipe of mergekit as one of ours: the same models, method and parameters in our schema, with the same lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merging.errors import nearest
from merging.plan.mergekit.chains import find_method
from merging.plan.mergekit.merges import MergeKeys, MergeSource, Translated, build_merge
from merging.plan.mergekit.methods import MethodSpec
from merging.plan.mergekit.models import Entry, read_model
from merging.plan.mergekit.parameters import check_names
from merging.plan.mergekit.reading import Reading
from merging.plan.mergekit.schema import MODEL, MODULE, extensions, top
from merging.plan.mergekit.slices import build_slices, levels_above
from merging.plan.mergekit.tokenizer import put_tokenizer
from merging.plan.recipe import DTYPES
from merging.plan.recipe_document import Keys, RecipeDocument

__all__ = ["translate"]


def translate(document: RecipeDocument, folder: Path, lenient: bool = False) -> tuple[RecipeDocument, list[str]]:
    """Return a recipe of mergekit in our schema, and remarks.

    Args:
        document: the document in mergekit's schema.
        folder: the folder to which its relative paths are relative.
        lenient: whether keys and values that mergekit ignores are ignored, with a remark each, and not refused.

    Returns:
        The document in our schema, whose values have the lines of mergekit's, and the remarks.

    Raises:
        OptionError: for what mergekit does not know or would ignore, with the line and the nearest name.
    """
    reading = Reading(document, lenient)
    values = reading.check_keys((), "a recipe", top())
    built = _read_merge(reading, values, folder)
    _put_types(reading, values, built)
    for key in ("name", *extensions()):
        if key in values:
            built.put(key, values[key], document.origin((key,)))
    put_tokenizer(reading, values, built, folder)
    return RecipeDocument(built.values, {**built.origins, (): document.origin(())}), reading.notices


def _read_merge(reading: Reading, values: dict[str, Any], folder: Path) -> Translated:
    method = values.get("merge_method")
    if not isinstance(method, str):
        problem = "the recipe has no merge_method" if method is None else f"merge_method = {method!r:.80}: no name"
        raise reading.error(("merge_method",), f"{problem}: write merge_method: linear, or another")
    spec = find_method(reading, method)
    given = [key for key in ("models", "slices", "modules") if values.get(key) is not None]
    if len(given) != 1:
        at: Keys = (given[1],) if given else ()
        found = " and ".join(given) or "none"
        raise reading.error(at, f"a recipe has one of models, slices and modules, and here is {found}")
    check_names(reading, spec, ("parameters",), of_model=False)
    base = None if values.get("base_model") is None else read_model(reading, ("base_model",), folder)
    if given == ["modules"]:
        return _build_modules(reading, spec, base, folder)
    build = build_slices if given == ["slices"] else _build_models
    return build(reading, spec, base, folder)


def _build_modules(reading: Reading, spec: MethodSpec, base: Entry | None, folder: Path) -> Translated:
    """Return the merge of ``modules``: of several, each gives the blocks of the stack that it names."""
    modules = []
    names = list(reading.mapping(("modules",), "modules"))
    for name in names:
        above: Keys = ("modules", name)
        values = reading.check_keys(above, "a module", MODULE)
        check_names(reading, spec, (*above, "parameters"), of_model=False)
        if (values.get("models") is None) == (values.get("slices") is None):
            raise reading.error(above, "a module has either models or slices")
        if values.get("slices") is None:
            module = _build_models(reading, spec, base, folder, above)
        else:
            module = build_slices(reading, spec, base, folder, above, named=name if len(names) > 1 else "")
        modules.append((name, module, reading.document.origin(above)))
    if not modules:
        raise reading.error(("modules",), "modules is empty")
    # what is behind all blocks belongs to the decoder, and comes from the last part of a stack
    (_, joined, origin), *others = sorted(modules, key=lambda each: "decoder" in each[0])
    for name, module, at in others:
        around, inside, stack = Translated(), Translated(), Translated()
        around.put("model", joined.values, origin, joined)
        around.put("layers", f"{name}=0:0", at)
        inside.put("model", module.values, at, module)
        inside.put("layers", name, at)
        stack.put_list("stack", [(around.values, origin, around), (inside.values, at, inside)], at)
        joined, origin = stack, at
    return joined


def _build_models(reading: Reading, spec: MethodSpec, base: Entry | None, folder: Path, above: Keys = ()) -> Translated:
    """Return the merge of ``models``, of the module that ``above`` leads to."""
    sources: list[MergeSource] = []
    for index, item in enumerate(reading.items((*above, "models"), "models")):
        keys: Keys = (*above, "models", index)
        if not isinstance(item, dict):
            raise reading.error(keys, f"models should be mappings, as in - model: NAME, and here is {item!r:.80}")
        values = reading.check_keys(keys, "a model", MODEL)
        if values.get("model") is None:
            raise reading.error(keys, "this entry of models names no model: write - model: NAME")
        model = read_model(reading, (*keys, "model"), folder)
        sources.append(MergeSource(keys, model, model))
    if spec.base == "ignored" and base is not None and all(each.model != base for each in sources):
        reading.note(
            ("base_model",), f"base_model is not merged by {spec.name}; mergekit counts it as one more model here"
        )
    own = None if base is None else MergeSource(("base_model",), base, base)
    return build_merge(reading, spec, sources, own, MergeKeys((*above, "models"), ("base_model",), levels_above(above)))


def _put_types(reading: Reading, values: dict[str, Any], built: Translated) -> None:
    """Add ``out_dtype``, or else ``dtype``; we compute in float32 or better whatever these are."""
    for key in ("dtype", "out_dtype"):
        value = values.get(key)
        if value is None:
            continue
        name = str(value).removeprefix("torch.")
        if name not in DTYPES:
            hint = nearest(name, DTYPES) or f": use {', '.join(DTYPES)}"
            raise reading.error((key,), f"{key} = {value!r:.80}: is no type of weights{hint}")
        built.put("dtype", name, reading.document.origin((key,)))
    if "dtype" in built.values:
        _type_merges(built.values, built.values["dtype"])


def _type_merges(values: dict[str, Any], dtype: str) -> None:
    """Give the merges in a stack the type of the output, so that their results are rounded once.

    An adapter on its model is no merge of the recipe: it is rounded to the type of the model, as in mergekit.
    """
    for part in values.get("stack", ()):
        model = part["model"] if isinstance(part["model"], dict) else {}
        _type_merges(model, dtype)
        if "models" in model and model.get("as") != "model":
            model["dtype"] = dtype
