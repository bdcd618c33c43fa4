"""What a run has done so far, on the disk: finished stages, and the state of the one under way."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from merging import os_calls
from merging.errors import OptionError, OutputError
from merging.sources.links import refuse_link
from merging.sources.small_files import LIST_LIMIT, read_json
from merging.storage.atomic import replace_file

__all__ = ["Journal"]

_PLAN = "plan.json"


class Journal:
    """A folder with one file a stage, each written beside its place, made durable and moved there in one step.

    A run that is killed at any moment leaves whole files alone, and one that is resumed finds in them what it would
    compute again. ``plan`` is everything that decides the outcome. Raises :class:`~merging.errors.OptionError` when an
    unfinished run lies there that is not to be resumed, or is one of another plan.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], resume: bool = False, overwrite: bool = False) -> None:
        self.folder = refuse_link(folder)
        written = folder / _PLAN
        if written.is_file() and not resume and not overwrite:
            raise OptionError(
                f"{folder}: an unfinished run lies there: --resume goes on with it, --overwrite begins anew"
            )
        if written.is_file() and resume:
            earlier = read_json(written, LIST_LIMIT)
            changed = sorted(key for key in plan.keys() | earlier.keys() if plan.get(key) != earlier.get(key))
            if changed:
                raise OptionError(
                    f"{folder}: the run to resume had another {', '.join(changed)}: give the same again, or begin anew "
                    f"with --overwrite"
                )
            return
        self.remove()
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made: {error.strerror}") from None
        self._place(written, (json.dumps(plan, indent=1) + "\n").encode())

    def __contains__(self, stage: str) -> bool:
        return self._file(stage).is_file()

    def get(self, stage: str) -> Any:
        """What was kept of a stage, or None: tensors on the CPU and plain values."""
        if stage not in self:
            return None
        return torch.load(refuse_link(self._file(stage)), map_location="cpu", weights_only=True)

    def keep(self, stage: str, values: Any) -> None:
        """Keep tensors and plain values of a stage, in the place of what was kept of it before."""
        buffer = io.BytesIO()
        torch.save(values, buffer)
        self._place(self._file(stage), buffer.getvalue())

    def drop(self, stage: str) -> None:
        """Forget a stage."""
        self._file(stage).unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, stage: str) -> Path:
        return self.folder / f"{stage.replace(' ', '-')}.pt"

    def _place(self, path: Path, data: bytes) -> None:
        try:
            replace_file(path, data)
            os_calls.sync_folder(path.parent)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
