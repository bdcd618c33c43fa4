"""Checks of an adapter or model before it is served: does a program refuse it, or silently ignore a part of it?

Each program is a module with a table of rules. The rules about the files themselves, for all programs, are in
``contents``.
"""

from __future__ import annotations

from collections.abc import Sequence

from merging.errors import FormatError, InputError, OptionError, either, nearest
from merging.serving.comfyui import COMFYUI
from merging.serving.contents import FILES, holds_nonfinite
from merging.serving.diffusers import DIFFUSERS
from merging.serving.llama_cpp import LLAMA_CPP
from merging.serving.peft import PEFT
from merging.serving.rules import Program
from merging.serving.rules import ProgramFinding as Finding
from merging.serving.rules import ServingVerdict as Verdict
from merging.serving.sglang import SGLANG
from merging.serving.subject import Subject, open_subject
from merging.serving.transformers import TRANSFORMERS
from merging.serving.vllm import VLLM

__all__ = ["PROGRAMS", "Finding", "Verdict", "verify"]

PROGRAMS: dict[str, Program] = {
    program.name: program for program in (VLLM, SGLANG, LLAMA_CPP, PEFT, DIFFUSERS, TRANSFORMERS, COMFYUI)
}
"""The programs by name."""


def verify(
    path: str,
    programs: Sequence[str] = (),
    *,
    base: str | None = None,
    max_lora_rank: int | None = None,
    values: bool = False,
    load: bool = False,
) -> Verdict:
    """Check which parts of an adapter or model programs would refuse, ignore or warn of.

    Only headers are read, unless ``values`` or ``load`` is given. Damaged files are a finding, not an error.

    Args:
        path: The path or Hub address of an adapter or model.
        programs: Names of :data:`PROGRAMS`. By default the program that loads such files: PEFT, transformers,
            diffusers, or llama.cpp.
        base: The path or address of an adapter's base.
        max_lora_rank: The largest rank that servers are started for; by default, their own limit.
        values: Whether the values are read too, to find NaN and infinities.
        load: Whether PEFT, transformers and diffusers, where installed, really load it.

    Returns:
        The verdict with all findings.

    Raises:
        merging.errors.OptionError: For an unknown program, and if ``load`` is not possible.
        merging.errors.InputError: If there is nothing at the path, or nothing with weights.
    """
    for name in programs:
        if name not in PROGRAMS:
            raise OptionError(f"there is no program {name!r}{nearest(name, PROGRAMS)}: use {', '.join(PROGRAMS)}")
    try:
        subject = open_subject(path, base=base, max_rank=max_lora_rank, values=values)
    except FormatError as error:
        broken = Finding("files", "refuses", "they cannot be opened", (str(error),))
        return Verdict(path, "unknown", tuple(programs), (broken,))
    if subject.kind == "pack":
        decompress = either("merge decompress", "decompress")
        raise InputError(f"{path}: is a pack, which no other program reads: {decompress} it first")
    chosen = tuple(dict.fromkeys(programs)) or _default_programs(subject)
    findings = FILES.findings(subject)
    if values and not holds_nonfinite(findings):
        findings.append(Finding("values", "ok", "no NaN or infinities"))
    for name in chosen:
        found = PROGRAMS[name].findings(subject)
        if load and name in ("peft", "transformers", "diffusers"):
            found = _trial_findings(subject, name, found)
        findings += found
    return Verdict(path, subject.kind, chosen, tuple(findings), values_read=values)


def _default_programs(subject: Subject) -> tuple[str, ...]:
    """Return the program that loads such files."""
    if subject.weights is not None and subject.weights.suffix == ".gguf":
        return ("llama.cpp",)
    if subject.kind == "adapter":
        return ("peft",)
    return ("transformers",) if subject.kind == "model" and "_class_name" not in subject.stated else ("diffusers",)


def _trial_findings(subject: Subject, program: str, found: list[Finding]) -> list[Finding]:
    """Return the findings of the rules and those from loading it with the program itself."""
    from merging.serving.trial_load import load

    loaded = load(subject, program)
    problems = [each for each in (*found, *loaded) if each.severity != "ok"]
    return problems or loaded or found
