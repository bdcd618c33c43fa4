"""What may be asked of a store at any time, by any number of processes, while another one writes to it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from merging.api.merge_files import Merged
from merging.continual.folder import refuse_within
from merging.continual.manifest import Manifest, StepRecord, read_manifest
from merging.continual.publishing import export
from merging.continual.soundness import Verdict, base_of, require_whole, state_files, verify
from merging.continual.spectrum import spectra
from merging.continual.state import open_state
from merging.continual.update_rules import history_of, rule_of
from merging.engine.resources import pick_device
from merging.engine.threads import Progress
from merging.errors import FormatError, InputError, OptionError
from merging.methods import chain
from merging.methods.contract.method import Method
from merging.sources import Adapter

__all__ = ["StoreView"]


class StoreView:
    """A store as it is read: what it holds, how it came to that, whether it is whole, and its merge as a model.

    Raises :class:`~merging.errors.FormatError` if ``path`` is no store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest()

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
        states: list[Adapter] = []
        if spectrum and manifest.steps:
            manifest, states = self._states()
        facts = manifest.status() | {"scale": rule_of(manifest).scale(history_of(manifest))}
        if len(states) > 1:
            raise OptionError(f"{manifest.method} holds sums of either sign, which have no spectrum: leave it out")
        if states:
            layers = spectra(states[0], list(base_of(self.path, manifest).tensors))
            facts["layers"] = [asdict(layer) for layer in layers]
        return facts

    def log(self) -> tuple[StepRecord, ...]:
        """The history: every step, the newest first."""
        return self.manifest().steps[::-1]

    def plot(self, output: str | Path) -> None:
        """Draw norms, kept shares, cosines and ranks over the steps, as PNG, SVG or PDF; needs matplotlib."""
        from merging.continual.plot import plot

        plot(self, output)

    def verify(self) -> Verdict:
        """Hash every state that is there and the base's files, and hold them against the manifest."""
        while True:
            manifest = self.manifest()
            verdict = verify(self.path, manifest)
            if not verdict.problems or self.manifest() == manifest:  # else a writer has taken states away meanwhile
                return verdict

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
        refuse_within(Path(output))
        manifest, states = self._states()
        return export(
            manifest,
            states,
            base_of(self.path, manifest),
            Path(output),
            recipe={"as": kind, "dtype": dtype, "rank": rank},
            device=pick_device(device),
            threads=threads,
            max_memory=max_memory,
            overwrite=overwrite,
            progress=progress,
        )

    def _states(self) -> tuple[Manifest, list[Adapter]]:
        """The manifest and the parts of its last state, whole and opened; once more if a writer took that away."""
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
