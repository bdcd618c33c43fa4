"""The tokenizer and chat template of a recipe of mergekit in our schema, which has the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merging.plan.mergekit.merges import Translated
from merging.plan.mergekit.models import read_model
from merging.plan.mergekit.reading import Reading
from merging.plan.mergekit.schema import TOKEN, TOKEN_SOURCE, TOKENIZER
from merging.plan.recipe_document import Keys

__all__ = ["put_tokenizer"]

_PRESETS = ("union", "base")


def put_tokenizer(reading: Reading, values: dict[str, Any], built: Translated, folder: Path) -> None:
    """Add ``tokenizer_source`` or ``tokenizer``, and ``chat_template``.

    Raises :class:`~merging.errors.OptionError` for both forms of a tokenizer, and for keys that have no meaning there.
    """
    source, tokenizer = values.get("tokenizer_source"), values.get("tokenizer")
    if source is not None and tokenizer is not None:
        raise reading.error(("tokenizer",), "a recipe has tokenizer or tokenizer_source, not both")
    if source is not None:
        stated: Any = _read_source(reading, ("tokenizer_source",), folder)
        built.put("tokenizer", stated, reading.document.origin(("tokenizer_source",)))
    elif tokenizer is not None:
        _put_settings(reading, built, folder)
    template = values.get("chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise reading.error(("chat_template",), f"chat_template should be text, and is {template!r:.80}")
        built.put("chat_template", template, reading.document.origin(("chat_template",)))


def _put_settings(reading: Reading, built: Translated, folder: Path) -> None:
    """Add the mapping of a tokenizer."""
    keys: Keys = ("tokenizer",)
    values = reading.check_keys(keys, "tokenizer", TOKENIZER)
    settings = {**values, "source": _read_source(reading, (*keys, "source"), folder, "union")}
    if "tokens" in values:
        tokens = reading.mapping((*keys, "tokens"), "tokens")
        settings["tokens"] = {token: _read_token(reading, (*keys, "tokens", token), folder) for token in tokens}
    origins = {at: each for at, each in reading.document.origins.items() if at[:1] == keys}
    built.put("tokenizer", settings, reading.document.origin(keys))
    built.origins.update(origins)


def _read_token(reading: Reading, keys: Keys, folder: Path) -> dict[str, Any]:
    row = reading.check_keys(keys, "a token", TOKEN)
    source = row.get("source")
    if isinstance(source, dict) and "kind" in source:
        inner = reading.check_keys((*keys, "source"), "a token's source", TOKEN_SOURCE)
        if inner.get("model") is not None:
            inner["model"] = _read_name(reading, (*keys, "source", "model"), folder)
        return {**row, "source": inner}
    return row if source is None else {**row, "source": _read_name(reading, (*keys, "source"), folder)}


def _read_source(reading: Reading, keys: Keys, folder: Path, default: str = "") -> str:
    value = reading.value(keys)
    if value is None and default:
        return default
    return value if value in _PRESETS else _read_name(reading, keys, folder)


def _read_name(reading: Reading, keys: Keys, folder: Path) -> str:
    """Return the model whose tokenizer is meant: of a model with an adapter, the model."""
    model = read_model(reading, keys, folder)
    return model if isinstance(model, str) else str(model["base"])
