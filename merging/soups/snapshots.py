"""The checkpoints of a run, found by the names that training programs give them, in the order of their steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from merging.errors import InputError, OptionError, option
from merging.sources.distributed import METADATA
from merging.sources.weight_files import is_shard

__all__ = ["Snapshot", "find_snapshots", "select_snapshots"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A checkpoint of a run.

    Attributes:
        path: its path or name.
        step: the training step (or epoch) after which it was saved, or its place among named checkpoints.
        named: whether it was named by itself, and not found in the folder of its run.
    """

    path: str
    step: int
    named: bool = False

    @property
    def name(self) -> str:
        """The last part of its path."""
        return Path(self.path).name


_FOLDERS = (
    re.compile(r"checkpoint-(\d+)"),  # transformers, trl, axolotl, LLaMA-Factory, ms-swift, diffusers
    re.compile(r"(?:.*[^a-z])?(?:global_?)?step[-_=]?(\d+)", re.IGNORECASE),  # torchtitan, DeepSpeed, NeMo
    re.compile(r"(?:.*[^a-z])?epoch[-_=]?(\d+)", re.IGNORECASE),  # torchtune
)
"""Names of folders with a step, in order of preference."""

_FILES = (
    re.compile(r"(.*[^a-z])?step[-_=]?(\d+)", re.IGNORECASE),  # Lightning (epoch=1-step=200), kohya (NAME-step0000100)
    re.compile(r"(.*[^a-z])?epoch[-_=]?(\d+)", re.IGNORECASE),
    re.compile(r"(.*)[-_](\d+)"),  # kohya (NAME-000004), ai-toolkit (NAME_000000500)
)
"""Names of files without their endings: a name that all checkpoints share, and a step."""

_ENDINGS = (".safetensors", ".ckpt")
"""The endings of files that are checkpoints. States of optimizers have others (.pt, .bin), and are never opened."""

_INNER = ("checkpoints", "checkpoint")
"""Folders in a run's folder in which programs keep the checkpoints."""

_FSDP = "pytorch_model_fsdp_0"
"""The folder in a checkpoint of transformers' Trainer in which FSDP saves the model's shards."""


def find_snapshots(paths: Sequence[str]) -> list[Snapshot]:
    """Return the checkpoints of a run's folder in the order of their steps; several paths are checkpoints themselves.

    Raises :class:`~merging.errors.InputError` for a folder without checkpoints, and for two of the same step.
    """
    if len(paths) > 1:
        return [Snapshot(path, position, named=True) for position, path in enumerate(paths)]
    run = Path(paths[0])
    if not run.is_dir():
        raise InputError(f"{run}: is no folder on this disk: name the folder of a run, or at least two checkpoints")
    for folder in (run, *(run / name for name in _INNER)):
        found = list(_snapshots_in(folder)) if folder.is_dir() else []
        if found:
            return _sort_by_step(found)
    raise InputError(
        f"{run}: holds no checkpoints of a run: folders such as checkpoint-500 or step-500, or .ckpt and .safetensors "
        f"files with a step in their names. Name the checkpoints themselves if they are called otherwise"
    )


def select_snapshots(snapshots: Sequence[Snapshot], last: int | None, until: int | None) -> list[Snapshot]:
    """Return the ``last`` checkpoints up to the step ``until``.

    Raises :class:`~merging.errors.OptionError` if fewer than two are left.
    """
    if last is not None and last < 2:
        raise OptionError(f"{option('last', last)}: a soup is made of at least two checkpoints")
    early = [each for each in snapshots if until is None or each.step <= until]
    if len(early) < 2:
        raise OptionError(
            f"a soup is made of at least two checkpoints, and of those that were found ({_list_names(snapshots)}) "
            f"{len(early)} are left"
        )
    if last is not None and last > len(early):
        raise OptionError(f"{option('last', last)}: there are {len(early)} checkpoints: {_list_names(early)}")
    return early if last is None else early[-last:]


def _snapshots_in(folder: Path) -> Iterator[Snapshot]:
    """Yield the checkpoints in a folder: folders if there are any, else files."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for pattern in _FOLDERS:
        matches = [(path, pattern.fullmatch(path.name)) for path in inside if path.is_dir()]
        found = [Snapshot(str(_weights_in(path)), int(match[1])) for path, match in matches if match]
        if found:
            yield from found
            return
    files = [path for path in inside if path.suffix in _ENDINGS and path.is_file() and not is_shard(path.name)]
    for pattern in _FILES:
        named = [(path, match) for path in files if (match := pattern.fullmatch(path.stem))]
        if named:
            yield from _snapshots_of_files(folder, named)
            return


def _snapshots_of_files(folder: Path, named: Sequence[tuple[Path, re.Match[str]]]) -> Iterator[Snapshot]:
    """Yield checkpoints in files. Raises :class:`~merging.errors.InputError` if they are of several models."""
    models = sorted({re.sub(r"\d+", "", match[1] or "") for _, match in named})
    if len(models) > 1:
        raise InputError(
            f"{folder}: holds checkpoints of several models ({', '.join(f'{name}...' for name in models[:4])}): name "
            f"those to average"
        )
    yield from (Snapshot(str(path), int(match[2])) for path, match in named)


def _weights_in(checkpoint: Path) -> Path:
    """Return the folder with a checkpoint's weights. FSDP saves them in a folder of their own."""
    return checkpoint / _FSDP if (checkpoint / _FSDP / METADATA).is_file() else checkpoint


def _sort_by_step(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    by_step: dict[int, Snapshot] = {}
    for each in snapshots:
        other = by_step.setdefault(each.step, each)
        if other is not each:
            raise InputError(f"{other.path} and {each.path} are both of step {each.step}: name the checkpoints to use")
    return [by_step[step] for step in sorted(by_step)]


def _list_names(snapshots: Sequence[Snapshot]) -> str:
    """Return the steps of checkpoints that were found, the paths of named ones."""
    names = [each.path if each.named else str(each.step) for each in snapshots]
    return ", ".join(names if len(names) < 9 else [*names[:4], "...", *names[-4:]])
