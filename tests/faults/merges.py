"""Merges that are killed or that fail at any point, again and again, and go on with --resume.

    python tests/faults/merges.py --stops 2700

Every kind of merge (tests/faults/merge_cases.py) is begun with --resume and stopped at a random call that changes the
disk or reads from it: the process is killed, the power is cut, the disk is full or takes no changes any more, or the
call fails. It is begun again and stopped again until it ends; now and then `merge clean --remove` comes in between.
Entries of the journal are written as fast as the disk allows.

Afterwards, each time: the bytes are those of a run that nothing disturbed, nothing is left next to the output, and in
between an output to be replaced is the old one or the new one, whole. A failure is told in one message.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import make_parser, renew, report, run_undisturbed, sha256, work_folder
from merge_cases import Case, make_cases
from saboteur import DEADLY, Ended, Saboteur, command, errors_at

from merging.engine import journal

_MOST = 40
"""Stops of one merge, after which it is left alone."""

_DEADLY, _CLEANED = 0.25, 0.1
"""The shares of stops that end the process, and of stops after which leftovers are removed."""

Found = dict[str, str] | None
"""The hashes of an output's files; None if there is no output."""


@dataclass(slots=True)
class Tally:
    """Numbers of harms, of runs that went on with finished work, and all that should not have happened."""

    errors: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    cleaned: int = 0
    merges: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def stops(self) -> int:
        return self.errors.total()

    def line(self) -> str:
        """The summary."""
        ends = sum(self.errors[each] for each in DEADLY)
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.errors.items()))
        return (
            f"{ends} ends and {self.stops - ends} failing calls ({counts}) of {self.merges} merges of "
            f"{len(self.kinds)} kinds, {self.resumed} of them with finished work, {self.cleaned} cleaned; "
            f"wrong: {len(self.wrong)}"
        )


def files_at(path: Path) -> Found:
    """Return the hashes of all files of an output."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): sha256(file) for file in files}


class Stopping:
    """One merge that is stopped again and again until it ends."""

    def __init__(self, case: Case, wanted: Found, calls: Sequence[str], chance: random.Random, tally: Tally) -> None:
        self.case, self.wanted, self.chance, self.tally = case, wanted, chance, tally
        self.turns: dict[str, list[int]] = {}
        for turn, call in enumerate(calls, 1):
            self.turns.setdefault(call, []).append(turn)
        start_over(case)
        self.before = self.found = files_at(case.output)
        self.work = case.output.parent

    def run(self) -> None:
        """Do it, and look at what is left each time."""
        for number in range(_MOST):
            ended, what, harmed = self._stop(last=number == _MOST - 1)
            if ended.code == 0 or (ended.code == 1 and files_at(self.case.output) == self.wanted):
                break  # also where it was killed, or failed, between its last two calls
            if self.chance.random() < _CLEANED:
                self._clean(what, self.before)
        if files_at(self.case.output) != self.wanted:
            self._note(what, f"the bytes differ: {ended.said.strip()[-300:]}")
        left = [path.name for path in self.work.iterdir() if path != self.case.output]
        if left and ended.code == 0 and not harmed:  # a folder that cannot be removed, or looked into, is for `clean`
            self._note(what, f"{left} stays")
        self._clean(what, self.wanted)
        self.tally.merges += 1
        self.tally.kinds[self.case.name] += 1

    def _stop(self, last: bool) -> tuple[Ended, str, bool]:
        """Begin the merge once, with a harm unless it is the last time.

        Return its end, the harm in words, and whether it came to it.
        """
        case, tally = self.case, self.tally
        call = self.chance.choice(sorted(self.turns))
        turn = self.chance.choice(self.turns[call])
        others = [error for error in errors_at(call) if error not in DEADLY]
        error = self.chance.choice(DEADLY if self.chance.random() < _DEADLY else others)
        tally.resumed += any(self.work.glob(".*.partial/journal/*.jsonl"))
        saboteur = Saboteur(None if last else turn, error, case.exchanges, reads=self.work.parent)
        ended = command(words_of(case), saboteur)
        what = f"{case.name}, call {turn} ({call}): {error}"
        harmed = not last and (ended.code is None or len(ended.calls) >= turn)
        tally.errors += Counter({error: 1} if harmed else {})
        former, self.found = self.found, files_at(case.output)
        found, said = self.found, ended.said.strip()
        aside = found is None and any(self.work.glob(".*.partial/old"))
        if found not in (self.before, self.wanted) and not (aside and (ended.code is None or "moves it back" in said)):
            self._note(what, f"the output is neither the old nor the new one: {said}")
        if ended.code not in (0, 1, None) or "Traceback" in said or (ended.code == 1 and said.count("Error: ") != 1):
            self._note(what, f"exit code {ended.code}: {_last_lines(said)}")
        if ended.code == 0 and found != self.wanted:
            self._note(what, "exit code 0 without the output")
        if ended.code == 1 and found == self.wanted != former and "is in place" not in said:
            self._note(what, f"the output is in place, and it says: {said}")
        return ended, what, harmed

    def _clean(self, what: str, allowed: Found) -> None:
        """Remove leftovers, and look that the output alone is left."""
        for path in self.work.iterdir():
            if path.is_file():
                os.utime(path, (1, 1))  # a file that is to be renamed may have a writer for a minute
        ended = command(["clean", str(self.work), "--remove"])
        self.tally.cleaned += 1
        found, left = files_at(self.case.output), [path.name for path in self.work.iterdir()]
        if ended.code != 0 or found not in (allowed, self.wanted) or len(left) > (found is not None):
            self._note(what, f"cleaned, {left} stays: {ended.said.strip()}")
        temporary = [path.name for path in Path(tempfile.gettempdir()).iterdir()]
        if any(not name.startswith("torchinductor") for name in temporary):
            self._note(what, f"{temporary} stays in the folder for temporary files")

    def _note(self, what: str, wrong: str) -> None:
        self.tally.wrong.append(f"{what}: {wrong}")


def _last_lines(said: str) -> str:
    """Return the last line of an error, and the last places of its traceback in the package."""
    lines = said.splitlines()
    places = [line.split("/")[-1] for line in lines if line.startswith("  File ") and "/merging/" in line]
    return " < ".join([*lines[-1:], *places[:-4:-1]])


def words_of(case: Case) -> list[str]:
    """Return the words of a command, with --resume where it has that."""
    return [*case.words, "--resume", "--threads", "1", "--quiet"] if case.resumes else case.words


def start_over(case: Case) -> None:
    """Make an empty place to work, with the old output in it."""
    shutil.rmtree(case.output.parent, ignore_errors=True)
    case.output.parent.mkdir()
    renew(case.output, case.old)


def run(folder: Path, stops: int, chance: random.Random, only: Sequence[str], until: float = math.inf) -> Tally:
    """Stop merges of every kind, in turn, until there were so many stops; ``until`` is a time of the clock to end."""
    tally = Tally()
    known: dict[str, tuple[Found, list[str]]] = {}
    cases = make_cases(folder, only)
    while tally.stops < stops:
        for case in cases:
            if case.name not in known:
                start_over(case)
                dry = run_undisturbed(words_of(case), Saboteur(exchanges=case.exchanges, reads=folder))
                known[case.name] = files_at(case.output), dry.calls
                start_over(case)
                run_undisturbed(case.words)
                if files_at(case.output) != known[case.name][0]:
                    tally.wrong.append(f"{case.name}: with --resume the bytes differ")
            Stopping(case, *known[case.name], chance, tally).run()
            if tally.stops >= stops or time.perf_counter() > until:
                return tally
    return tally


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", action="append", default=[], help="this kind only; may repeat")
    parser.add_argument("--stops", type=int, default=300, help="stops in all, over all kinds in turn")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end then, with fewer stops")
    args = parser.parse_args()
    began = time.perf_counter()
    journal._PERIOD = 0.001
    with work_folder(args) as (folder, chance), tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        tempfile.tempdir = temporary
        tally = run(folder, args.stops, chance, args.only, began + args.seconds)
    report("merges", tally.line(), {"wrong": tally.wrong}, args.show, began)


if __name__ == "__main__":
    main()
