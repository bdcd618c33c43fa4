"""A merge that grows: a folder that takes one model after the other, and can always be opened whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merging import os_calls
from merging.continual.folder import found, locked, refuse_within, remove, states, unfinished
from merging.continual.manifest import NAME, STATES, Base, Manifest, Part, Refused, StepRecord, write_manifest
from merging.continual.soundness import base_of, download_base, hashes, require_whole, state_files
from merging.continual.step import Execution, Grown, content_of, grow, plan_alone, record
from merging.continual.update_rules import checked_rule
from merging.continual.view import StoreView
from merging.engine.download import download_model, missing_files
from merging.engine.resources import pick_device
from merging.engine.threads import Progress, cores
from merging.errors import InputError, MergingError, OptionError, OutputError
from merging.hub.address import hub_address
from merging.hub.open_model import open_model
from merging.methods import chain
from merging.plan.recipe import Recipe
from merging.sources import Adapter, Checkpoint
from merging.sources.checkpoint import content_key
from merging.storage.atomic import remove_unplaced

__all__ = ["ContinualStore"]


class ContinualStore(StoreView):
    """One merged model that takes models as they arrive, in their order, in memory and time that do not grow.

    A folder with a manifest and numbered states, none of which is ever changed: a step writes its state beside the
    others, makes it durable, and then moves a new manifest into place. Killed at any instant, the store has the old
    step or the new one. One process writes at a time; any number read.

    Raises :class:`~merging.errors.MergingError` for what cannot be done; the store is as it was then.
    """

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        base: str | Path,
        method: str = "opcm",
        max_rank: int | None = None,
        progress: Progress | None = None,
        **parameters: Any,
    ) -> ContinualStore:
        """An empty store for models that were trained from ``base``, which grows by ``method``.

        ``max_rank`` caps the rank of what is held as factors; the energy that is lost is told at each step. A base on
        the Hub is fetched, and from then on means the commit that it is now. ``progress`` is told of its bytes.
        """
        path, grows = Path(path), chain(method, parameters)
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
        identity, parameters = _identity(base, progress), values.get("parameters", {})
        manifest = Manifest(method=values["method"], parameters=parameters, max_rank=max_rank, base=identity)
        found(path, manifest)
        return cls(path)

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
        on_mismatch: str = "error",
        wait: float | None = None,
        progress: Progress | None = None,
    ) -> StepRecord | None:
        """Merge one more model; None if one of the same content was added before, unless ``again``.

        One on the Hub is fetched first, while others may write; another revision of it is another model. With
        ``on_mismatch="base"`` tensors that the model lacks, or has in another shape, are left as they are. Waits for
        another writer for up to ``wait`` seconds, without end by default. Raises
        :class:`~merging.continual.Unconfirmed` if the step is in but may not outlast a power cut.
        """
        fetched = None
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
            alone = plan_alone(source, base, manifest, allow_different_bases, on_mismatch, progress)
            if manifest.steps:
                require_whole(self.path, manifest, len(manifest.steps))
            with unfinished(self.path) as folder:
                execution = Execution(
                    pick_device(device), cores() if threads is None else threads, max_memory, progress
                )
                grown = grow(manifest, self.path, alone, content, folder, execution)
                parts = self._settle(folder, len(manifest.steps) + 1, grown)
                step = record(manifest, source, content, parts, grown)
                self._commit(manifest, step, source)
            return step

    def fetch(
        self,
        model: str | Path,
        *,
        again: bool = False,
        allow_different_bases: bool = False,
        on_mismatch: str = "error",
        progress: Progress | None = None,
    ) -> Checkpoint | Adapter:
        """Open a model, and bring what has to come from the Hub to this machine: of one that ``add`` would refuse by
        its headers nothing, of one that is in by its hashes neither. The store is not changed, nor locked.
        """
        source, manifest = open_model(model), self.manifest()
        missing = missing_files(source)
        if not missing:
            return source
        known = all(remote.sha256 for remote in missing) and manifest.has(content_of(source))
        if again or not known:
            base = base_of(self.path, manifest)
            plan_alone(source, base, manifest, allow_different_bases, on_mismatch, progress)
            download_model(source, progress)
        return source

    def watch(self, source: str | Path, **options: Any) -> None:
        """Add what is new in a folder, or what a query of the Hub finds, as it appears.

        As :func:`merging.continual.watch.watch`, whose options these are.
        """
        from merging.continual.watch import watch

        watch(self, source, **options)

    def _settle(self, folder: Path, number: int, grown: Grown) -> dict[str, Part]:
        """Give a finished state its name."""
        digest = hashlib.sha256("".join(grown.sha256.values()).encode()).hexdigest()[:12]
        final = self.path / STATES / f"{number:06}-{digest}"
        try:
            os_calls.sync_folder(folder)
            folder.chmod(0o777 & ~os_calls.umask())
            folder.rename(final)
            os_calls.sync_folder(final.parent)
        except OSError as error:
            remove(final)
            raise OutputError(f"{final}: cannot be put in place: {error.strerror}") from None
        files = {name: final / f"{name}.safetensors" for name in grown.sha256}
        return {
            name: Part(
                file=file.relative_to(self.path).as_posix(), sha256=grown.sha256[name], bytes=file.stat().st_size
            )
            for name, file in files.items()
        }

    def _commit(self, manifest: Manifest, step: StepRecord, source: Checkpoint | Adapter) -> None:
        """Put a step into the manifest; where that fails its state goes again."""
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
        """Be the only writer; what a killed one left is removed."""
        with locked(self.path, wait):
            self._sweep(self.manifest(), keep=None)
            yield

    def refuse(self, refused: Refused, *, wait: float | None = None) -> None:
        """Note a model that was refused, in the place of an earlier note on it."""
        with self._writing(wait):
            manifest = self.manifest()
            others = tuple(each for each in manifest.refused if each.source != refused.source)
            noted = manifest.model_copy(update={"refused": (*others, refused)})
            write_manifest(self.path, noted, f"the refusal of {refused.source} is noted")

    def relocate(self, base: str | Path, *, wait: float | None = None) -> Manifest:
        """Note where the base lies now; every byte of its files must be what it was."""
        with self._writing(wait):
            manifest = self.manifest()
            moved = _identity(base)
            if moved.sha256 != manifest.base.sha256:
                raise InputError(f"{base}: is not the base that {self.path} was made for")
            manifest = manifest.model_copy(update={"base": moved})
            write_manifest(self.path, manifest, f"the base is {moved.path} now")
            return manifest

    # ---- keeping

    def rollback(self, to: int, *, wait: float | None = None) -> Manifest:
        """Go back to the state after a step (0 is the empty store), which must be whole; later ones are forgotten."""
        with self._writing(wait):
            manifest = self.manifest()
            if not 0 <= to <= len(manifest.steps):
                raise OptionError(f"there is no step {to}: {self.path} has {len(manifest.steps)}")
            if to:
                missing = next((p for p in state_files(self.path, manifest.steps[to - 1]) if not p.is_file()), None)
                if missing:
                    raise InputError(
                        f"{missing}: the state of step {to} was removed by gc, so there is no way back to it"
                    )
                require_whole(self.path, manifest, to)
            earlier = manifest.model_copy(update={"steps": manifest.steps[:to]})
            write_manifest(self.path, earlier, f"it is back at step {to}")
            self._sweep(earlier, keep=None)
            return earlier

    def gc(self, keep: int, *, wait: float | None = None) -> list[str]:
        """Remove all states but those of the last ``keep`` steps, and whatever no step refers to; what was removed.

        Nothing is removed unless the last state, on which the store goes on, is whole.
        """
        if keep < 1:
            raise OptionError(f"keep = {keep}: the last state must stay")
        with locked(self.path, wait):
            manifest = self.manifest()
            if manifest.steps:
                require_whole(self.path, manifest, len(manifest.steps))
            return self._sweep(manifest, keep)

    def _sweep(self, manifest: Manifest, keep: int | None) -> list[str]:
        remove_unplaced(self.path / NAME)
        steps = manifest.steps if keep is None else manifest.steps[-keep:]
        wanted = {file.parent.name for step in steps for file in state_files(self.path, step)}
        gone = [path for path in states(self.path) if path.name not in wanted]
        for path in gone:
            remove(path)
        return [path.name for path in gone if not path.name.startswith(".")]


def _identity(base: str | Path, progress: Progress | None = None) -> Base:
    """What a store notes of its base; one on the Hub is fetched, and named by its commit."""
    opened = download_base(base, progress)
    path = str(opened.path if opened.origin else Path(base).expanduser().resolve())
    return Base(path=path, key=content_key(opened.tensors), sha256=hashes(opened))
