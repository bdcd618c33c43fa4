"""Rules about files, for all programs: they must agree with their configs and hold finite numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from merging.serving.adapter_rules import ADAPTER_RULES, LORA_FILE_RULES
from merging.serving.model_rules import MODEL_RULES, PIPELINE_RULES
from merging.serving.rules import SAVE_AGAIN, Program, ProgramFinding, Rule
from merging.serving.subject import Subject

__all__ = ["FILES", "holds_nonfinite"]


def _nonfinite(subject: Subject) -> Iterator[str]:
    """Yield the tensors that hold NaN or infinities, if values are read."""
    if subject.values:
        yield from (name for name, stored in subject.tensors.items() if stored.floating and not stored.finite())


def _nothing(subject: Subject) -> Iterator[str]:
    if not subject.tensors:
        yield "there are no tensors"


_EMPTY = Rule("refuses", "it is empty", _nothing, SAVE_AGAIN)
_NUMBERS = Rule(
    "refuses", "it holds NaN or infinities, and so will its answers", _nonfinite, "merge it again, look at the inputs"
)

FILES = Program(
    "files",
    {
        "model": (_EMPTY, *MODEL_RULES, _NUMBERS),
        "adapter": (_EMPTY, *ADAPTER_RULES, _NUMBERS),
        "diffusion adapter": (*LORA_FILE_RULES, _NUMBERS),
        "pipeline": (*PIPELINE_RULES, _NUMBERS),
    },
    {},
    takes_mlx=True,
)
"""Rules that hold for all programs."""


def holds_nonfinite(findings: Iterable[ProgramFinding]) -> bool:
    """Return whether one of the findings is that there are NaN or infinities."""
    return any(each.what == _NUMBERS.what for each in findings)
