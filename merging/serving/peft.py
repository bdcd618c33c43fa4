"""Rules of PEFT, which looks for modules by the config alone, not by the file."""

from __future__ import annotations

from collections.abc import Iterator

from merging.errors import MergingError
from merging.serving.rules import Program, Rule, absent, no_config
from merging.serving.subject import Subject
from merging.sources.peft.adapter_types import PEFT_TYPES
from merging.sources.peft.unsupported_types import UNSUPPORTED

__all__ = ["ADAPTERS", "PEFT", "TASK_HEADS", "missing_tokens", "unsaved_modules"]

_TOKENS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")
"""Names of the changes of trained tokens, which PEFT loads for any targets."""

_PREFIX = "base_model."
_LOST = ("corda", "loftq")
TASK_HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}
"""The heads that PEFT adds to modules_to_save for a task. A model has one head."""
_UNREPEATED = ("lora_ga", "pissa_niter_")


def _type(subject: Subject) -> Iterator[str]:
    stated = subject.stated.get("peft_type")
    if subject.config is not None and stated not in [*PEFT_TYPES, *UNSUPPORTED]:
        yield f"peft_type = {stated!r}"


def _bone(subject: Subject) -> Iterator[str]:
    if subject.method == "BONE":
        yield "peft_type = 'BONE'"


def _prefix(subject: Subject) -> Iterator[str]:
    # Prompts are saved under names without a prefix.
    if subject.method in PEFT_TYPES:
        yield from (name for name in subject.tensors if not name.startswith(_PREFIX))


def _untargeted_modules(subject: Subject) -> Iterator[str]:
    if subject.stated.get("target_parameters") or next(_bad_pattern(subject), None):
        return
    for path, parts in subject.modules.items():
        if any(part not in _TOKENS for part in parts) and not _targeted(path, subject):
            yield path


def _targeted(path: str, subject: Subject) -> bool:
    """Whether PEFT adapts the module; True if the config does not decide it."""
    path = path.removesuffix(".base_layer")
    targets = subject.stated.get("target_modules")
    if targets is None:
        return True
    if _named(path, "exclude_modules", subject):
        return False
    if isinstance(targets, str):
        return targets in ("all-linear", "all") or _named(path, "target_modules", subject)
    return not isinstance(targets, list) or (_named(path, "target_modules", subject) and _in_layers(path, subject))


def _named(path: str, field: str, subject: Subject) -> bool:
    """Whether a field names a module: by a regular expression, or in a list by the end of its path."""
    named = subject.stated.get(field)
    if isinstance(named, str):
        return bool(named) and subject.settings.match(named, field, path, whole=True) is not None
    return isinstance(named, list) and any(path == each or path.endswith(f".{each}") for each in named)


def _in_layers(path: str, subject: Subject) -> bool:
    """Whether a module is in a block that is adapted. The block's number is found as in PEFT."""
    layers, named = subject.stated.get("layers_to_transform"), subject.stated.get("layers_pattern")
    wanted = [layers] if isinstance(layers, int) else layers
    if not wanted or path in subject.stated["target_modules"]:
        return True
    named = [named] if isinstance(named, str) and named else named or [None]
    if not isinstance(named, list) or not isinstance(wanted, list):
        return True
    for name in named:
        expression = r".*?\.[^.]*" if name is None else rf"(?:^|.*?\.){name}"
        if match := subject.settings.match(rf"{expression}\.(?P<idx>\d+)\.", "layers_pattern", path):
            return match["idx"] is not None and int(match["idx"]) in wanted
    return False


def _bad_pattern(subject: Subject) -> Iterator[str]:
    """Yield why a pattern cannot be matched with the modules."""
    try:
        for path in subject.modules:
            _targeted(path, subject)
    except MergingError as error:
        yield str(error).removeprefix(f"{subject.name}: ")


def _lost_starts(subject: Subject) -> Iterator[str]:
    start = subject.stated.get("init_lora_weights")
    if start == "corda" or (start == "loftq" and not subject.stated.get("loftq_config")):
        yield f"init_lora_weights = {start!r}"


def _unrepeated_starts(subject: Subject) -> Iterator[str]:
    start = subject.stated.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_UNREPEATED):
        yield f"init_lora_weights = {start!r}"


def unsaved_modules(subject: Subject) -> Iterator[str]:
    """Yield modules that are saved in full by the config, and missing in the file."""
    stated = subject.stated.get("modules_to_save")
    saved = dict.fromkeys(map(str, stated if isinstance(stated, list) else ()))
    absent = [module for module in saved if not any(f".{module}." in name for name in subject.tensors)]
    heads = TASK_HEADS.get(str(subject.stated.get("task_type")), set())
    if heads & (saved.keys() - absent):
        absent = [module for module in absent if module not in heads]
    yield from (f"modules_to_save: {module}" for module in absent)


def missing_tokens(subject: Subject) -> Iterator[str]:
    """Yield trained rows of tokens that the config states, and the file lacks."""
    if subject.stated.get("trainable_token_indices") and not any(
        "trainable_tokens_delta" in n for n in subject.tensors
    ):
        yield "trainable_token_indices, and no trainable_tokens_delta"


def _stray_magnitudes(subject: Subject) -> Iterator[str]:
    if subject.method == "LORA" and subject.config is not None and not subject.config.get("use_dora"):
        yield from (name for name in subject.tensors if ".lora_magnitude_vector" in name)


def _no_alpha(subject: Subject) -> Iterator[str]:
    if subject.method == "LORA":
        yield from absent("lora_alpha")(subject)


def _no_targets(subject: Subject) -> Iterator[str]:
    if subject.method in PEFT_TYPES and not subject.stated.get("target_parameters"):
        yield from absent("target_modules")(subject)


def _bad_rank(subject: Subject) -> Iterator[str]:
    rank = subject.stated.get("r", 8)
    if subject.method == "LORA" and (not isinstance(rank, int) or rank < 1):
        yield f"r = {rank!r}"


ADAPTERS: tuple[Rule, ...] = (
    Rule("refuses", "adapters are folders with adapter_config.json", no_config, "merge it with {output=FOLDER}",
         "peft/config.py, run"),
    Rule("refuses", "there is no such type of adapter", _type, "save it with PEFT, or convert it",
         "peft/config.py, run"),
    Rule("refuses", "Bone is called MISS since PEFT 0.19", _bone,
         "set peft_type to MISS and rename bone_block to miss_block, or merge it", "peft/config.py, run"),
    Rule("refuses", "the rank should be a whole number above 0", _bad_rank, "set r", "peft/tuners/lora/layer.py, run"),
    Rule("refuses", "modules cannot be looked for", _bad_pattern, "write it as a list",
         "peft/tuners/tuners_utils.py, run"),
    Rule("refuses", "the start cannot be repeated without the data that it was made from", _lost_starts,
         "save it with path_initial_model_for_weight_conversion", "peft/tuners/lora/layer.py, run"),
    Rule("ignores", "modules that the config does not target", _untargeted_modules, "add them to target_modules",
         "peft/tuners/tuners_utils.py, run"),
    Rule("ignores", "DoRA's magnitudes, as the config does not say use_dora", _stray_magnitudes, "set use_dora",
         "peft/utils/save_and_load.py, run"),
    Rule("ignores", "the start of the training is not repeated exactly", _unrepeated_starts,
         "save it with path_initial_model_for_weight_conversion", "peft/tuners/lora/layer.py, run"),
    Rule("warns", "there is no lora_alpha, so that it is 8", _no_alpha, "set lora_alpha",
         "peft/tuners/lora/config.py, run"),
    Rule("warns", "there are no target_modules, so that it uses its defaults for the model", _no_targets,
         "set target_modules", "peft/tuners/lora/model.py, run"),
)  # fmt: skip
"""Rules of PEFT for adapters, which also hold for transformers."""

PEFT = Program(
    "peft",
    {
        "adapter": (
            *ADAPTERS,
            Rule("refuses", "modules should be saved in full, and are not in the file", unsaved_modules,
                 "remove them from modules_to_save, or save it again", "peft/utils/save_and_load.py, run"),
            Rule("refuses", "tokens should be trained, and are not in the file", missing_tokens, "save it again",
                 "peft/utils/save_and_load.py, run"),
            Rule("ignores", "tensors without the prefix base_model.model.", _prefix, "add the prefix to their names",
                 "peft/utils/save_and_load.py, run"),
        ),
    },
    {
        "model": "it is a full model: load it with transformers",
        "diffusion adapter": "load it with diffusers",
        "pipeline": "load it with diffusers",
    },
    "PEFT 0.21.2",
)  # fmt: skip
