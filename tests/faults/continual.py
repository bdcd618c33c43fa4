"""Kills and failing disks for the continual store, for real.

    python tests/faults/continual.py --kills 200 --seed 0

Two kinds of harm are done to `merge continual`, each in a process of its own that is forked when everything is
imported, so that the harm falls on the work and not on the imports:

- SIGKILL of `add` (of two models) at random moments of the time that it takes;
- every call that changes the disk (opening for writing, write, allocate, fsync, rename, mkdir, unlink, rmdir) in turn:
  the disk is full from that call on (ENOSPC), or the call fails alone (EIO), or the process is killed in its place.
  Done to init, add, rollback, gc and export.

Afterwards, each time, the store must open, verify must find nothing, and finishing the adds must give states and an
export of the same bytes as a run that nothing disturbed. Also counted: what was left over that no step needs, and
failures told by a traceback. Three streams: full checkpoints by opcm, adapters by opcm (factors), and full checkpoints
by ties (four files a state). One line sums it up; the exit code is 1 if anything of that went wrong.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import (
    count_errors,
    count_names,
    every_harm,
    make_parser,
    renew,
    report,
    run_undisturbed,
    sample_of,
    sha256,
    work_folder,
)
from saboteur import Ended, Saboteur, command

from merging.continual import ContinualStore
from merging.errors import FormatError
from support.tiny import adapters, checkpoint


@dataclass(frozen=True, slots=True)
class Stream:
    """Models for one store, the stores of one and of all of them, and what the latter holds undisturbed."""

    name: str
    base: Path
    models: list[Path]
    settings: list[str]
    kind: str
    begun: Path
    complete: Path
    wanted: dict[str, str]

    def contents(self, store: Path, scratch: Path) -> dict[str, str]:
        """The hashes of all that must not depend on what happened: states, steps but for their time, an export."""
        opened = ContinualStore(store)
        steps = [step.model_dump(exclude={"time"}) for step in opened.manifest().steps]
        shutil.rmtree(scratch, ignore_errors=True)
        opened.export(scratch, kind=self.kind, threads=1)
        last = [store / part.file for part in opened.manifest().steps[-1].parts.values()]
        exported = {f"export/{path.name}": sha256(path) for path in sorted(scratch.iterdir())}
        held = {str(path.relative_to(store)): sha256(path) for path in last}
        return {"steps": json.dumps(steps), **held, **exported}


def streams(folder: Path) -> list[Stream]:
    """The three streams, each with an undisturbed run."""
    full = checkpoint(folder / "full", 3, layers=2)
    factored = adapters(folder / "factored", 3)
    return [
        _stream(folder, "full, opcm", *full, ["--method", "opcm"], "model"),
        _stream(folder, "adapters, opcm", *factored, ["--method", "opcm"], "adapter"),
        _stream(folder, "full, ties", *full, ["--method", "ties"], "model"),
    ]


def _stream(folder: Path, name: str, base: Path, models: list[Path], settings: list[str], kind: str) -> Stream:
    begun, complete = (folder / f"{name.replace(', ', '-')}-{what}" for what in ("begun", "complete"))
    stream = Stream(name, base, models, settings, kind, begun, complete, {})
    run_undisturbed(init_words(stream, begun))
    run_undisturbed(add_words(begun, models[:1]))
    shutil.copytree(begun, complete)
    run_undisturbed(add_words(complete, models[1:]))
    stream.wanted.update(stream.contents(complete, folder / "exported"))
    return stream


def init_words(stream: Stream, store: Path) -> list[str]:
    return ["continual", "init", str(store), "--base", str(stream.base), *stream.settings]


def add_words(store: Path, models: Sequence[Path]) -> list[str]:
    return ["continual", "add", str(store), *map(str, models), "--threads", "1", "--quiet"]


@dataclass(slots=True)
class Tally:
    """What happened, and everything that should not have."""

    moments: Counter[str] = field(default_factory=Counter)
    failing: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)
    leftover: list[str] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The summary."""
        when = ", ".join(f"{self.moments[name]} {name}" for name in sorted(self.moments)) or "none"
        calls, errors = count_names(self.failing), count_errors(self.errors)
        return (
            f"{sum(self.moments.values())} kills at random moments ({when}); "
            f"{sum(self.errors.values())} failing calls ({errors}; {calls}); "
            f"stores damaged: {len(self.damaged)}, leaving litter: {len(self.leftover)}, "
            f"failures told by a traceback: {len(self.untold)}"
        )


def inspect(stream: Stream, store: Path, what: str, tally: Tally, models: Sequence[Path]) -> None:
    """Open, verify, finish the adds of ``models`` and compare with the undisturbed run."""
    try:
        opened = ContinualStore(store)
        problems = list(opened.verify().problems)
        for model in models:
            opened.add(model, threads=1)
        found = stream.contents(store, store.parent / "exported")
        problems += [f"{name} is different" for name in stream.wanted if found.get(name) != stream.wanted[name]]
        problems += opened.verify().problems
    except Exception as error:
        problems = [f"{type(error).__name__}: {error}"]
    if problems:
        tally.damaged.append(f"{stream.name}: {what}: {problems[0]}")
    elif litter := litter_of(store):
        tally.leftover.append(f"{stream.name}: {what}: {litter}")


def litter_of(store: Path) -> list[str]:
    """What lies in a store without belonging to a step."""
    known = {Path(part.file).parent.name for s in ContinualStore(store).manifest().steps for part in s.parts.values()}
    # what could not be removed has a name that the next writer removes
    odd = [path.name for path in (store / "states").iterdir() if path.name not in known]
    odd = [name for name in odd if not name.startswith(".unfinished.0")]
    expected = ("manifest.json", "states", ".lock")
    small = re.compile(r"\.manifest\.json\..*\.new")  # the next writer removes it
    names = [path.name for path in store.iterdir() if not small.fullmatch(path.name)]
    return sorted(odd + [name for name in names if name not in expected])


def kill_at_random(stream: Stream, kills: int, chance: random.Random, folder: Path, tally: Tally) -> None:
    """SIGKILL `add` of two models that many times, evenly over the time that it takes."""
    store = folder / "store"
    usual = sorted(_timed(stream, store) for _ in range(5))[-2]
    for _ in range(kills):
        renew(store, stream.begun)
        moment = chance.uniform(0, usual)
        command(add_words(store, stream.models[1:]), kill_after=moment)
        what = f"kill after {1000 * moment:.1f} ms"
        try:
            steps = len(ContinualStore(store).manifest().steps)
        except Exception as error:
            tally.damaged.append(f"{stream.name}: {what}: {type(error).__name__}: {error}")
            continue
        tally.moments[("before the first commit", "between both", "after the last")[steps - 1]] += 1
        inspect(stream, store, what, tally, stream.models)


def _timed(stream: Stream, store: Path) -> float:
    renew(store, stream.begun)
    return command(add_words(store, stream.models[1:])).seconds


def fail_in_turn(stream: Stream, folder: Path, tally: Tally, chance: random.Random, sample: int | None) -> None:
    """Let each disk-changing call of each command fail, or ``sample`` of them, chosen by ``chance``."""
    store, output = folder / "store", folder / "output"
    commands: dict[str, tuple[Path | None, list[str]]] = {
        "init": (None, init_words(stream, store)),
        "add": (stream.begun, add_words(store, stream.models[1:])),
        "add and keep": (stream.begun, [*add_words(store, stream.models[1:]), "--keep", "1"]),
        "rollback": (stream.complete, ["continual", "rollback", str(store), "--to", "1"]),
        "gc": (stream.complete, ["continual", "gc", str(store), "--keep", "1"]),
        "export": (stream.complete, ["continual", "export", str(store), "-o", str(output), "--as", stream.kind]),
    }
    cases: list[tuple[str, int, str, str]] = []
    for name, (template, words) in commands.items():
        renew(store, template)
        renew(output)
        dry = run_undisturbed(words)
        cases += [(name, *harm) for harm in every_harm(dry.calls)]
    for name, turn, call, error in sample_of(cases, sample, chance):
        template, words = commands[name]
        renew(store, template)
        renew(output)
        ended = command(words, Saboteur(turn, error))
        tally.errors[error] += 1
        tally.failing[call] += 1
        what = f"{name}, call {turn} ({call}): {error}"
        _told(stream, ended, what, store, name, tally)
        if name == "init":
            _finish_init(stream, store, what, tally)
        inspect(stream, store, what, tally, [] if name in ("gc", "export") else stream.models)
        if name == "export":
            _finish_export(stream, words, output, what, tally)


def _told(stream: Stream, ended: Ended, what: str, store: Path, name: str, tally: Tally) -> None:
    """A failure is told as one message; and what was refused leaves nothing behind but what its removal failed on."""
    if ended.code is None:
        return
    if ended.code not in (0, 1) or "Traceback" in ended.said:
        last = ended.said.strip().splitlines()[-1:]
        tally.untold.append(f"{stream.name}: {what}: exit code {ended.code}: {last}")
    removing = "unlink" in what or "rmdir" in what
    if ended.code and name.startswith("add") and not removing and (litter := litter_of(store)):
        tally.leftover.append(f"{stream.name}: {what}: refused, and {litter} stays")


def _finish_init(stream: Stream, store: Path, what: str, tally: Tally) -> None:
    """A store that was not made can be made; one that was made has its models still to come."""
    try:
        ContinualStore(store)
    except FormatError:
        ended = command(init_words(stream, store))
        if ended.code != 0:
            tally.damaged.append(f"{stream.name}: {what}: init again: {ended.said.strip()}")
            renew(store)
            run_undisturbed(init_words(stream, store))


def _finish_export(stream: Stream, words: list[str], output: Path, what: str, tally: Tally) -> None:
    """An export is there whole or not at all, and can be done again."""
    run_undisturbed([*words, "--overwrite"])
    found = {f"export/{path.name}": sha256(path) for path in output.iterdir()}
    if any(found.get(name) != sha for name, sha in stream.wanted.items() if name.startswith("export/")):
        tally.damaged.append(f"{stream.name}: {what}: exported again, it is different")
    # killed, or unable to remove anything, before it has a name of its own, a merge leaves an empty folder
    litter = [path for path in output.parent.glob(".output*") if path.suffix != ".new"]
    if litter:
        tally.leftover.append(f"{stream.name}: {what}: {[path.name for path in litter]}")
    for path in litter:
        shutil.rmtree(path)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200, help="at random moments, over all streams")
    args = parser.parse_args()
    began, tally = time.perf_counter(), Tally()
    with work_folder(args) as (folder, chance):
        made = streams(folder)
        for number, stream in enumerate(made):
            share = len(range(number, args.kills, len(made)))
            if share:
                kill_at_random(stream, share, chance, folder, tally)
            fail_in_turn(stream, folder, tally, chance, args.calls)
    problems = {"damaged": tally.damaged, "leftover": tally.leftover, "untold": tally.untold}
    report("continual", tally.line(), problems, args.show, began)


if __name__ == "__main__":
    main()
