"""The use of an output: the call or the command that opens it, for each program that serves it whole."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merging.errors import MergingError, either, name_options
from merging.object_stores.address import is_store_address
from merging.serving import PROGRAMS
from merging.serving.subject import Subject, open_subject
from merging.serving.vllm import MAX_RANKS
from merging.sources.packs import read_pack

__all__ = ["describe_usage"]

_BARE_ADAPTER = "PEFT opens a folder with a config, and no bare adapter file: merge with {output=FOLDER} for one"


def describe_usage(path: str | Path) -> str:
    """Return a line that says how to use an output: Python calls and commands, each for a program that serves it.

    Args:
        path: the file or folder that a merge wrote.

    Returns:
        The line, in which alternatives are separated by ``or``; empty for an output that no program is known for, and
        in an object store, which programs do not open.
    """
    if is_store_address(str(path)):
        return ""
    try:
        subject = open_subject(str(path))
        return ", or ".join(_ways(subject, Path(path)))
    except (MergingError, OSError):  # it was moved away, or is on a disk that fails
        return ""


def _ways(subject: Subject, path: Path) -> Iterator[str]:
    """Yield the ways to use an output."""
    name = repr(str(path))
    if subject.kind == "pipeline":
        yield f"diffusers.DiffusionPipeline.from_pretrained({name})"
    elif subject.kind == "diffusion adapter":
        if _serves("diffusers", subject):
            yield f"pipeline.load_lora_weights({name})"
        if _serves("comfyui", subject):
            yield f"copy {subject.weights or path} to ComfyUI/models/loras/"
    elif subject.kind == "adapter":
        yield from _ways_of_adapter(subject, path)
    elif subject.kind == "model":
        yield from _ways_of_model(subject, path)
    elif subject.kind == "pack":
        yield from _ways_of_pack(path)


def _ways_of_adapter(subject: Subject, path: Path) -> Iterator[str]:
    if subject.weights is not None and subject.weights.suffix == ".gguf":
        yield f"llama-server -m MODEL.gguf --lora {shlex.quote(str(subject.weights))}"
        return
    if subject.folder is None:
        yield name_options(_BARE_ADAPTER)
        return
    if _serves("peft", subject):
        yield f"peft.PeftModel.from_pretrained(model, {str(path)!r})"
    generates = subject.stated.get("task_type") == "CAUSAL_LM" or "ForCausalLM" in _architecture(subject.base)
    rank = max(subject.ranks.values(), default=0)
    fitting = next((each for each in MAX_RANKS if each >= rank), None)
    if generates and fitting and _serves("vllm", open_subject(subject.name, max_rank=fitting)):
        base = subject.stated.get("base_model_name_or_path") or "BASE"
        yield (
            f"vllm serve {shlex.quote(str(base))} --enable-lora --max-lora-rank {fitting} "
            f"--lora-modules {shlex.quote(f'{path.name}={path}')}"
        )


def _ways_of_model(subject: Subject, path: Path) -> Iterator[str]:
    name = repr(str(path))
    architecture = _architecture(subject.stated)
    if "modules.json" in subject.files:
        yield f"sentence_transformers.SentenceTransformer({name})"
    elif "_class_name" in subject.stated:
        yield f"diffusers.{subject.stated['_class_name']}.from_pretrained({name})"
    elif architecture and _serves("transformers", subject):
        classes = subject.stated.get("auto_map")
        if isinstance(classes, dict) and classes:  # of code in the folder, or on the Hub
            yield f"transformers.{list(classes)[-1]}.from_pretrained({name}, trust_remote_code=True)"
        else:
            yield f"transformers.{architecture}.from_pretrained({name})"
        if "ForCausalLM" in architecture and _serves("vllm", subject):
            yield f"vllm serve {shlex.quote(str(path))}"
    elif subject.weights is not None and subject.weights.suffix == ".safetensors":
        yield f"model.load_state_dict(safetensors.torch.load_file({str(subject.weights)!r}))"


def _ways_of_pack(path: Path) -> Iterator[str]:
    yield "merge it as it is"
    of_model = read_pack(path).manifest.dialect is None
    unpack = either(
        f"merge decompress {shlex.quote(str(path))} -o FOLDER{' --base BASE' if of_model else ''}",
        f"merging.decompress({str(path)!r}, FOLDER{', base=BASE' if of_model else ''})",
    )
    yield f"{unpack} for other programs"


def _architecture(config: Mapping[str, Any]) -> str:
    """Return the first class of a model that a config states, or ""."""
    stated = config.get("architectures")
    return stated[0] if isinstance(stated, list) and stated and isinstance(stated[0], str) else ""


def _serves(program: str, subject: Subject) -> bool:
    """Return whether a program refuses and ignores nothing."""
    return not any(each.severity in ("refuses", "ignores") for each in PROGRAMS[program].findings(subject))
