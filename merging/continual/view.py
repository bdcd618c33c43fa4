"""A store for readers: any number of processes may read it at any time, while another one writes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from merging.api.merge_files import Merged
from merging.continual.export import export
from merging.continual.folder import disk_use, refuse_within
from merging.continual.integrity import StoreVerdict, base_of, require_whole, restorable_steps, state_files, verify
from merging.continual.layer_spectra import spectra
from merging.continual.manifest import Manifest, StepRecord, read_manifest
from merging.continual.state import open_state
from merging.continual.update_rules import history_of, rule_of
from merging.display.progress import Progress, resolve_progress
from merging.display.tables import Table, Tabular, plural
from merging.engine.resources import pick_devices
from merging.errors import FormatError, InputError, OptionError
from merging.maths.lazy_torch import torch
from merging.methods import chain
from merging.methods.contract.method import Method
from merging.report.short_names import short_names
from merging.sources import Adapter
from merging.type_checks import check_types

__all__ = ["StoreView"]


class StoreView(Tabular):
    """A store for readers: its state and history, checks of its integrity, and export of its merge.

    Raises :class:`~merging.errors.FormatError` if ``path`` is not a store.
    """

    @check_types()
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest()

    def _display_table(self) -> Table:
        manifest = self.manifest()
        names = reversed(short_names([step.source for step in manifest.steps]))
        rows = [
            (step.number, name, step.norm, step.kept, step.cosine, str(step.rank or "full"), step.merged)
            for step, name in zip(reversed(manifest.steps), names, strict=True)
        ]
        header = ("step", "model", "norm", "kept", "cosine", "rank", "merge")
        title = f"{type(self).__name__} {self.path}: {plural(len(rows), 'model')} by {manifest.method}"
        return Table(title, header if rows else (), rows=rows, notes=[f"holds {line}" for line in manifest.holds()])

    def manifest(self) -> Manifest:
        """Return the present manifest."""
        return read_manifest(self.path)

    @property
    def method(self) -> Method:
        """The method of the merge."""
        manifest = self.manifest()
        return chain(manifest.method, manifest.parameters)

    @check_types()
    def status(self, spectrum: bool = False) -> dict[str, Any]:
        """Return the state and the record of each model in plain values, with ``spectrum`` also spectra by layer."""
        manifest = self.manifest()
        states: list[Adapter] = []
        if spectrum and manifest.steps:
            manifest, states = self._states()
        facts = manifest.status() | {"scale": rule_of(manifest).scale(history_of(manifest))}
        there = restorable_steps(self.path, manifest)
        facts["steps"] = [step | {"restorable": step["number"] in there} for step in facts["steps"]]
        facts["disk"] = disk_use(self.path, manifest)
        if len(states) > 1:
            raise OptionError(f"{manifest.method} holds sums of either sign, which have no spectrum: leave it out")
        if states:
            layers = spectra(states[0], list(base_of(self.path, manifest).tensors))
            facts["layers"] = [asdict(layer) for layer in layers]
        return facts

    def log(self) -> tuple[StepRecord, ...]:
        """Return all steps, the newest first."""
        return self.manifest().steps[::-1]

    def restorable_steps(self) -> list[int]:
        """Return the numbers of the steps that ``rollback`` can go back to: their states are on the disk."""
        return restorable_steps(self.path, self.manifest())

    @check_types()
    def plot(self, output: str | Path, overwrite: bool = True) -> None:
        """Draw norms, kept shares, cosines and ranks over the steps, as PNG, SVG or PDF; needs matplotlib."""
        from merging.continual.plot import plot

        plot(self, output, overwrite)

    def verify(self) -> StoreVerdict:
        """Compare the hashes of all states that are there, and of the base's files, with the manifest."""
        while True:
            manifest = self.manifest()
            verdict = verify(self.path, manifest)
            if not verdict.problems or self.manifest() == manifest:  # else a writer has removed states meanwhile
                return verdict

    @check_types("max_memory", "progress")
    def export(
        self,
        output: str | Path,
        *,
        kind: str = "model",
        rank: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        max_memory: int | str | None = None,
        overwrite: bool = False,
        progress: Progress | bool | None = None,
    ) -> Merged:
        """Write the merge of all models so far.

        Args:
            output: a folder, or a single file that ends in ``.safetensors``.
            kind: ``"model"`` for a full model, ``"adapter"`` for a LoRA adapter.
            rank: the rank of an adapter; needed where matrices are held in full.
            dtype: the type of all tensors; by default the base's.
            device: the device of the computation, such as ``"cuda"`` (all such GPUs) or ``"cuda:1"``.
            threads: the number of threads; all cores by default.
            max_memory: the most memory, in bytes or as ``"500MB"``, above the memory of the imports.
            overwrite: replace an output that exists.
            progress: True for a bar, or a function that receives the bytes done and the bytes in all.

        Returns:
            The output's place and size, and notices.

        Raises:
            MergingError: the store is empty or damaged, or the output cannot be written.
        """
        progress = resolve_progress(progress)
        refuse_within(Path(output))
        manifest, states = self._states()
        return export(
            manifest,
            states,
            base_of(self.path, manifest),
            Path(output),
            recipe={"as": kind, "dtype": dtype, "rank": rank},
            devices=pick_devices(device),
            threads=threads,
            max_memory=max_memory,
            overwrite=overwrite,
            progress=progress,
        )

    def _states(self) -> tuple[Manifest, list[Adapter]]:
        """Return the manifest and the parts of its last state, opened; read again if a writer removed that state."""
        while True:
            manifest = self.manifest()
            if not manifest.steps:
                raise InputError(f"{self.path}: holds no model yet: add one first")
            stated = next((step.stated_base for step in manifest.steps if step.stated_base), None)
            last = manifest.steps[-1]
            try:
                require_whole(self.path, manifest, last.number)
                return manifest, [open_state(file, stated) for file in state_files(self.path, last)]
            except (FormatError, InputError):
                if self.manifest() == manifest:
                    raise
