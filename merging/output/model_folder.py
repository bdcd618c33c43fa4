"""The files next to a model's merged weights: config, tokenizer, license, and unmerged components."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.output.gguf_tokenizer import rebuild_tokenizer
from merging.output.model_card import model_card
from merging.output.tokenizer_files import map_token_ids, tokenizer_patterns, written_files
from merging.plan.inputs.adapter_tokenizer import GENERATION
from merging.plan.inputs.sentence_folders import modules_model
from merging.plan.inputs.tied_heads import scales_outputs
from merging.plan.merge_plan import Plan
from merging.sources import Checkpoint
from merging.sources.model_files import COMPANIONS, IN_PIPELINES
from merging.sources.sentence_modules import SENTENCE_FILES
from merging.sources.small_files import check_file, copy_file
from merging.sources.stored import holders_of
from merging.sources.tokenizers import TOKENIZER_FILES
from merging.sources.weight_files import find_weights

__all__ = ["check_companions", "companion_files", "companion_patterns", "copy_companions", "write_model_companions"]

_BLOCK = 1 << 24


def companion_patterns(plan: Plan) -> tuple[str, ...]:
    """Return patterns of the files that are copied from the reference's folder."""
    plain = (*TOKENIZER_FILES, *COMPANIONS)
    if plan.reference is None or not plan.reference.components:
        return plain
    return (*plain, *(f"*/{pattern}" for pattern in (*plain, *IN_PIPELINES)))


def write_model_companions(plan: Plan, folder: Path, weights: bool = True) -> list[str]:
    """Copy the model's other files from its base (or first model), and write its config and card.

    ``weights`` says whether the weights of components that are not merged are copied too. Returns remarks on missing
    files.
    """
    reference = plan.reference
    assert reference is not None
    (folder / "README.md").write_text(model_card(plan), encoding="utf-8")
    if reference.folder is None and not reference.config:
        return [
            f"{reference.path} is a bare file without a config, so the output has none: copy it from the model's folder"
        ]
    own = plan.vocabulary.of if plan.vocabulary else reference
    tokenizer = rebuild_tokenizer(own, folder)
    copy_companions(plan, folder)  # after it, since a chat template that was asked for replaces the file's
    parts = reference.components or {"": reference}
    for name, component in parts.items():
        if name in plan.kept:
            if weights:
                _copy_weights(component, folder / name)
        elif component.config:
            config = _model_config(plan, component.config)
            if plan.quantized is not None:
                config = plan.quantized.state_in(config, component)
            text = json.dumps(config, indent=2) + "\n"
            (folder / name / "config.json").write_text(text, encoding="utf-8")
    return [*_remarks(plan, reference, own), *([tokenizer] if tokenizer else [])]


def copy_companions(plan: Plan, folder: Path) -> None:
    """Copy the other files of the output: all of a model's, or the tokenizer of an adapter with its own tokens.

    Other adapters use the tokenizer of their base.
    """
    written = written_files(plan) if plan.output == "model" else {}
    for name, source in _companions(plan).items():
        if name not in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source, folder / name, source.parents[name.count("/")])
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")


def _remarks(plan: Plan, reference: Checkpoint, own: Checkpoint) -> list[str]:
    remarks = []
    place = reference.folder
    if place is not None and ("auto_map" in reference.config or any(place.glob("*.py")) or any(place.glob("*/*.py"))):
        remarks.append(f"the model runs code of its own, which is not copied: copy *.py from {place} if you trust it")
    indexed = plan.vocabulary is not None and plan.vocabulary.matched is None and not plan.vocabulary.lent
    if indexed and own is not reference and own.folder is not None:
        remarks.append(f"the tokenizer comes from {own.path}, which has the largest vocabulary")
    return remarks


def _companions(plan: Plan) -> dict[str, Path]:
    """Return the files that are copied, by their names in the output. Each is checked first."""
    reference, own = plan.reference, plan.vocabulary.of if plan.vocabulary else plan.reference
    others = [pattern for pattern in companion_patterns(plan) if pattern not in TOKENIZER_FILES]
    if plan.output == "adapter":
        others, own = [], None if own is plan.base else own
    found: dict[str, Path] = {}
    tokenizer = tokenizer_patterns(plan)
    if plan.vocabulary is not None and plan.vocabulary.lent:
        tokenizer = (*tokenizer, GENERATION)
    encoder = modules_model(plan.models, plan.base) if plan.output == "model" else None
    modules = () if encoder is reference else SENTENCE_FILES
    for model, patterns in ((reference, others), (encoder, modules), (own, tokenizer)):
        if model is not None and model.folder is not None:
            found |= companion_files(model.folder, patterns)
    return found


def companion_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Return the files of a folder that match one of the patterns, by their names in it.

    Raises :class:`~merging.errors.FormatError` for a file that must not be copied.
    """
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {path.relative_to(folder).as_posix(): check_file(path, folder) for path in paths if not path.is_dir()}


def check_companions(plan: Plan) -> None:
    """Check the files that are copied next to the output, before it is made.

    Raises :class:`~merging.errors.FormatError` for a special file, a huge file, and a link out of its folder, as
    strangers' folders can hold them: the link's target would be published.
    """
    model_card(plan)
    _companions(plan)
    written_files(plan)


def _copy_weights(component: Checkpoint, folder: Path) -> None:
    """Copy a component's weights byte for byte, and make them durable."""
    assert component.folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    holders = {holder.path: holder for holder in holders_of(component.tensors.values())}
    for file in component.files:
        target = folder / file.name
        with os_calls.create(target) as stream:
            if file in holders:
                holder = holders[file]
                block = memoryview(bytearray(_BLOCK))
                for start in range(0, holder.size, _BLOCK):
                    piece = block[: min(_BLOCK, holder.size - start)]
                    holder.read(piece, start)
                    stream.write(piece)
            else:
                with os.fdopen(os_calls.open_regular(file), "rb") as source:
                    shutil.copyfileobj(source, stream, _BLOCK)
            stream.flush()
            os_calls.sync(stream.fileno())
    index = find_weights(component.folder)
    if index is not None and index.suffix == ".json":
        copy_file(check_file(index), folder / index.name)


def _model_config(plan: Plan, config: dict[str, Any]) -> dict[str, Any]:
    edited = {key: value for key, value in config.items() if key != "_name_or_path"}
    inner = edited.get("text_config")
    if isinstance(inner, dict):
        edited["text_config"] = inner = dict(inner)
    parts = [edited, inner] if isinstance(inner, dict) else [edited]
    for part in parts:
        if plan.recipe.dtype and "_class_name" not in config:
            part.update({key: plan.recipe.dtype for key in ("dtype", "torch_dtype") if key in part or part is edited})
        # A scaled T5 would be read as an unscaled one: transformers distinguishes them by this setting.
        if plan.untied and (part is edited or "tie_word_embeddings" in part) and not scales_outputs(config):
            part["tie_word_embeddings"] = False
        if plan.vocabulary and plan.vocabulary.rows and ("vocab_size" in part or (part is edited and inner is None)):
            part["vocab_size"] = plan.vocabulary.rows
    vocabulary = plan.vocabulary
    if vocabulary and vocabulary.matched and vocabulary.of is not plan.reference:
        edited = map_token_ids(edited, vocabulary.of.config, vocabulary.matched)
        if isinstance(inner, dict):
            edited["text_config"] = map_token_ids(inner, vocabulary.of.config, vocabulary.matched)
    return edited
