"""The result of a merge."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from merging.api.merge_report import MergeReport
from merging.display.tables import Displayed

__all__ = ["Merged"]


@dataclass(frozen=True, slots=True, repr=False)
class Merged(Displayed):
    """The result of a merge.

    Example:
        >>> import merging
        >>> merged = merging.merge(["a", "b"], method="linear", output="merged", overwrite=True)
        >>> merged.path.name, merged.rank, sorted(merged.to_dict())[:3]
        ('merged', 16, ['bytes', 'discarded', 'facts'])

    Attributes:
        path: the file or folder that was written.
        kind: ``adapter`` or ``model``.
        method: the chain as it is written.
        tensors: the number of tensors.
        bytes: the size of the tensors in bytes.
        seconds: the time that merging and writing took.
        rank: the rank of a merged adapter's factors, else None.
        format: the name of the form of a merged adapter's file, else None.
        notices: remarks for people.
        discarded: the share of the change's energy that a lower rank discarded, by tensor.
        ranks: the rank of each tensor's factors, where it was chosen from the values.
        facts: numbers that the method reports, by name.
        quantization_errors: the relative error of each quantised tensor: the norm of the error by the tensor's.
        report: the measures of the merge, where a report was asked for.
    """

    path: Path
    kind: str
    method: str
    tensors: int
    bytes: int
    seconds: float
    rank: int | None = None
    format: str | None = None
    notices: tuple[str, ...] = ()
    discarded: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    quantization_errors: dict[str, float] = field(default_factory=dict)
    report: MergeReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the same in plain values, for JSON."""
        plain = asdict(replace(self, report=None)) | {"path": str(self.path), "notices": list(self.notices)}
        del plain["report"]
        return plain | ({"report": self.report.to_dict()} if self.report else {})
