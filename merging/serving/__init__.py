"""What programs would refuse or silently ignore in an adapter or model, said before it is served.

A program is a module with a table of rules; what is true of all of them, and of the files themselves, is in
``contents``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merging.errors import FormatError, InputError, OptionError, nearest
from merging.serving.comfyui import COMFYUI
from merging.serving.contents import FILES
from merging.serving.diffusers import DIFFUSERS
from merging.serving.llama_cpp import LLAMA_CPP
from merging.serving.peft import PEFT
from merging.serving.rules import Finding, Program
from merging.serving.sglang import SGLANG
from merging.serving.subject import Subject, open_subject
from merging.serving.transformers import TRANSFORMERS
from merging.serving.vllm import VLLM

__all__ = ["PROGRAMS", "Finding", "Verdict", "verify"]

PROGRAMS: dict[str, Program] = {
    program.name: program for program in (VLLM, SGLANG, LLAMA_CPP, PEFT, DIFFUSERS, TRANSFORMERS, COMFYUI)
}
"""By their names."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found at ``path``, which holds a ``kind``, for these programs."""

    path: str
    kind: str
    programs: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def served(self) -> bool:
        """Whether nothing is refused or silently ignored."""
        return not any(each.severity in ("refuses", "ignores") for each in self.findings)


def verify(
    path: str,
    programs: Sequence[str] = (),
    *,
    base: str | None = None,
    max_lora_rank: int | None = None,
    values: bool = False,
    load: bool = False,
) -> Verdict:
    """What ``programs`` would refuse, ignore or warn of in the adapter or model at ``path``, a path or a Hub address.

    By default those that load such a thing: PEFT, transformers, or diffusers. ``base`` is where an adapter's base
    lies, ``max_lora_rank`` what servers are started for (by default their own limit). Headers alone are read, and with
    ``values`` also the values, for NaN and infinities. With ``load``, PEFT, transformers and diffusers really load it,
    where they are installed. Files that are damaged, or none of the kind, are a verdict too. Raises
    :class:`~merging.errors.OptionError` for an unknown program, and for ``load`` where it cannot be, and
    :class:`~merging.errors.InputError` where there is nothing, or nothing that holds weights.
    """
    for name in programs:
        if name not in PROGRAMS:
            raise OptionError(f"there is no program {name!r}{nearest(name, PROGRAMS)}: use {', '.join(PROGRAMS)}")
    try:
        subject = open_subject(path, base, max_lora_rank, values)
    except FormatError as error:
        broken = Finding("files", "refuses", "they cannot be opened", (str(error),))
        return Verdict(path, "unknown", tuple(programs), (broken,))
    if subject.kind == "pack":
        raise InputError(f"{path}: is a pack, which no other program reads: merge decompress it first")
    chosen = tuple(dict.fromkeys(programs)) or _fitting(subject)
    findings = FILES.findings(subject)
    for name in chosen:
        found = PROGRAMS[name].findings(subject)
        if load and name in ("peft", "transformers", "diffusers"):
            found = _loaded(subject, name, found)
        findings += found
    return Verdict(path, subject.kind, chosen, tuple(findings))


def _fitting(subject: Subject) -> tuple[str, ...]:
    """The programs that load such a thing."""
    if subject.kind == "adapter":
        return ("peft",)
    return ("transformers",) if subject.kind == "model" and "_class_name" not in subject.stated else ("diffusers",)


def _loaded(subject: Subject, program: str, found: list[Finding]) -> list[Finding]:
    """The findings of the rules, and what the program itself says when it loads it."""
    from merging.serving.loading import load

    said = load(subject, program)
    wrong = [each for each in (*found, *said) if each.severity != "ok"]
    return wrong or said or found
