"""Gathering the report of a merge while it runs, and writing its page when the output is in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merging.api.merge_report import make_report
from merging.display.progress import PhaseClock, Progress
from merging.engine.measures import Measures
from merging.errors import OptionError, option
from merging.plan import Plan
from merging.report.page import check_page
from merging.storage.replacing import FILE_ENDINGS

if TYPE_CHECKING:
    from merging.api.merged import Merged

__all__ = ["Reporter"]


class Reporter:
    """Gathers the report of one merge, if one is wanted.

    Attributes:
        progress: the callback for the progress of the merge.
        measures: receives the measures; None without a report.

    Args:
        path: the page to write; None for no report.
        destination: the output of the merge.
        overwrite: whether a page that exists is replaced.
        progress: the callback that the user gave.

    Raises:
        MergingError: for a page that cannot or must not be written there.
    """

    def __init__(self, path: Path | None, destination: Path, *, overwrite: bool, progress: Progress | None) -> None:
        self.path, self.overwrite = path, overwrite
        self.progress = progress
        self.measures: Measures | None = None
        if path is None:
            return
        check_page(path, overwrite)
        places = (path.resolve(), *path.resolve().parents) if destination.suffix in FILE_ENDINGS else (path.resolve(),)
        if destination.resolve() in places:
            raise OptionError(f"{option('report')}: {path} is the output itself: choose another name")
        self.measures = Measures()
        self.progress = self._clock = PhaseClock(progress, "preparing")

    def finish(self, merged: Merged, plan: Plan, described: Plan, written: Plan) -> Merged:
        """Write the page of a merge that is done, and return its result with the report.

        A page that cannot be written is a notice: the output is in place.

        Args:
            merged: the result.
            plan: the plan.
            described: the plan that the output's header describes.
            written: the plan with the ranks that were chosen.
        """
        if self.path is None or self.measures is None:
            return merged
        self._clock.phase("writing the report")
        try:
            from merging.api.report_page import page

            report = make_report(merged, plan, described, written, measures=self.measures, phases=self._clock.seconds)
            merged = replace(merged, report=report)
            page(report).write(self.path, self.overwrite)
        except Exception as error:  # whatever it is, the merge is done
            remark = f"warning: the merge is done, and its report is not: {str(error) or type(error).__name__}"
            return replace(merged, notices=(*merged.notices, remark))
        return merged
