"""Kills and failing disks for everything that writes an output, for real.

    python tests/faults/landing.py

Every call that changes the disk (opening for writing, write, allocate, fsync, rename, exchange, mkdir, unlink, rmdir)
in turn: the disk is full from that call on (ENOSPC), or the call fails alone (EIO), or the process is killed in its
place. Done to merges into a folder of shards, an adapter's folder and a file, to the same over an old output, with and
without file systems that can exchange two names, to packs, and to pools.

Afterwards, each time: the old output is there or the new one, whole, or none if there was none; a failure is told in
one message, which is true; what was not removed is named in it; and the same command, given again, gives the bytes of
a run that nothing disturbed and removes all that was left. One line sums it up; the exit code is 1 if anything of that
went wrong.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
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

from merging.errors import MergingError
from merging.pool import Pool
from support.tiny import adapters, checkpoint


@dataclass(frozen=True, slots=True)
class Case:
    """A command that makes ``output``, over an old one if there is a template of it; ``look`` says what lies there."""

    name: str
    words: list[str]
    output: Path
    look: Callable[[Path], object]
    old: Path | None = None
    exchanges: bool = True

    def again(self) -> list[str]:
        """The words that make the output whatever lies there."""
        return self.words if "pool" in self.words or "--overwrite" in self.words else [*self.words, "--overwrite"]


@dataclass(slots=True)
class Tally:
    """What happened, and everything that should not have."""

    errors: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The summary."""
        counts = f"{count_errors(self.errors)}; {count_names(self.calls)}"
        return f"{sum(self.errors.values())} failing calls ({counts}); wrong: {len(self.wrong)}"


def bytes_at(path: Path) -> object:
    """The hashes of all files of an output; None if there is none."""
    if not os.path.lexists(path):
        return None
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): sha256(file) for file in files}


def verdicts_at(path: Path) -> object:
    """The adapters of a pool and their verdicts; None where there is no pool yet."""
    try:
        pool = Pool(path)
    except MergingError:
        return None
    return {entry.name: (entry.verdict, entry.sha256) for entry in pool.index.entries()}


def cases(folder: Path) -> list[Case]:
    """All commands, with old outputs to replace."""
    root, tuned = checkpoint(folder / "models", 2, layers=1)
    base, factored = adapters(folder / "adapters", 2)
    models, changes = [str(path) for path in tuned], [str(path) for path in factored]
    out, file, pool = (folder / "work" / name for name in ("out", "out.safetensors", "pool"))
    quiet = ["--threads", "1", "--quiet"]

    def merge(inputs: list[str], to: Path, *more: str) -> list[str]:
        return ["--method", "linear", *inputs, "-o", str(to), *more, *quiet]

    shards = ("--shard-size", "600")
    to_folder = merge(models, out, *shards)
    old = {path: folder / f"old{path.suffix}" for path in (out, file)}
    for path in (out, file):
        run_undisturbed(merge(models, old[path], "--weights", "0.9,0.1"))
    over = [*merge(models, out, *shards), "--overwrite"]
    build = ["pool", "build", str(pool), "--base", str(base), "--base-name", "tiny/base", *changes]
    recipe = folder / "stages.yml"
    stage = {"models": models, "method": "ties", "base": str(root)}
    recipe.write_text(json.dumps({"models": [stage, models[0]], "method": "linear"}))
    return [
        Case("stages", ["run", str(recipe), "-o", str(out), *quiet], out, bytes_at),
        Case("a folder", to_folder, out, bytes_at),
        Case("a file", merge(models, file), file, bytes_at),
        Case("an adapter", merge(changes, out), out, bytes_at),
        Case("over a folder", over, out, bytes_at, old[out]),
        Case("over a folder, no exchange", over, out, bytes_at, old[out], exchanges=False),
        Case("over a file", [*merge(models, file), "--overwrite"], file, bytes_at, old[file]),
        Case("a pack", ["compress", changes[0], "-o", str(file)], file, bytes_at),
        Case("a pool", build, pool, verdicts_at),
    ]


def _fresh(case: Case) -> None:
    """An empty place to work, with the old output in it."""
    work = case.output.parent
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    renew(case.output, case.old)


def _hidden(case: Case) -> list[str]:
    return sorted(path.name for path in case.output.parent.iterdir() if path != case.output)


def harm(case: Case, turn: int, call: str, error: str, wanted: object, tally: Tally) -> None:
    """Do one harm, and look at what is left."""
    _fresh(case)
    before = case.look(case.output)
    ended = command(case.words, Saboteur(turn, error, case.exchanges))
    tally.errors[error] += 1
    tally.calls[call] += 1
    what = f"{case.name}, call {turn} ({call}): {error}"
    found = case.look(case.output)
    aside = found is None and (ended.code is None or "moves it back" in ended.said)
    if "pool" not in case.words and found != wanted and found != before and not aside:
        tally.wrong.append(f"{what}: the output is neither the old nor the new one")
    if ended.code is not None:
        tally.wrong += [f"{what}: {each}" for each in _untrue(case, ended, found, wanted)]
    if found is None and before is not None:  # stopped between two renames: the next merge puts it right
        refused = command([word for word in case.words if word != "--overwrite"])
        if refused.code != 1 or "exists already" not in refused.said or case.look(case.output) != before:
            tally.wrong.append(f"{what}: the old output is not put back: {refused.said}")
        _fresh(case)
        command(case.words, Saboteur(turn, error, case.exchanges))
    ended = command(case.again() if found is not None else case.words, Saboteur(exchanges=case.exchanges))
    if ended.code != 0 or case.look(case.output) != wanted:
        tally.wrong.append(f"{what}: done again, it is different: {ended.said}")
    elif hidden := _hidden(case):
        tally.wrong.append(f"{what}: done again, {hidden} stays")


def _untrue(case: Case, ended: Ended, found: object, wanted: object) -> list[str]:
    """What a command that was not killed said wrongly."""
    problems = []
    if ended.code not in (0, 1) or "Traceback" in ended.said or (ended.code and ended.said.count("Error: ") != 1):
        problems.append(f"exit code {ended.code}: {ended.said.strip().splitlines()[-1:]}")
    if ended.code == 0 and found != wanted:
        problems.append("exit code 0 without the output")
    if ended.code and found == wanted and "pool" not in case.words and "is in place" not in ended.said:
        problems.append(f"the output is in place, and it says: {ended.said.strip()}")
    return problems + [
        f"{name} stays, unsaid: {ended.said.strip()}" for name in _hidden(case) if name not in ended.said
    ]


def run(folder: Path, sample: int | None, chance: random.Random, only: Sequence[str]) -> Tally:
    """Do every harm to every command, or ``sample`` of them to each."""
    tally = Tally()
    for case in cases(folder):
        if only and case.name not in only:
            continue
        _fresh(case)
        dry = run_undisturbed(case.words, Saboteur(exchanges=case.exchanges))
        wanted = case.look(case.output)
        for turn, call, error in sample_of(every_harm(dry.calls), sample, chance):
            harm(case, turn, call, error, wanted, tally)
    return tally


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", action="append", default=[], help="this command only; may repeat")
    args = parser.parse_args()
    began = time.perf_counter()
    with work_folder(args) as (folder, chance):
        tally = run(folder, args.calls, chance, args.only)
    report("landing", tally.line(), {"wrong": tally.wrong}, args.show, began)


if __name__ == "__main__":
    main()
