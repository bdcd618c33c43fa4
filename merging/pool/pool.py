"""A pool on disk: an index, and the files of every adapter that was not rejected."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock, Timeout

from merging.cluster import RayCluster
from merging.display.tables import Table, Tabular, plural
from merging.engine.evaluation import make_evaluation_cluster
from merging.errors import InputError, OptionError, OutputError
from merging.hub.address import local_path
from merging.hub.open_model import open_base
from merging.pool.audit import Candidate
from merging.pool.cross_checks import OWNER_CAP, cross_check, store_limits
from merging.pool.entry import OVERRULED, VERDICTS, Built, Entry, Finding
from merging.pool.files import FOLDER, holds_something, sweep
from merging.pool.index import Index
from merging.sources.links import refuse_link
from merging.type_checks import check_types
from merging.version import former_parameters

if TYPE_CHECKING:
    from merging.pool.smoke import Limits

__all__ = ["OWNER_CAP", "Pool"]

_log = logging.getLogger(__name__)


class Pool(Tabular):
    """Adapters of one base in a folder: ``pool.sqlite``, and the files of each under ``adapters/``.

    An adapter is audited once and noted with all findings, whatever its verdict: no adapter is dropped silently. After
    a kill, the next build continues with the next adapter. One process writes at a time, and readers do not wait.

    Args:
        path: The folder of an existing pool; :meth:`create` makes a new one.

    Raises:
        merging.errors.InputError: If the folder is not a pool.
        merging.errors.FormatError: If its index is damaged or was altered.
    """

    @check_types()
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = Index(self.path)
        refuse_link(self.path / FOLDER)

    @classmethod
    @check_types()
    def create(cls, path: str | Path, base: str | Path, base_names: Sequence[str] = ()) -> Pool:
        """Create an empty pool. After a kill, it can be created again.

        Args:
            path: The folder to create.
            base: The path or address of the base.
            base_names: Other names that adapters use for the base.

        Returns:
            The pool.

        Raises:
            merging.errors.OutputError: If the folder holds something.
            merging.errors.InputError: If the base is an adapter, or does not exist.
        """
        path, opened = Path(path), open_base(base, "a pool")
        if path.exists() and (not path.is_dir() or holds_something(path)):
            raise OutputError(f"{path}: exists already: choose another folder for the pool")
        stated = opened.config.get("_name_or_path")
        own = str(opened.origin) if opened.origin else str(local_path(str(base)).resolve())
        repo = [opened.origin.repo] if opened.origin else []
        names = [*base_names, *repo, *([stated] if isinstance(stated, str) and stated else []), own]
        try:
            (path / FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path}: cannot be created: {error.strerror}") from None
        Index.create(path, base=own, base_names="\n".join(dict.fromkeys(names))).close()
        return cls(path)

    def _display_table(self) -> Table:
        verdicts = self.verdicts()
        title = f"Pool {self.path}: {plural(sum(verdicts.values()), 'adapter')} of {self.base}"
        return Table(title, ("verdict", "adapters"), rows=list(verdicts.items()))

    @property
    def base(self) -> str:
        """The path or address of the base."""
        return self.index.fact("base") or ""

    @property
    def base_names(self) -> tuple[str, ...]:
        """All names of the base."""
        return tuple((self.index.fact("base_names") or "").split("\n"))

    @check_types()
    def add_base_names(self, names: Sequence[str]) -> None:
        """Add names that adapters use for the base."""
        self.index.note(base_names="\n".join(dict.fromkeys([*names, *self.base_names])))

    also_called = add_base_names  # its name in version 0.1

    def verdicts(self) -> dict[str, int]:
        """Return the number of adapters with each verdict."""
        counted = Counter(entry.verdict for entry in self.index.entries())
        return {verdict: counted[verdict] for verdict in VERDICTS}

    def usable(self) -> list[tuple[Entry, Path]]:
        """Return the adapters that merges may choose, with the paths of their files."""
        return [(e, e.place(self.path)) for e in self.index.entries(("ok", "repaired")) if e.folder]

    @former_parameters({"tell": "on_event"})
    @check_types()
    def build(
        self,
        candidates: Iterable[Candidate],
        *,
        again: bool = False,
        owner_cap: int | None = None,
        allow_unknown_licence: bool | None = None,
        engine: str | RayCluster = "local",
        address: str | None = None,
        on_event: Callable[[Entry], None] | None = None,
    ) -> Built:
        """Audit new adapters, keep their files, and compare all adapters of the pool.

        Args:
            candidates: The adapters to audit.
            again: Whether known adapters are audited again.
            owner_cap: The most usable adapters of one owner; ten at first. It is stored for later calls.
            allow_unknown_licence: Whether adapters without a license are usable; False at first. It is stored too.
            engine: ``local`` to read values here, ``ray``, or a :class:`~merging.cluster.RayCluster` with settings.
            address: The address of the Ray cluster, ``HOST:PORT`` or ``auto``.
            on_event: Receives every audited adapter, and every adapter whose verdict the comparison changes.

        Returns:
            The number of audited adapters, and all verdicts.

        Raises:
            merging.errors.MergingError: For an error of the pool, its base, or the network. Defects of an adapter are
                findings.
        """
        from merging.pool.build_run import audit_each

        cluster, audited = make_evaluation_cluster(engine, address), 0
        with self._writing():
            store_limits(self.index, owner_cap, allow_unknown_licence)
            base = open_base(self.base, "a pool")
            with closing(audit_each(self, base, candidates, again=again, cluster=cluster)) as entries:
                for entry in entries:
                    audited += 1
                    _log.info("%s: %r: %s", self.path, entry.name, entry.verdict)
                    if on_event:
                        on_event(entry)
            cross_check(self.path, self.index, base, on_event)
        return Built(audited, self.verdicts())

    @former_parameters({"tell": "on_event"})
    @check_types()
    def dedupe(
        self,
        owner_cap: int | None = None,
        allow_unknown_licence: bool | None = None,
        *,
        on_event: Callable[[Entry], None] | None = None,
    ) -> dict[str, int]:
        """Compare all adapters of the pool again.

        Args:
            owner_cap: As in :meth:`build`.
            allow_unknown_licence: As in :meth:`build`.
            on_event: Receives every adapter whose verdict changes.

        Returns:
            The number of adapters with each verdict.
        """
        with self._writing():
            store_limits(self.index, owner_cap, allow_unknown_licence)
            cross_check(self.path, self.index, open_base(self.base, "a pool"), on_event)
        return self.verdicts()

    @former_parameters({"tell": "on_event"})
    def smoke(
        self,
        texts: Sequence[str] | None = None,
        *,
        limits: Limits | None = None,
        device: str = "cpu",
        again: bool = False,
        engine: str | RayCluster = "local",
        address: str | None = None,
        on_event: Callable[[Entry], None] | None = None,
    ) -> dict[str, int]:
        """Run the base with each usable adapter over a few texts, and quarantine adapters that fail.

        An adapter fails if it destroys the base, or does not change its outputs. Each adapter is noted when it is done,
        so that a killed test continues.

        Args:
            texts: The texts; English ones by default.
            limits: The limits of the figures. They are stored for later calls, and applied to earlier tests.
            device: The device that the base runs on.
            again: Whether adapters that were tested before are tested again.
            engine: ``local`` to run here, ``ray``, or a :class:`~merging.cluster.RayCluster` with settings.
            address: The address of the Ray cluster, ``HOST:PORT`` or ``auto``.
            on_event: Receives every tested adapter, and every adapter whose verdict changes.

        Returns:
            The number of adapters with each verdict.

        Raises:
            merging.errors.InputError: For a base that transformers cannot load, and for a cluster that does not answer
                or whose workers do not see the files.
            merging.errors.OptionError: For an engine or a device that cannot be used.
        """
        from merging.pool.smoke_run import smoke

        cluster = make_evaluation_cluster(engine, address, device)
        with self._writing():
            base = open_base(self.base, "a pool")
            smoke(
                self,
                base,
                texts=texts,
                limits=limits,
                device=device,
                again=again,
                cluster=cluster,
                on_event=on_event,
            )
            cross_check(self.path, self.index, base, on_event)
        return self.verdicts()

    @check_types()
    def overrule(self, names: Sequence[str], verdict: Literal["ok", "quarantined"] | None, reason: str = "") -> None:
        """Give adapters a verdict of your own, which overrules the findings and outlasts later checks.

        Args:
            names: Names as in :meth:`~merging.pool.index.Index.entry`.
            verdict: The verdict, or None to withdraw an earlier one.
            reason: The reason, which a verdict needs.

        Raises:
            merging.errors.OptionError: Without a reason.
            merging.errors.InputError: For adapters that are not in the pool, or whose files it does not hold.
        """
        if verdict is not None and not reason.strip():
            raise OptionError("later users of this pool need to know why: give a reason")
        with self._writing():
            entries = [self.index.entry(name) for name in names]
            for entry in entries:
                if verdict == "ok" and (not entry.folder or not (self.path / entry.folder).exists()):
                    raise InputError(f"{entry.name}: the pool holds no files of it, so that merges cannot choose it")
            for entry in entries:
                found = [] if verdict is None else [Finding(OVERRULED, verdict, reason.strip())]
                self.index.note_findings(entry.name, OVERRULED, found, {})

    @former_parameters({"tell": "on_event"})
    @check_types()
    def remove(self, names: Sequence[str], *, on_event: Callable[[Entry], None] | None = None) -> list[str]:
        """Remove adapters with their files, and compare the others again.

        Args:
            names: Names as in :meth:`~merging.pool.index.Index.entry`.
            on_event: Receives every adapter whose verdict the comparison changes.

        Returns:
            The full names of the removed adapters.
        """
        with self._writing():
            base = open_base(self.base, "a pool")
            removed = list(dict.fromkeys(self.index.entry(name).name for name in names))
            self.index.remove(removed)
            sweep(self.path, self.index.entries())
            cross_check(self.path, self.index, base, on_event)
        return removed

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
            sweep(self.path, self.index.entries())
            yield
        finally:
            lock.release()
