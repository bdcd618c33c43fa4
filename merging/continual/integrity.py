"""Integrity of a store: its states and its base are compared with the hashes in its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merging.continual.manifest import Manifest, Part, StepRecord, StoreBase, sha256_of
from merging.continual.state import value_problems
from merging.display.progress import Progress
from merging.display.tables import Displayed
from merging.engine.download import download_model
from merging.errors import InputError, MergingError, either
from merging.hub.address import local_path
from merging.hub.client import Unreachable
from merging.hub.open_model import open_base
from merging.sources import Checkpoint
from merging.sources.checkpoint import content_key
from merging.sources.links import refuse_link

__all__ = [
    "Damaged",
    "StoreVerdict",
    "base_of",
    "base_record",
    "require_restorable",
    "require_whole",
    "restorable_steps",
    "state_files",
    "verify",
]


class Damaged(InputError):
    """A state of a store, or its base, is missing or has changed. The model that is added is not the reason."""


@dataclass(frozen=True, slots=True, repr=False)
class StoreVerdict(Displayed):
    """The outcome of verifying a store.

    Attributes:
        steps: the number of steps.
        removed: the steps whose states were removed.
        problems: a line for each thing that is wrong.
        whole: the last step whose state is whole; 0, the empty store, if there is none.
    """

    steps: int
    removed: list[int]
    problems: list[str]
    whole: int


def _download_base(path: str | Path, progress: Progress | None = None) -> Checkpoint:
    """Open the full model that a store is based on; one on the Hub is downloaded whole.

    Raises :class:`~merging.errors.MergingError`.
    """
    base = open_base(path, "a store")
    download_model(base, progress)
    return base


def _file_hashes(base: Checkpoint) -> dict[str, str]:
    """Return the hashes of a model's files, by their paths within its folder."""
    root = base.folder or base.path.parent
    return {
        (file.relative_to(root) if root in file.parents else Path(file.name)).as_posix(): sha256_of(file)
        for file in base.files
    }


def base_of(store: Path, manifest: Manifest) -> Checkpoint:
    """Open the base of a store, and check a few of its values.

    Raises :class:`Damaged`, or :class:`~merging.hub.client.Unreachable` if it is on a Hub that does not answer.
    """
    path = manifest.base.path
    try:
        base = _download_base(path)
        if content_key(base.tensors) == manifest.base.key:
            return base
    except Unreachable:
        raise
    except MergingError as error:
        raise Damaged(f"the base of {store} cannot be read: {error}. {_relocate(store)}") from None
    raise Damaged(f"{path}: is no longer the base that {store} was made for. {_relocate(store)}")


def _relocate(store: Path) -> str:
    return "If it was moved: " + either(f"merge continual relocate {store} --base NEW", "relocate(NEW)")


def state_files(store: Path, step: StepRecord) -> list[Path]:
    """Return the files of the state after a step. Links are refused."""
    files = [store / part.file for part in step.parts.values()]
    for file in files:
        refuse_link(file.parent)
        refuse_link(file)
    return files


def require_whole(store: Path, manifest: Manifest, number: int) -> None:
    """Hash the state after a step. Raises :class:`Damaged` unless it is what was written."""
    for part in manifest.steps[number - 1].parts.values():
        problem = part_problem(store, part)
        if problem:
            back = max((each for each in restorable_steps(store, manifest) if each < number), default=0)
            rollback = either(f"merge continual rollback {store} --to {back}", f"rollback({back})")
            raise Damaged(
                f"{problem}, so step {number} cannot be built on: {rollback} goes back to the state before it"
            )


def restorable_steps(store: Path, manifest: Manifest) -> list[int]:
    """Return the numbers of the steps whose states are on the disk, so that the store can go back to them."""
    return [step.number for step in manifest.steps if _is_there(store, step)]


def require_restorable(store: Path, manifest: Manifest, number: int) -> None:
    """Refuse to go back to a step whose state was removed, and name the steps that remain."""
    steps = restorable_steps(store, manifest)
    if number not in steps:
        others = ", ".join(map(str, steps)) or "0, the empty store"
        cause = either("gc, or --keep", "gc, or keep=")
        noun = "steps" if len(steps) > 1 else "step"
        raise InputError(f"step {number}: its state was removed ({cause}); you can go back to {noun} {others}")


def _is_there(store: Path, step: StepRecord) -> bool:
    return all(file.is_file() for file in state_files(store, step))


def part_problem(store: Path, part: Part) -> str | None:
    """Return what is wrong with a file of a state, or None."""
    file = store / part.file
    try:
        same = file.stat().st_size == part.bytes and sha256_of(file) == part.sha256
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    except InputError as error:
        return str(error)
    return None if same else f"{file}: its content is not what was written"


def verify(store: Path, manifest: Manifest) -> StoreVerdict:
    """Compare the hashes of all states that are there, and of the base's files, with the manifest."""
    problems: list[str] = []
    removed: list[int] = []
    whole = 0
    for step in manifest.steps:
        if not _is_there(store, step):
            removed.append(step.number)
            continue
        found = [problem for part in step.parts.values() if (problem := part_problem(store, part))]
        if step is manifest.steps[-1] and not found:
            found = [problem for file in state_files(store, step) for problem in value_problems(file)]
        problems += found
        whole = whole if found else step.number
    if manifest.steps and manifest.steps[-1].number in removed:
        problems.append(f"the state of the last step, {manifest.steps[-1].number}, is gone")
    return StoreVerdict(len(manifest.steps), removed, problems + _base_problems(manifest.base), whole)


def _base_problems(stated: StoreBase) -> list[str]:
    try:
        found = _file_hashes(_download_base(stated.path))
    except MergingError as error:
        return [str(error)]
    return [] if found == stated.sha256 else [f"{stated.path}: is no longer the base of the store"]


def base_record(base: str | Path, progress: Progress | None = None) -> StoreBase:
    """Return the record of a base. A base on the Hub is fetched, and named by its commit."""
    opened = _download_base(base, progress)
    path = str(opened.path if opened.origin else local_path(str(base)).resolve())
    return StoreBase(path=path, key=content_key(opened.tensors), sha256=_file_hashes(opened))
