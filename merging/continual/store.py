"""A merge that grows: a folder that takes one model after the other, and can always be opened whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from merging import platform
from merging.continual import growth
from merging.continual.folder import STATES, found, locked, remove, unfinished
from merging.continual.manifest import (
    Base,
    Manifest,
    Part,
    Refused,
    StepRecord,
    read_manifest,
    sha256_of,
    write_manifest,
)
from merging.continual.spectrum import spectra
from merging.continual.state import odd_values, open_state
from merging.continual.step import Execution, Grown, content_of, grow, open_base, plan_alone, record
from merging.errors import FormatError, InputError, MergingError, OptionError, OutputError
from merging.files import Merged, merge_plan, pick_device
from merging.landing import umask
from merging.method import Method
from merging.methods import chain
from merging.plan import PORTABLE_RANKS, plan_of
from merging.recipe import Recipe, make_recipe
from merging.sources import Adapter, Checkpoint, open_model
from merging.sources.checkpoint import content_key
from merging.threads import Progress, cores

__all__ = ["ContinualStore", "Verdict"]


class ContinualStore:
    """One merged model that takes models as they arrive, in their order, in memory and time that do not grow.

    A folder with a manifest and numbered states, none of which is ever changed: a step writes its state beside the
    others, makes it durable, and then moves a new manifest into place. Killed at any instant, the store has the old
    step or the new one. One process writes at a time; any number read.

    Raises :class:`~merging.errors.MergingError` for what cannot be done; the store is as it was then.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest()

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        base: str | Path,
        method: str = "opcm",
        max_rank: int | None = None,
        **parameters: Any,
    ) -> ContinualStore:
        """An empty store for models that were trained from ``base``, which grows by ``method``.

        ``max_rank`` caps the rank of what is held as factors; the energy that is lost is told at each step.
        """
        path, grows = Path(path), chain(method, parameters)
        growth.check(grows)
        grows.check(2)
        if max_rank is not None and max_rank < 1:
            raise OptionError(f"max_rank = {max_rank}: at least 1 is needed")
        if max_rank is not None and not all(part.factored for part in growth.parts(grows).values()):
            raise OptionError(f"max_rank caps factors, and {grows.chain} holds none: leave it out")
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise OutputError(f"{path}: exists already: choose another folder for the store")
        opened = open_base(base)
        identity = Base(
            path=str(Path(base).expanduser().resolve()),
            key=content_key(opened.tensors),
            sha256={file.name: sha256_of(file) for file in opened.files},
        )
        values = Recipe(models=("nothing",), method=grows).to_dict()
        manifest = Manifest(
            method=values["method"], parameters=values.get("parameters", {}), max_rank=max_rank, base=identity
        )
        found(path, manifest)
        return cls(path)

    # ---- reading

    def manifest(self) -> Manifest:
        """The record as it is now."""
        return read_manifest(self.path)

    @property
    def method(self) -> Method:
        """The method that it grows by."""
        manifest = self.manifest()
        return chain(manifest.method, manifest.parameters)

    def status(self, spectrum: bool = False) -> dict[str, Any]:
        """What it holds and what each model brought, in plain values; with the spectra of its layers if so asked."""
        manifest = self.manifest()
        facts = manifest.status() | {"scale": growth.scale_of(self.method, manifest)}
        if spectrum and manifest.steps:
            first = next(iter(manifest.steps[-1].parts.values()))
            layers = spectra(self.path / first.file, list(self._base(manifest).tensors))
            facts["layers"] = [asdict(layer) for layer in layers]
        return facts

    # ---- growing

    def add(
        self,
        model: str | Path,
        *,
        again: bool = False,
        device: str = "cpu",
        threads: int | None = None,
        max_memory: int | None = None,
        allow_different_bases: bool = False,
        wait: float = -1,
        progress: Progress | None = None,
    ) -> StepRecord | None:
        """Merge one more model; None if one of the same content was added before, unless ``again``.

        Waits for another writer for up to ``wait`` seconds, without end by default.
        """
        with self._writing(wait):
            manifest = self.manifest()
            source = open_model(model)
            content = content_of(source)
            if not again and any(step.sha256 == content for step in manifest.steps):
                return None
            alone = plan_alone(source, self._base(manifest), manifest, allow_different_bases)
            folder = unfinished(self.path)
            try:
                execution = Execution(
                    pick_device(device), cores() if threads is None else threads, max_memory, progress
                )
                grown = grow(manifest, self.path, alone, content, folder, execution)
                parts = self._settle(folder, len(manifest.steps) + 1, grown)
                step = record(manifest, source, content, parts, grown)
                self._commit(manifest, step)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return step

    def _settle(self, folder: Path, number: int, grown: Grown) -> dict[str, Part]:
        """Give a finished state its name."""
        digest = hashlib.sha256("".join(grown.sha256.values()).encode()).hexdigest()[:12]
        final = self.path / STATES / f"{number:06}-{digest}"
        try:
            platform.sync_folder(folder)
            folder.chmod(0o777 & ~umask())
            folder.rename(final)
            platform.sync_folder(final.parent)
        except OSError as error:
            remove(final)
            raise OutputError(f"{final}: cannot be put in place: {error.strerror}") from None
        files = {name: final / f"{name}.safetensors" for name in grown.sha256}
        return {
            name: Part(file=str(file.relative_to(self.path)), sha256=grown.sha256[name], bytes=file.stat().st_size)
            for name, file in files.items()
        }

    def check_base(self) -> None:
        """Raise :class:`~merging.errors.MergingError` if the base is gone or is another one."""
        self._base(self.manifest())

    def _commit(self, manifest: Manifest, step: StepRecord) -> None:
        """Put a step into the manifest; where that fails its state goes again."""
        notes = tuple(each for each in manifest.refused if each.source != step.source)
        try:
            write_manifest(self.path, manifest.model_copy(update={"steps": (*manifest.steps, step), "refused": notes}))
        except MergingError:
            self._sweep(self.manifest(), keep=None)
            raise

    def _base(self, manifest: Manifest) -> Checkpoint:
        base = open_base(manifest.base.path)
        if content_key(base.tensors) != manifest.base.key:
            raise InputError(f"{manifest.base.path}: is no longer the base that {self.path} was made for")
        return base

    @contextmanager
    def _writing(self, wait: float) -> Iterator[None]:
        """Be the only writer; what a killed one left is removed."""
        with locked(self.path, wait):
            self._sweep(self.manifest(), keep=None)
            yield

    def refuse(self, refused: Refused, *, wait: float = -1) -> None:
        """Note a model that was refused, in the place of an earlier note on it."""
        with self._writing(wait):
            manifest = self.manifest()
            others = tuple(each for each in manifest.refused if each.source != refused.source)
            write_manifest(self.path, manifest.model_copy(update={"refused": (*others, refused)}))

    # ---- publishing

    def export(
        self,
        output: str | Path,
        *,
        kind: str = "model",
        rank: int | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
        max_memory: int | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Merged:
        """Write the merge of all models so far, as a full ``model`` or as an ``adapter`` of a rank."""
        manifest, states = self._states()
        grows = chain(manifest.method, manifest.parameters)
        method = growth.published(grows, manifest)
        names = tuple(Path(step.source).name for step in manifest.steps)  # what the card tells
        recipe = make_recipe({"models": names, "method": method, "as": kind, "dtype": dtype, "rank": rank}, "export")
        destination = Path(output)
        plan = plan_of(recipe, states, self._base(manifest), () if destination.suffix else PORTABLE_RANKS)
        return merge_plan(
            plan,
            destination,
            device=pick_device(device),
            threads=threads,
            max_memory=max_memory,
            overwrite=overwrite,
            progress=progress,
        )

    def _states(self) -> tuple[Manifest, list[Adapter]]:
        """The manifest and the parts of its last state, opened; once more if a writer took that away meanwhile."""
        while True:
            manifest = self.manifest()
            if not manifest.steps:
                raise InputError(f"{self.path}: holds no model yet: add one first")
            stated = next((step.stated_base for step in manifest.steps if step.stated_base), None)
            try:
                return manifest, [open_state(file, stated) for file in self._files(manifest.steps[-1])]
            except FormatError:
                if self.manifest() == manifest:
                    raise

    # ---- keeping

    def rollback(self, to: int, *, wait: float = -1) -> Manifest:
        """Go back to the state after a step (0 is the empty store); later ones are forgotten."""
        with self._writing(wait):
            manifest = self.manifest()
            if not 0 <= to <= len(manifest.steps):
                raise OptionError(f"there is no step {to}: {self.path} has {len(manifest.steps)}")
            missing = to and next((p for p in self._files(manifest.steps[to - 1]) if not p.is_file()), None)
            if missing:
                raise InputError(f"{missing}: the state of step {to} was removed by gc, so there is no way back to it")
            earlier = manifest.model_copy(update={"steps": manifest.steps[:to]})
            write_manifest(self.path, earlier)
            self._sweep(earlier, keep=None)
            return earlier

    def gc(self, keep: int, *, wait: float = -1) -> list[str]:
        """Remove all states but those of the last ``keep`` steps, and whatever no step refers to; what was removed."""
        if keep < 1:
            raise OptionError(f"keep = {keep}: the last state must stay")
        with locked(self.path, wait):
            return self._sweep(self.manifest(), keep)

    def _sweep(self, manifest: Manifest, keep: int | None) -> list[str]:
        steps = manifest.steps if keep is None else manifest.steps[-keep:]
        wanted = {file.parent.name for step in steps for file in self._files(step)}
        gone = sorted(path for path in (self.path / STATES).iterdir() if path.name not in wanted)
        for path in gone:
            remove(path)
        return [path.name for path in gone if not path.name.startswith(".")]

    def _files(self, step: StepRecord) -> list[Path]:
        return [self.path / part.file for part in step.parts.values()]

    def verify(self) -> Verdict:
        """Hash every state that is there and the base's files, and hold them against the manifest."""
        manifest, problems, removed = self.manifest(), [], []
        for step in manifest.steps:
            for part in step.parts.values():
                file = self.path / part.file
                if not file.is_file():
                    removed.append(step.number)
                elif file.stat().st_size != part.bytes or sha256_of(file) != part.sha256:
                    problems.append(f"{file}: its content is not what was written")
                elif step is manifest.steps[-1]:
                    problems += odd_values(file)
        if manifest.steps and manifest.steps[-1].number in removed:
            problems.append(f"the state of the last step, {manifest.steps[-1].number}, is gone")
        problems += self._odd_base(manifest)
        return Verdict(len(manifest.steps), sorted(set(removed)), problems)

    @staticmethod
    def _odd_base(manifest: Manifest) -> list[str]:
        try:
            base = open_base(manifest.base.path)
        except MergingError as error:
            return [str(error)]
        found = {file.name: sha256_of(file) for file in base.files}
        return [] if found == manifest.base.sha256 else [f"{manifest.base.path}: is no longer the base of the store"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verifying found: the number of steps, those whose states were removed, and what is wrong."""

    steps: int
    removed: list[int]
    problems: list[str]
