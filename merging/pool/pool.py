"""The folder of a pool: its index, and the files of every adapter worth keeping, by the hash of their content."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock, Timeout

from merging import os_calls
from merging.errors import FormatError, InputError, OptionError, OutputError
from merging.hub.open_model import open_base
from merging.pool.audit import KEPT_FILES, Auditor, Candidate
from merging.pool.cross_checks import find_missing, find_outliers, find_over_cap, find_unlicensed
from merging.pool.duplicates import duplicates
from merging.pool.files import FOLDER, copy, holds_something, remove
from merging.pool.index import OVERRULED, VERDICTS, Entry, Finding, Index, verdict_of
from merging.sources import Adapter, Checkpoint, check_in_place
from merging.sources.links import refuse_link
from merging.sources.small_files import is_there

if TYPE_CHECKING:
    from merging.pool.smoke import Limits

__all__ = ["OWNER_CAP", "Built", "Pool"]

OWNER_CAP = 10
"""Adapters of one owner that merges may choose: a few training services hold most of what is public."""

_CONFIG = "adapter_config.json"

_KEPT = re.compile(r"[0-9a-f]{16}|\.new\.\w{8}")
"""How folders of adapters are called: by their hash, or as one that is being copied."""


@dataclass(frozen=True, slots=True)
class Built:
    """What a build did: how many adapters were new, and the verdicts on all that the pool knows of."""

    audited: int
    verdicts: dict[str, int]


class Pool:
    """Adapters of one base in a folder: ``pool.sqlite``, and the files of each under ``adapters/``.

    An adapter is audited once and noted with everything that was found, whatever the verdict: nothing is dropped in
    silence. A build that is killed goes on with the next adapter. One process writes at a time, readers do not wait.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = Index(self.path)
        refuse_link(self.path / FOLDER)

    @classmethod
    def create(cls, path: str | Path, base: str | Path, base_names: Sequence[str] = ()) -> Pool:
        """A new, empty pool of the adapters of ``base``, which is also known as ``base_names``.

        Killed, it can be done again. Raises :class:`~merging.errors.OutputError` for a folder that holds something, and
        :class:`~merging.errors.InputError` for a base that is none.
        """
        path, opened = Path(path), open_base(base, "a pool")
        if path.exists() and (not path.is_dir() or holds_something(path)):
            raise OutputError(f"{path}: exists already: choose another folder for the pool")
        stated = opened.config.get("_name_or_path")
        own = str(opened.origin) if opened.origin else str(Path(base).expanduser().resolve())
        repo = [opened.origin.repo] if opened.origin else []
        names = [*base_names, *repo, *([stated] if isinstance(stated, str) and stated else []), own]
        try:
            (path / FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path}: cannot be created: {error.strerror}") from None
        Index.create(path, base=own, base_names="\n".join(dict.fromkeys(names))).close()
        return cls(path)

    @property
    def base(self) -> str:
        """The path or address of the base."""
        return self.index.fact("base") or ""

    @property
    def base_names(self) -> tuple[str, ...]:
        """What the base is called."""
        return tuple((self.index.fact("base_names") or "").split("\n"))

    def add_base_names(self, names: Sequence[str]) -> None:
        """Add names that adapters call the base by."""
        self.index.note(base_names="\n".join(dict.fromkeys([*names, *self.base_names])))

    def verdicts(self) -> dict[str, int]:
        """How many adapters have each verdict."""
        counted = Counter(entry.verdict for entry in self.index.entries())
        return {verdict: counted[verdict] for verdict in VERDICTS}

    def usable(self) -> list[tuple[Entry, Path]]:
        """The adapters that merges may choose, and where each lies."""
        return [(e, e.place(self.path)) for e in self.index.entries(("ok", "repaired")) if e.folder]

    def build(
        self,
        candidates: Iterable[Candidate],
        *,
        again: bool = False,
        owner_cap: int | None = None,
        allow_unknown_licence: bool | None = None,
        on_event: Callable[[Entry], None] | None = None,
    ) -> Built:
        """Audit what is new (with ``again`` everything), keep what is worth it, and compare all with all.

        ``owner_cap`` (ten at first) and ``allow_unknown_licence`` (no at first) are remembered for later calls.
        ``on_event`` gets every adapter that was audited, and those whose verdict the comparison changes. Raises
        :class:`~merging.errors.MergingError` for what is wrong with the pool, its base, or the network, never for an
        adapter: what is wrong with one is a finding.
        """
        audited = 0
        with self._writing():
            self._remember(owner_cap, allow_unknown_licence)
            base = open_base(self.base, "a pool")
            known = set() if again else self.index.names()
            auditor = Auditor(base, self.base_names, self.index.base_norms())
            for candidate in candidates:
                if candidate.name in known:
                    continue
                known.add(candidate.name)
                before = set(auditor.norms)
                entry, adapter = auditor.audit(candidate)
                if adapter is not None and entry.verdict != "rejected":
                    entry = self._keep(entry, adapter)
                entry = self._keep_overruling(entry)
                self.index.put(entry, {name: auditor.norms[name] for name in auditor.norms.keys() - before})
                audited += 1
                if on_event:
                    on_event(entry)
            self._compare(base, on_event)
        return Built(audited, self.verdicts())

    def dedupe(
        self,
        owner_cap: int | None = None,
        allow_unknown_licence: bool | None = None,
        *,
        on_event: Callable[[Entry], None] | None = None,
    ) -> dict[str, int]:
        """Compare all with all anew, and ``on_event`` what verdicts this changes. Returns the verdicts."""
        with self._writing():
            self._remember(owner_cap, allow_unknown_licence)
            self._compare(open_base(self.base, "a pool"), on_event)
        return self.verdicts()

    def smoke(
        self,
        texts: Sequence[str] | None = None,
        *,
        limits: Limits | None = None,
        device: str = "cpu",
        again: bool = False,
        on_event: Callable[[Entry], None] | None = None,
    ) -> dict[str, int]:
        """Run the base with each adapter that merges may choose, over a few texts. Returns the verdicts.

        An adapter that destroys the base, or leaves it as it is, is quarantined; ``limits`` say from which figures on,
        are remembered for later calls, and judge those that were tested before by the figures that are noted. Each
        adapter is noted as it is done, so that a test that is killed goes on; ``again`` tests all once more. Raises
        :class:`~merging.errors.InputError` for a base that transformers cannot load.
        """
        from merging.pool.smoke_run import smoke

        with self._writing():
            base = open_base(self.base, "a pool")
            smoke(self, base, texts, limits, device, again, on_event)
            self._compare(base, on_event)
        return self.verdicts()

    def overrule(self, names: Sequence[str], verdict: Literal["ok", "quarantined"] | None, reason: str = "") -> None:
        """Give adapters a verdict of your own, which counts instead of the findings and is kept with its reason.

        It outlasts later audits, tests and comparisons; None takes it back. Raises
        :class:`~merging.errors.OptionError` without a reason, and :class:`~merging.errors.InputError` for adapters that
        are not there, or whose files the pool does not hold.
        """
        if verdict is not None and not reason.strip():
            raise OptionError("why? Whoever uses this pool later wants to know: give a reason")
        with self._writing():
            entries = [self.index.entry(name) for name in names]
            for entry in entries:
                if verdict == "ok" and (not entry.folder or not (self.path / entry.folder).exists()):
                    raise InputError(f"{entry.name}: the pool holds no files of it, so that merges cannot choose it")
            for entry in entries:
                found = [] if verdict is None else [Finding(OVERRULED, verdict, reason.strip())]
                self.index.note_findings(entry.name, OVERRULED, found, {})

    def _keep_overruling(self, entry: Entry) -> Entry:
        """An adapter that was audited once more, with the verdict that a person gave it before."""
        if entry.name not in self.index.names():
            return entry
        kept = [each for each in self.index.entry(entry.name).findings if each.stage == OVERRULED]
        findings = (*entry.findings, *kept)
        return replace(entry, findings=findings, verdict=verdict_of(findings)) if kept else entry

    def remove(self, names: Sequence[str], *, on_event: Callable[[Entry], None] | None = None) -> list[str]:
        """Forget adapters, delete the files that no other one has, and compare what is left. Returns the full names."""
        with self._writing():
            base, removed = (
                open_base(self.base, "a pool"),
                list(dict.fromkeys(self.index.entry(name).name for name in names)),
            )
            self.index.remove(removed)
            self._sweep()
            self._compare(base, on_event)
        return removed

    def _remember(self, owner_cap: int | None, allow_unknown_licence: bool | None) -> None:
        if owner_cap is not None:
            if owner_cap < 1:
                raise OptionError(f"owner_cap = {owner_cap}: at least one adapter of each owner is needed")
            self.index.note(owner_cap=str(owner_cap))
        if allow_unknown_licence is not None:
            self.index.note(allow_unknown_licence=str(allow_unknown_licence))

    def _compare(self, base: Checkpoint, on_event: Callable[[Entry], None] | None) -> None:
        """What only the whole pool tells. An owner's places go to adapters that nothing else speaks against."""
        before = {entry.name: entry.verdict for entry in self.index.entries()}
        stated = self.index.fact("owner_cap") or str(OWNER_CAP)
        if not re.fullmatch("[1-9][0-9]{0,9}", stated):
            raise FormatError(f"{self.path}: its owner_cap is {stated[:20]!r}, and should be a number: set it again")
        cap, licences = int(stated), self.index.fact("allow_unknown_licence")
        kept = [entry for entry in self.index.entries() if entry.folder]
        gone = find_missing(self.path, kept)
        kept = [entry for entry in kept if entry.name not in gone]
        self.index.judge("files", gone)
        order = sorted(kept, key=lambda entry: (-entry.downloads, entry.created or "", entry.name))
        self.index.judge("owners", {})
        self.index.judge("norms", find_outliers(kept))
        self.index.judge("duplicates", duplicates(self.path, base, order))
        self.index.judge("licence", {} if licences == "True" else find_unlicensed(kept))
        usable = {entry.name for entry in self.index.entries(("ok", "repaired"))}
        self.index.judge("owners", find_over_cap([entry for entry in order if entry.name in usable], cap))
        for entry in self.index.entries():
            if on_event and entry.verdict != before[entry.name]:
                on_event(entry)

    def _keep(self, entry: Entry, adapter: Adapter) -> Entry:
        """Copy an adapter's files into the pool, under the hash of its weights and config."""
        weights = adapter.files[0]
        # a config is only of weights that are called as PEFT calls them
        config = [weights.parent / _CONFIG] if weights.stem == "adapter_model" else []
        digest, new = hashlib.sha256(), None
        try:
            with os_calls.delay_signals():
                new = Path(tempfile.mkdtemp(prefix=".new.", dir=self.path / FOLDER))
            for file in (file for file in [weights, *config] if file.is_file()):
                copy(file, new / file.name, digest)
            check_in_place(adapter)  # what was audited is what was copied
            for file in (weights.parent / name for name in KEPT_FILES):
                if is_there(file):
                    copy(file, new / file.name, None)
            place = self.path / FOLDER / digest.hexdigest()[:16]
            if not refuse_link(place).exists():
                new.rename(place)
        except FormatError as error:
            return replace(
                entry, verdict="rejected", findings=(*entry.findings, Finding("values", "rejected", str(error)))
            )
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from None
        finally:
            if new is not None:
                shutil.rmtree(new, ignore_errors=True)
        inside = place if config else place / weights.name
        return replace(entry, sha256=digest.hexdigest(), folder=str(inside.relative_to(self.path)))

    def _sweep(self) -> None:
        """Delete files that belong to no adapter: of removed ones, and of a build that was killed."""
        wanted = {Path(entry.folder).parts[1] for entry in self.index.entries() if entry.folder}
        try:
            (self.path / FOLDER).mkdir(exist_ok=True)
            for folder in (self.path / FOLDER).iterdir():
                if folder.name not in wanted and _KEPT.fullmatch(folder.name):
                    remove(folder)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written to: {error.strerror}") from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        refuse_link(self.path / FOLDER)
        lock = FileLock(refuse_link(self.path / ".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(f"{self.path}: another process is writing to this pool: try again later") from None
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written to: {error.strerror}") from None
        try:
            self._sweep()
            yield
        finally:
            lock.release()
