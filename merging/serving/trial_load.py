"""Load a model with the program itself, and report tensors that it refuses, misses, or does not expect."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from merging.errors import OptionError, option
from merging.serving.rules import ProgramFinding, Severity
from merging.serving.subject import Subject

__all__ = ["load"]

_NOISE = ("is_gradient_checkpointing", "No LoRA keys associated to")
"""Parts of harmless warnings of libraries."""

_NO_MATTER = ("vblora_vector_bank", "lora_monteclora_sampler", ".ranknum", "base_model.randlora_", "prompt_embeddings")
"""Tensors that are reported although they are shared, made again, or only for training."""


def load(subject: Subject, program: str) -> list[ProgramFinding]:
    """Load a model with PEFT, transformers or diffusers on this machine, and return findings.

    Adapters are put on a base that is built from its config. Its values are read only if the adapter's start or
    magnitudes need them. Raises :class:`~merging.errors.OptionError` if the program is not installed, the base is not
    known, or the files are on the Hub.
    """
    if find_spec(program) is None or (subject.kind == "adapter" and find_spec("peft") is None):
        missing = program if find_spec(program) is None else "peft"
        raise OptionError(f"{option('load', True)} needs {missing}, which is not installed: pip install {missing}")
    if subject.remote:
        raise OptionError(
            f"{subject.name}: {option('load', True)} needs the files on this machine: download them first"
        )
    loads = _LOADS.get((program, subject.kind))
    if loads is None or (subject.folder is None and subject.kind != "diffusion adapter"):
        return []
    heard: list[str] = []
    with _collect_warnings(heard):
        try:
            keys = loads(subject)
        except OptionError:
            raise
        except Exception as error:  # any exception of the library is its refusal
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return [ProgramFinding(program, "refuses", "loading it failed", (reason,))]
    counted = {kind: [n for n in names if not any(part in n for part in _NO_MATTER)] for kind, names in keys.items()}
    findings = [_finding(program, subject, kind, names) for kind, names in counted.items() if names]
    if heard and not findings:
        findings.append(ProgramFinding(program, "warns", "loading it warns", tuple(heard)))
    return findings or [ProgramFinding(program, "ok", "it was loaded, with no tensor missing or unexpected")]


def _finding(program: str, subject: Subject, kind: str, names: list[str]) -> ProgramFinding:
    """Return the finding for tensors that a loader reports as missing, unexpected, mismatched or left out."""
    if kind == "missing" and "adapter" in subject.kind:
        return ProgramFinding(program, "warns", "tensors are missing, and fresh ones take their place", tuple(names))
    if kind == "missing":
        return ProgramFinding(program, "refuses", "tensors are missing, and random ones take their place", tuple(names))
    severity: Severity = "ignores" if kind in ("unexpected", "left out") else "refuses"
    return ProgramFinding(program, severity, f"tensors are {kind} when it is loaded", tuple(names))


@contextmanager
def _collect_warnings(heard: list[str]) -> Iterator[None]:
    """Collect the warnings and log records of libraries, once each."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    def note(message: str) -> None:
        text = " ".join(message.split())[:300]
        if text not in heard and not any(noise in text for noise in _NOISE):
            heard.append(text)

    # Progress bars and log lines would disturb the report.
    printing = [import_module(f"{name}.utils.logging") for name in ("transformers", "diffusers") if find_spec(name)]
    for library in printing:
        library.disable_progress_bar()
        library.disable_default_handler()
    listener = Listener(logging.WARNING)
    handlers = {"diffusers": listener, "peft": listener, "transformers": logging.NullHandler()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, handler in handlers.items():
            logging.getLogger(name).addHandler(handler)
        try:
            yield
        finally:
            for name, handler in handlers.items():
                logging.getLogger(name).removeHandler(handler)
            for library in printing:
                library.enable_default_handler()
            for each in caught:
                note(str(each.message))


Keys = dict[str, list[str]]

_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""Endings of the classes that add a head for a task to a model."""


def _model(subject: Subject) -> Keys:
    """Load a model with transformers, on the CPU."""
    import transformers

    transformers.AutoConfig.from_pretrained(str(subject.folder))  # as a user does who does not know the class
    named = subject.stated.get("architectures") or [None]
    found = getattr(transformers, str(named[0]), transformers.AutoModel)
    _, report = found.from_pretrained(str(subject.folder), output_loading_info=True)
    return {kind.removesuffix("_keys"): sorted(map(str, keys)) for kind, keys in report.items() if keys}


def _by_peft(subject: Subject) -> Keys:
    """Load an adapter with PEFT, on a base without values if possible."""
    import peft

    base, empty = _base_for(subject)
    model = peft.PeftModel.from_pretrained(base, str(subject.folder), low_cpu_mem_usage=empty)
    # Once more, as only this call reports the keys.
    report = model.load_adapter(str(subject.folder), "default", low_cpu_mem_usage=empty)
    return {"missing": list(report.missing_keys), "unexpected": list(report.unexpected_keys)}


def _by_transformers(subject: Subject) -> Keys:
    """Load an adapter with transformers, which looks for its tensors itself."""
    report = _full_base(subject).load_adapter(str(subject.folder))
    return {kind: sorted(map(str, getattr(report, f"{kind}_keys"))) for kind in ("missing", "unexpected", "mismatched")}


def _base_for(subject: Subject) -> tuple[Any, bool]:
    """Return the base, and whether it has no values. Only plain LoRA needs none."""
    import torch

    start = subject.stated.get("init_lora_weights", True)
    if subject.method != "LORA" or isinstance(start, str) or subject.stated.get("use_dora"):
        return _full_base(subject), False
    with torch.device("meta"):
        return _empty_base(subject), True


def _empty_base(subject: Subject) -> Any:
    made_for, config = _class_and_config(subject)
    return made_for(config)


def _full_base(subject: Subject) -> Any:
    made_for, config = _class_and_config(subject)
    return made_for.from_pretrained(str(_base(subject)), config=config)


def _class_and_config(subject: Subject) -> tuple[Any, Any]:
    """Return the class of the base, with a new head if the adapter was trained for a task, and its config."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(_base(subject)))
    suffix = _TASKS.get(str(subject.stated.get("task_type")))
    named = str((subject.base.get("architectures") or [None])[0])
    if suffix and not named.endswith(suffix):
        known = getattr(transformers, f"AutoModel{suffix}")._model_mapping
        if type(config) not in known:
            raise OptionError(
                f"{subject.name}: {option('load', True)} cannot find the class of its base: transformers has no "
                f"{suffix[3:]} of type {config.model_type}, as task_type = {subject.stated['task_type']} says"
            )
        labels = _labels(subject)
        if labels is not None:
            config.num_labels = labels
        found = known[type(config)]
        return found[0] if isinstance(found, tuple) else found, config
    found = getattr(transformers, named, None)
    if found is None:
        raise OptionError(
            f"{subject.base_path}: its config names no class of transformers: {option('load', True)} needs one"
        )
    return found, config


def _labels(subject: Subject) -> int | None:
    """Return the number of labels of an adapter's own head, None if it has no head."""
    ends = (".classifier.weight", ".score.weight", ".out_proj.weight", ".qa_outputs.weight")
    heads = [stored.shape for name, stored in subject.tensors.items() if name.endswith(ends) and "lora_" not in name]
    return heads[-1][0] if heads and heads[-1] else None


def _base(subject: Subject) -> Any:
    if subject.base_path is None or not subject.base:
        raise OptionError(
            f"{subject.name}: {option('load', True)} needs the base: say where it is with {option('base')}"
        )
    return subject.base_path


def _pipeline(subject: Subject) -> Keys:
    """Load a pipeline with diffusers, on the CPU."""
    import diffusers

    pipelines: Any = diffusers.DiffusionPipeline
    pipelines.from_pretrained(str(subject.folder))
    return {}


def _part(subject: Subject) -> Keys:
    """Load one model with diffusers, on the CPU."""
    import diffusers

    found = getattr(diffusers, str(subject.stated.get("_class_name")))
    _, report = found.from_pretrained(str(subject.folder), output_loading_info=True)
    return {kind.removesuffix("_keys"): sorted(map(str, keys)) for kind, keys in report.items() if keys}


def _pipeline_adapter(subject: Subject) -> Keys:
    """Load a LoRA with diffusers, in the pipeline that is its base."""
    import diffusers

    if subject.base_path is None:
        raise OptionError(
            f"{subject.name}: {option('load', True)} needs the pipeline: say where it is with {option('base')}"
        )
    pipelines: Any = diffusers.DiffusionPipeline
    pipeline = pipelines.from_pretrained(str(subject.base_path))
    assert subject.weights is not None
    pipeline.load_lora_weights(str(subject.weights.parent), weight_name=subject.weights.name)
    return {"left out": [] if pipeline.get_list_adapters() else sorted(subject.tensors)}


_LOADS: dict[tuple[str, str], Callable[[Subject], Keys]] = {
    ("transformers", "model"): _model,
    ("transformers", "adapter"): _by_transformers,
    ("peft", "adapter"): _by_peft,
    ("diffusers", "pipeline"): _pipeline,
    ("diffusers", "model"): _part,
    ("diffusers", "diffusion adapter"): _pipeline_adapter,
}
