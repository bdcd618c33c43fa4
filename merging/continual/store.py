"""A continual store: a folder with a merge that takes in one model after the other."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merging.continual.folder import create_store, lock, new_state, refuse_within, remove_state, state_folders
from merging.continual.integrity import (
    base_of,
    base_record,
    require_restorable,
    require_whole,
    state_files,
)
from merging.continual.manifest import NAME, Manifest, RefusedModel, StepRecord, write_manifest
from merging.continual.step import (
    AddOptions,
    StepExecution,
    content_of,
    plan_alone,
    publish_state,
    step_record,
    write_state,
)
from merging.continual.update_rules import checked_rule
from merging.continual.view import StoreView
from merging.display.notices import report_notices
from merging.display.progress import Progress, resolve_progress
from merging.engine.download import download_model, missing_files
from merging.engine.resources import pick_devices
from merging.engine.threads import cores
from merging.errors import InputError, MergingError, OptionError, OutputError
from merging.hub.address import hub_address
from merging.hub.open_model import open_model
from merging.maths.lazy_torch import torch
from merging.methods import chain
from merging.plan.recipe import Recipe
from merging.sources import Adapter, Checkpoint
from merging.storage.atomic import remove_temporary_files
from merging.type_checks import check_types

__all__ = ["ContinualStore"]

_log = logging.getLogger(__name__)


class ContinualStore(StoreView):
    """One merged model that takes in models as they arrive, in order, in constant memory and time.

    The store is a folder with a manifest and numbered states. A state never changes: a step writes a new state next to
    the others, makes it durable, and then moves a new manifest into place. A store whose process was killed has the old
    step or the new one. One process writes at a time; any number read.

    All methods raise :class:`~merging.errors.MergingError` where they fail; the store is then as it was before.

    Example:
        >>> import merging
        >>> store = merging.ContinualStore.create("store", base="base", method="task_arithmetic")
        >>> store.add("one").number, store.add("two").number
        (1, 2)
        >>> store.export("merged").kind
        'model'
    """

    @classmethod
    @check_types("progress")
    def create(
        cls,
        path: str | Path,
        *,
        base: str | Path,
        method: str = "opcm",
        max_rank: int | None = None,
        progress: Progress | bool | None = None,
        **parameters: Any,
    ) -> ContinualStore:
        """Create an empty store for models that were trained from ``base``.

        Args:
            path: the folder of the store, which must not exist or be empty.
            base: a full model. A base on the Hub is fetched, and stays at its present commit.
            method: a method, or a chain, that can take in models one by one.
            max_rank: the largest rank of changes that are held as factors. Each step records the energy that is lost.
            progress: True for a bar, or a function that receives the bytes fetched and the bytes in all.
            parameters: the method's parameters by name.

        Returns:
            The store.

        Raises:
            OptionError: the method cannot be continued, or a parameter does not suit.
            InputError: the base cannot be read, or is an adapter.
            OutputError: the folder exists, or cannot be written.
        """
        path, grows = Path(path), chain(method, parameters)
        progress = resolve_progress(progress, "fetching")
        rule = checked_rule(grows)
        grows.check(2)
        if max_rank is not None and max_rank < 1:
            raise OptionError(f"max_rank = {max_rank}: at least 1 is needed")
        if max_rank is not None and not all(part.factored for part in rule.parts.values()):
            raise OptionError(f"max_rank caps factors, and {grows.chain} holds none: leave it out")
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise OutputError(f"{path}: exists already: choose another folder for the store")
        refuse_within(path)
        values = Recipe(models=("nothing",), method=grows).to_dict()
        identity, parameters = base_record(base, progress), values.get("parameters", {})
        manifest = Manifest(method=values["method"], parameters=parameters, max_rank=max_rank, base=identity)
        create_store(path, manifest)
        return cls(path)

    # ---- adding models

    @check_types("max_memory", "progress")
    def add(
        self,
        model: str | Path,
        *,
        again: bool = False,
        keep: int | None = None,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        max_memory: int | str | None = None,
        allow_different_bases: bool = False,
        on_mismatch: str = "error",
        wait: float | None = None,
        progress: Progress | bool | None = None,
    ) -> StepRecord | None:
        """Merge one more model.

        Args:
            model: a model's path, or its name on the Hub. It is fetched first, while others may write; another revision
                is another model.
            again: add it even if a model with the same content was added before.
            keep: the number of the last states that stay, as in :meth:`gc`; all by default.
            device: the device of the computation, such as ``"cuda"`` (all such GPUs) or ``"cuda:1"``.
            threads: the number of threads; all cores by default.
            max_memory: the most memory, in bytes or as ``"500MB"``, above the memory of the imports.
            allow_different_bases: add a model even if it seems to have another base.
            on_mismatch: ``"base"`` keeps tensors of the base that the model lacks, or has in another shape; ``"error"``
                refuses such a model.
            wait: the most seconds to wait for another writer; without end by default.
            progress: True for a bar, or a function that receives the bytes done and the bytes in all.

        Returns:
            The record of the step; None for a model with the same content as an earlier one.

        Raises:
            MergingError: the model is refused, or the store is damaged; nothing has changed.
            Unconfirmed: the step is in, but may be lost in a power cut.
        """
        _check_keep(keep)
        fetched, progress = None, resolve_progress(progress)
        if hub_address(str(model)):
            fetched = self.fetch(
                model,
                again=again,
                allow_different_bases=allow_different_bases,
                on_mismatch=on_mismatch,
                progress=progress,
            )
        with self._writing(wait):
            manifest = self.manifest()
            source = fetched or open_model(model)
            content = content_of(source)
            if not again and manifest.has(content):
                return None
            base = base_of(self.path, manifest)
            options = AddOptions(allow_different_bases, on_mismatch, progress)
            alone = plan_alone(source, base, manifest, options)
            if manifest.steps:
                require_whole(self.path, manifest, len(manifest.steps))
            with new_state(self.path) as folder:
                execution = StepExecution(
                    pick_devices(device), cores() if threads is None else threads, max_memory, progress
                )
                new = write_state(manifest, self.path, alone, content, folder=folder, execution=execution)
                parts = publish_state(self.path, folder, len(manifest.steps) + 1, new)
                step = step_record(manifest, source, content, parts, new)
                self._commit(manifest, step, source)
            if keep is not None:  # the last state was hashed as it was written
                self._sweep(self.manifest(), keep)
        report_notices(step.notices)
        _log.info("%s: step %d is %r", self.path, step.number, step.source)
        return step

    @check_types("progress")
    def fetch(
        self,
        model: str | Path,
        *,
        again: bool = False,
        allow_different_bases: bool = False,
        on_mismatch: str = "error",
        progress: Progress | bool | None = None,
    ) -> Checkpoint | Adapter:
        """Open a model, and fetch its files from the Hub unless ``add`` would refuse it.

        Nothing is fetched of a model that is refused by its headers, or was added before by its hashes. The store is
        neither changed nor locked.
        """
        progress = resolve_progress(progress, "fetching")
        source, manifest = open_model(model), self.manifest()
        missing = missing_files(source)
        if not missing:
            return source
        known = all(remote.sha256 for remote in missing) and manifest.has(content_of(source))
        if again or not known:
            base = base_of(self.path, manifest)
            plan_alone(source, base, manifest, AddOptions(allow_different_bases, on_mismatch, progress))
            download_model(source, progress)
        return source

    @check_types()
    def watch(self, source: str | Path, **options: Any) -> None:
        """Add new models as they appear in a folder, or in a query of the Hub.

        See :func:`merging.continual.watch.watch` for the options.
        """
        from merging.continual.watch import watch

        watch(self, source, **options)

    def _commit(self, manifest: Manifest, step: StepRecord, source: Checkpoint | Adapter) -> None:
        """Put a step into the manifest; if that fails, remove its state."""
        noted = source.origin.repo if source.origin else step.source
        notes = tuple(each for each in manifest.refused if each.source != noted)
        longer = manifest.model_copy(update={"steps": (*manifest.steps, step), "refused": notes})
        try:
            write_manifest(self.path, longer, f"step {step.number} is in")
        except MergingError:
            self._sweep(self.manifest(), keep=None)
            raise

    @contextmanager
    def _writing(self, wait: float | None) -> Iterator[None]:
        """Be the only writer, and remove what a killed writer left."""
        with lock(self.path, wait):
            self._sweep(self.manifest(), keep=None)
            yield

    def refuse(self, refused: RefusedModel, *, wait: float | None = None) -> None:
        """Note a model that was refused, in place of an earlier note on it."""
        with self._writing(wait):
            manifest = self.manifest()
            others = tuple(each for each in manifest.refused if each.source != refused.source)
            noted = manifest.model_copy(update={"refused": (*others, refused)})
            write_manifest(self.path, noted, f"the refusal of {refused.source} is noted")

    @check_types()
    def relocate(self, base: str | Path, *, wait: float | None = None) -> Manifest:
        """Note the new place of the base, all of whose files must have the same bytes as before."""
        with self._writing(wait):
            manifest = self.manifest()
            moved = base_record(base)
            if moved.sha256 != manifest.base.sha256:
                raise InputError(f"{base}: is not the base that {self.path} was made for")
            manifest = manifest.model_copy(update={"base": moved})
            write_manifest(self.path, manifest, f"the base is {moved.path} now")
            return manifest

    # ---- managing states

    @check_types()
    def rollback(self, to: int, *, wait: float | None = None) -> Manifest:
        """Go back to the state after step ``to``, which must be whole, and forget later steps; 0 is the empty store."""
        with self._writing(wait):
            manifest = self.manifest()
            if not 0 <= to <= len(manifest.steps):
                raise OptionError(f"there is no step {to}: {self.path} has {len(manifest.steps)}")
            if to:
                require_restorable(self.path, manifest, to)
                require_whole(self.path, manifest, to)
            earlier = manifest.model_copy(update={"steps": manifest.steps[:to]})
            write_manifest(self.path, earlier, f"it is back at step {to}")
            self._sweep(earlier, keep=None)
        _log.info("%s: back at step %d", self.path, to)
        return earlier

    @check_types()
    def gc(self, keep: int, *, wait: float | None = None) -> list[str]:
        """Remove all states except the last ``keep``, and folders of states that no step refers to.

        Nothing is removed unless the last state is whole. Returns the names of the states that were removed.
        """
        _check_keep(keep)
        with lock(self.path, wait):
            manifest = self.manifest()
            if manifest.steps:
                require_whole(self.path, manifest, len(manifest.steps))
            return self._sweep(manifest, keep)

    def _sweep(self, manifest: Manifest, keep: int | None) -> list[str]:
        remove_temporary_files(self.path / NAME)
        steps = manifest.steps if keep is None else manifest.steps[-keep:]
        wanted = {file.parent.name for step in steps for file in state_files(self.path, step)}
        gone = [path for path in state_folders(self.path) if path.name not in wanted]
        for path in gone:
            remove_state(path)
        return [path.name for path in gone if not path.name.startswith(".")]


def _check_keep(keep: int | None) -> None:
    if keep is not None and keep < 1:
        raise OptionError(f"keep = {keep}: the last state must stay")
