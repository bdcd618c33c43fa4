"""The tokenizer's files of a merged model, and the ids of tokens in its configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.plan.merge_plan import Plan
from merging.plan.tokens.matching import MatchedTokens
from merging.sources.small_files import LIST_LIMIT, is_there, read_json
from merging.sources.tied_weights import text_config
from merging.sources.tokenizers import TOKENIZER_FILES

__all__ = ["map_token_ids", "tokenizer_patterns", "written_files"]

_KEPT = ("special_tokens_map.json", "chat_template.*", "additional_chat_templates/*.jinja")
"""Files next to a rebuilt tokenizer.json that stay true; others repeat the former vocabulary."""

_IDS = ("_token_id", "_token_ids", "_token_index", "suppress_tokens")
"""Endings of the fields that hold ids of tokens."""

_ALWAYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_patterns(plan: Plan) -> tuple[str, ...]:
    """Return patterns of the tokenizer's files that are copied from its model's folder."""
    matched = plan.vocabulary.matched if plan.vocabulary else None
    patterns = TOKENIZER_FILES if matched is None or matched.rebuilt is None else _KEPT
    if plan.chat_template is None:
        return patterns
    return tuple(pattern for pattern in patterns if not pattern.startswith("chat_template"))


def written_files(plan: Plan) -> dict[str, str]:
    """Return the texts of files that are written instead of copied, by name: of tokenizer, template and ids."""
    matched = plan.vocabulary.matched if plan.vocabulary else None
    own, reference = plan.vocabulary.of if plan.vocabulary else plan.reference, plan.reference
    files: dict[str, str] = {}
    config = _read(own.folder if own else None, "tokenizer_config.json")
    changed = dict(config)
    if matched is not None and matched.rebuilt is not None:
        files["tokenizer.json"] = json.dumps(matched.rebuilt.content, ensure_ascii=False, indent=2)
        changed = matched.rebuilt.config(changed)
        if config:
            files["tokenizer_config.json"] = _dump(changed)
    if plan.chat_template is not None:
        files["chat_template.jinja"] = plan.chat_template
        if changed.pop("chat_template", None) is not None:
            files["tokenizer_config.json"] = _dump(changed)
    if matched is not None and own is not reference and own is not None and reference is not None:
        generation = _read(reference.folder, "generation_config.json")
        given = own.config | _read(own.folder, "generation_config.json")
        if generation:
            files["generation_config.json"] = _dump(map_token_ids(generation, given, matched))
    return files


def map_token_ids(fields: Mapping[str, Any], given: Mapping[str, Any], matched: MatchedTokens) -> dict[str, Any]:
    """Return a config with the ids that tokens have in the output.

    The model of the tokenizer states the id; else it is the id of the same token. A field whose token the output
    does not have is left out.
    """
    stated = {**text_config(given), **given}
    changed = dict(fields)
    for key, value in fields.items():
        if not key.endswith(_IDS):
            continue
        mapped = stated[key] if key in stated else _map(value, matched)
        if mapped is None and value is not None:
            del changed[key]
        else:
            changed[key] = mapped
    of_texts = "vocab_size" in fields or any(key in fields for key in _ALWAYS)
    return changed | {key: stated[key] for key in _ALWAYS if key in stated and of_texts}


def _map(value: Any, matched: MatchedTokens) -> Any:
    """Return an id, or a list of ids, of the same tokens; None if the output lacks one of them."""
    if isinstance(value, list):
        mapped = [_map(each, matched) for each in value]
        return None if None in mapped else mapped
    token = next((token for token, row in matched.reference.items() if row == value), None)
    return None if token is None else matched.tokens.get(token)


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    return read_json(folder / name, LIST_LIMIT) if folder and is_there(folder / name) else {}


def _dump(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, indent=2) + "\n"
