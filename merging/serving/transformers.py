"""Rules of transformers, which loads models from folders by the names of their files."""

from __future__ import annotations

from collections.abc import Iterator

from merging.errors import MergingError
from merging.serving.peft import ADAPTERS, missing_tokens, unsaved_modules
from merging.serving.rules import Program, Rule, absent, no_config, stated_type, states
from merging.serving.subject import Subject
from merging.sources.peft.unsupported_types import UNSUPPORTED
from merging.sources.small_files import LIST_LIMIT, read_json
from merging.sources.weight_files import is_shard

__all__ = ["TRANSFORMERS"]

_FILES = tuple(f"{stem}{rest}" for stem in ("model.safetensors", "pytorch_model.bin") for rest in ("", ".index.json"))
_SHARING = ("FROD", "PVERA", "TINYLORA", "UNILORA", "VBLORA", "VERA")
"""Types of PEFT adapters whose modules share tensors."""


def _unknown_weights(subject: Subject) -> str | None:
    """Return the name of a model's weights, None if transformers looks for that name."""
    if subject.weights is None or subject.config is None or subject.weights.name in _FILES:
        return None
    return subject.weights.name


def _other_files(subject: Subject) -> Iterator[str]:
    name = _unknown_weights(subject)
    if name and not is_shard(name):
        yield name


def _no_index(subject: Subject) -> Iterator[str]:
    name = _unknown_weights(subject)
    if name and is_shard(name):
        stem, _, ending = name.partition(".")
        yield f"{stem.rsplit('-', 3)[0]}.{ending}.index.json"


def _plain_index(subject: Subject) -> Iterator[str]:
    if subject.weights is not None and subject.weights.suffix == ".json":
        try:
            metadata = read_json(subject.weights, LIST_LIMIT).get("metadata")
        except MergingError as error:
            yield str(error)
            return
        if not isinstance(metadata, dict):
            yield f"{subject.weights.name} has no metadata"


def _plain_header(subject: Subject) -> Iterator[str]:
    safetensors = any(name.endswith(".safetensors") for name in subject.files)
    if safetensors and subject.metadata.get("format") != "pt":
        yield f"the header's format is {subject.metadata.get('format')!r}"


def _prompts(subject: Subject) -> Iterator[str]:
    if subject.method in UNSUPPORTED and ("PROMPT" in subject.method or "TUNING" in subject.method):
        yield f"peft_type = {subject.method!r}"


def _shared_tensors(subject: Subject) -> Iterator[str]:
    if subject.method in _SHARING:
        yield f"peft_type = {subject.method!r}"


def _names_with_adapter(subject: Subject) -> Iterator[str]:
    yield from (name for name in subject.tensors if ".default." in name or name.endswith(".default"))


def _magnitudes(subject: Subject) -> Iterator[str]:
    if subject.stated.get("use_dora"):
        yield from (name for name in subject.tensors if name.endswith(".lora_magnitude_vector"))


def _entries(subject: Subject) -> Iterator[str]:
    yield from (name for name in subject.tensors if name.endswith(".shira_indices"))


TRANSFORMERS = Program(
    "transformers",
    {
        "model": (
            Rule("refuses", "models are folders with config.json", no_config, "put it in a folder with its config",
                 "configuration_utils.py, run"),
            Rule("refuses", "the config does not say what model it is", absent("model_type"), "add model_type",
                 "models/auto/configuration_auto.py, run"),
            Rule("refuses", "weights of this name are not looked for", _other_files,
                 "rename them to model.safetensors; of a variant, state it: from_pretrained(..., variant=...)",
                 "modeling_utils.py, run"),
            Rule("refuses", "shards are found by their index, which is missing", _no_index,
                 "write it once more with its index: merge it alone, with {method=passthrough}",
                 "modeling_utils.py, run"),
            Rule("refuses", "the index has no metadata", _plain_index, 'add "metadata": {} to it', "utils/hub.py, run"),
            Rule("warns", "the model runs code that the config names", states("auto_map"),
                 "read that code, and load the model with trust_remote_code=True", "dynamic_module_utils.py, run"),
            Rule("warns", "the config does not name the class of the model", absent("architectures"),
                 "add architectures", "models/auto/auto_factory.py, run"),
            Rule("warns", "transformers before 5 and accelerate refuse files without format = pt", _plain_header,
                 "save it again with that metadata", "modeling_utils.py, run"),
            Rule("warns", "weights are cast to the type that the config states", stated_type,
                 "set dtype in config.json", "modeling_utils.py, run"),
        ),
        "adapter": (
            *ADAPTERS,
            Rule("refuses", "only PEFT loads tensors that modules share", _shared_tensors, "load it with PEFT",
                 "integrations/peft.py, run"),
            Rule("ignores", "DoRA's magnitudes, which it looks for by another name", _magnitudes, "load it with PEFT",
                 "integrations/peft.py, run"),
            Rule("ignores", "the positions of the adapted entries: it draws them again", _entries, "load it with PEFT",
                 "integrations/peft.py, run"),
            Rule("ignores", "tensors whose names hold the name of an adapter", _names_with_adapter,
                 "remove .default from them",
                 "integrations/peft.py, run"),
            Rule("ignores", "modules should be saved in full, are not in the file, and stay the base's",
                 unsaved_modules, "save it again", "integrations/peft.py, run"),
            Rule("ignores", "tokens should be trained, are not in the file, and stay the base's", missing_tokens,
                 "save it again", "integrations/peft.py, run"),
            Rule("refuses", "only PEFT loads prompts", _prompts, "load it with PEFT",
                 "integrations/peft.py, run"),
        ),
    },
    {
        "diffusion adapter": "load it with diffusers",
        "pipeline": "load it with diffusers",
    },
    "transformers 5.23.0",
)  # fmt: skip
