"""Merges that are killed or that fail at any point, again and again, and go on with --resume.

    python tests/faults/merges.py

Every kind of merge (a full model, one in shards, by statistics of the whole model, with changes set aside, adapters, an
adapter's ranks by energy, a baked adapter, a recipe with stages, an output that is replaced) is begun with --resume and
stopped at a random call that changes the disk: killed, or the disk is full, or the call fails. It is begun again and
stopped again until it ends. Entries of the journal are written as fast as the disk allows.

Afterwards, each time: the bytes are those of a run that nothing disturbed, nothing is left next to the output, and in
between an output to be replaced is the old one or the new one, whole. A failure is told in one message.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from harness import count_errors, make_parser, renew, report, run_undisturbed, sha256, work_folder
from saboteur import ERRORS, Saboteur, command

from merging.engine import journal
from support.tiny import adapters, checkpoint

_MOST = 60
"""Stops of one merge, after which it is left alone."""


@dataclass(frozen=True, slots=True)
class Case:
    """A merge: its name, its words, and the old output that it replaces."""

    name: str
    words: list[str]
    output: Path
    old: Path | None = None


@dataclass(slots=True)
class Tally:
    """Numbers of stops by error, of runs that went on with finished work, and all that should not have happened."""

    errors: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The summary."""
        stops = f"{sum(self.errors.values())} stops ({count_errors(self.errors)})"
        return f"{stops}, {self.resumed} of them with finished work; wrong: {len(self.wrong)}"


def bytes_at(path: Path) -> dict[str, str] | None:
    """The hashes of all files of an output; None if there is none."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): sha256(file) for file in files}


def cases(folder: Path) -> list[Case]:
    """All kinds of merges."""
    root, tuned = checkpoint(folder / "models", 3, layers=2)
    origin, changes = adapters(folder / "adapters", 2)
    models, factored = [str(path) for path in tuned], [str(path) for path in changes]
    out, file, old = folder / "work" / "out", folder / "work" / "out.safetensors", folder / "old"
    recipe = folder / "stages.yml"
    stage = {"models": models, "method": "ties", "base": str(root)}
    recipe.write_text(json.dumps({"models": [stage, models[0]], "method": "karcher"}))
    full = [*models, "--base", str(root), "-o", str(out)]
    run_undisturbed(["--method", "linear", *models, "-o", str(old), "--quiet"])
    return [
        Case("a model", ["--method", "linear", *full], out),
        Case("shards", ["--method", "task_arithmetic", *full, "--shard-size", "3000"], out),
        Case("statistics", ["--method", "ties", *full], out),
        Case("set aside", ["--method", "lines+tsv", *full], out),
        Case("an adapter", ["--method", "ties", *factored, "-o", str(out)], out),
        Case("ranks", ["--method", "linear", *factored, "-o", str(out), "--energy", "0.9"], out),
        Case("a file", ["--method", "linear", *factored, "-o", str(file)], file),
        Case("baked", ["bake", factored[0], "--base", str(origin), "-o", str(out)], out),
        Case("stages", ["run", str(recipe), "-o", str(out)], out),
        Case("over a model", ["--method", "ties", *full, "--overwrite"], out, old),
    ]


def stop_until_done(case: Case, wanted: object, calls: int, chance: random.Random, tally: Tally) -> None:
    """Begin a merge again and again, each time stopped at a random call, until it ends."""
    work = case.output.parent
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    renew(case.output, case.old)
    before = bytes_at(case.output)
    words = [*case.words, "--resume", "--threads", "1", "--quiet"]
    for number in range(_MOST):
        error = chance.choice(ERRORS)
        turn = chance.randrange(1, calls + 2)
        ended = command(words, Saboteur(turn, error) if number < _MOST - 1 else Saboteur())
        what = f"{case.name}, stop {number}, call {turn}: {error}"
        found = bytes_at(case.output)
        tally.errors[error] += ended.code != 0
        tally.resumed += any(work.glob(".*.partial/journal/*.jsonl"))
        if ended.code not in (0, 1, None) or "Traceback" in ended.said:
            tally.wrong.append(f"{what}: exit code {ended.code}: {ended.said.strip().splitlines()[-1:]}")
        if found not in (before, wanted) and not any(work.glob(".*.partial/old")):
            tally.wrong.append(f"{what}: the output is neither the old nor the new one")
        if ended.code == 1 and "exists already" in ended.said and found == wanted:
            break  # it was killed between its last two calls
        if ended.code == 0:
            break
    if bytes_at(case.output) != wanted:
        tally.wrong.append(f"{case.name}: the bytes differ: {ended.said.strip()[-300:]}")
    left = [path.name for path in work.iterdir() if path != case.output]
    if left and ended.code == 0:
        tally.wrong.append(f"{case.name}: {left} stays")


def run(folder: Path, repeats: int, chance: random.Random, only: list[str]) -> Tally:
    """Do this to every kind of merge."""
    tally = Tally()
    for case in cases(folder):
        if only and case.name not in only:
            continue
        work = case.output.parent
        work.mkdir(exist_ok=True)
        renew(case.output, case.old)
        words = [*case.words, "--threads", "1", "--quiet"]
        dry = run_undisturbed([*words, "--resume"], Saboteur())
        wanted = bytes_at(case.output)
        shutil.rmtree(work)
        work.mkdir()
        renew(case.output, case.old)
        run_undisturbed(words)
        if bytes_at(case.output) != wanted:
            tally.wrong.append(f"{case.name}: with --resume the bytes differ")
        for _ in range(repeats):
            stop_until_done(case, wanted, len(dry.calls), chance, tally)
    return tally


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", action="append", default=[], help="this kind only; may repeat")
    parser.add_argument("--repeats", type=int, default=5, help="merges of each kind")
    args = parser.parse_args()
    began = time.perf_counter()
    journal._PERIOD = 0.001
    with work_folder(args) as (folder, chance):
        tally = run(folder, args.repeats, chance, args.only)
    report("merges", tally.line(), {"wrong": tally.wrong}, args.show, began)


if __name__ == "__main__":
    main()
