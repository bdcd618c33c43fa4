"""A recipe of mergekit as one of ours: the same models, method and parameters in our schema, with the same lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merging.errors import nearest
from merging.plan.mergekit.chains import defaults_of, find_method
from merging.plan.mergekit.methods import MethodSpec
from merging.plan.mergekit.models import Entry, read_model
from merging.plan.mergekit.parameters import Levels, Stated, check_names, read_parameters
from merging.plan.mergekit.reading import Reading
from merging.plan.mergekit.schema import MODEL, extensions, top
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
    translated = _Translation(reading, folder)
    translated.read(values)
    return RecipeDocument(translated.values, {**translated.origins, (): document.origin(())}), reading.notices


class _Translation:
    """The recipe of ours while it is made: its values, and the line of each by its keys."""

    def __init__(self, reading: Reading, folder: Path) -> None:
        self.reading = reading
        self.folder = folder
        self.values: dict[str, Any] = {}
        self.origins: dict[Keys, str] = {}

    def put(self, key: str, value: Any, keys: Keys) -> None:
        """Add a field, with the line of the value at the keys."""
        self.values[key] = value
        self.origins[key,] = self.reading.document.origin(keys)

    def read(self, values: dict[str, Any]) -> None:
        """Translate the recipe, whose keys are known."""
        reading = self.reading
        method = values.get("merge_method")
        if not isinstance(method, str):
            problem = "the recipe has no merge_method" if method is None else f"merge_method = {method!r:.80}: no name"
            raise reading.error(("merge_method",), f"{problem}: write merge_method: linear, or another")
        spec = find_method(reading, method)
        given = [key for key in ("models", "slices", "modules") if values.get(key)]
        if len(given) != 1:
            at: Keys = (given[1],) if given else ()
            found = " and ".join(given) or "none"
            raise reading.error(at, f"a recipe has one of models, slices and modules, and here is {found}")
        self.read_models(method, spec)
        self.read_types(values)
        for key in extensions():
            if key in values:
                self.put(key, values[key], (key,))
        for key in ("tokenizer_source", "tokenizer", "chat_template"):
            if values.get(key) is not None:
                self.put(key.removesuffix("_source"), values[key], (key,))

    def read_types(self, values: dict[str, Any]) -> None:
        """Translate ``out_dtype``, or else ``dtype``; we compute in float32 or better whatever these are."""
        for key in ("dtype", "out_dtype"):
            value = values.get(key)
            if value is None:
                continue
            name = str(value).removeprefix("torch.")
            if name not in DTYPES:
                hint = nearest(name, DTYPES) or f": use {', '.join(DTYPES)}"
                raise self.reading.error((key,), f"{key} = {value!r:.80}: is no type of weights{hint}")
            self.put("dtype", name, (key,))

    def read_models(self, method: str, spec: MethodSpec) -> None:
        """Translate ``models``."""
        reading = self.reading
        entries: list[tuple[Keys, Entry]] = []
        for index, item in enumerate(reading.items(("models",), "models")):
            keys: Keys = ("models", index)
            if not isinstance(item, dict):
                raise reading.error(keys, f"models should be mappings, as in - model: NAME, and here is {item!r:.80}")
            values = reading.check_keys(keys, "a model", MODEL)
            if values.get("model") is None:
                raise reading.error(keys, "this entry of models names no model: write - model: NAME")
            entries.append((keys, read_model(reading, (*keys, "model"), self.folder)))
        base = None if reading.value(("base_model",)) is None else read_model(reading, ("base_model",), self.folder)
        self.merge(method, spec, entries, base)

    def merge(self, method: str, spec: MethodSpec, entries: list[tuple[Keys, Entry]], base: Entry | None) -> None:
        """Add the merge of these models by the method."""
        reading = self.reading
        if spec.base == "required" and base is None:
            raise reading.error(("merge_method",), f"{method} needs base_model, the model that the others start from")
        for keys in [*((*keys, "parameters") for keys, _ in entries), ("parameters",)]:
            check_names(reading, method, spec, keys, of_model=keys != ("parameters",))
        merged = entries if spec.base == "ignored" else [each for each in entries if each[1] != base]
        self.check_count(method, spec, len(merged))
        if spec.base == "ignored" and base is not None and all(each != base for _, each in entries):
            reading.note(
                ("base_model",), f"base_model is not merged by {method}; mergekit counts it as one more model here"
            )
        stated = read_parameters(
            reading, method, spec, Levels([(*keys, "parameters") for keys, _ in merged], [("parameters",)])
        )
        models = [entry for _, entry in merged]
        origins = [reading.document.origin((*keys, "model")) for keys, _ in merged]
        if spec.first and base is not None:
            models, base = [base, *models], None
            origins.insert(0, reading.document.origin(("base_model",)))
        self.put("models", models, ("models",))
        self.origins.update({("models", index): origin for index, origin in enumerate(origins)})
        self.put("method", spec.chain, ("merge_method",))
        if base is not None:
            self.put("base", base, ("base_model",))
        self.state_parameters(spec, stated, base is not None)

    def check_count(self, method: str, spec: MethodSpec, count: int) -> None:
        """Refuse a number of models that the method does not merge. Raises OptionError."""
        least, most = spec.models
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if least == most else f"at least {least}"
            noun = "model" if wanted == "1" else "models"
            extra = "" if spec.base == "ignored" else ", without its base"
            raise self.reading.error(("models",), f"{method} merges {wanted} {noun}{extra}, and here are {count}")

    def state_parameters(self, spec: MethodSpec, stated: dict[str, Stated], based: bool) -> None:
        """Add the parameters: given ones, and others that differ from our defaults."""
        fixed: dict[str, Any] = dict(spec.fixed)
        if spec.base == "optional" and based:
            fixed["space"] = "changes"
        if spec.chain == "ties" and stated["ties.density"].value == 1:
            fixed.pop("ties.scope")  # where nothing is trimmed it has no effect
        defaults = defaults_of(spec.chain)
        parameters = {}
        for name, each in stated.items():
            if each.keys is None and each.value == defaults[name]:
                continue
            parameters[name] = each.value
            self.origins["parameters", name] = self.reading.document.origin(each.keys or ("merge_method",))
        link = f"{spec.chain}." if "+" not in spec.chain else ""
        for name, value in fixed.items():
            if name in parameters or link + name in parameters:
                continue
            self.origins["parameters", name] = self.reading.document.origin(("merge_method",))
            parameters[name] = value
        if parameters:
            self.put("parameters", parameters, ("parameters",))
