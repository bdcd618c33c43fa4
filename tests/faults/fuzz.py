"""Hostile and broken inputs for everything that is read: headers, configs, names, pickles, recipes, addresses.

    python tests/faults/fuzz.py --inputs 200000 --seed 0

Half of the inputs are valid files (as PEFT, LyCORIS, diffusers, transformers and torch write them) that are mutated:
bits flipped, ends cut, numbers made extreme, types exchanged, keys repeated, names escaping from their folder; the
others are put together at random by the grammar of their format. An input may be read, or refused by a MergingError
that can be printed. Anything else is a finding: another exception, more than a few seconds or a few hundred megabytes,
a crash, a file that is written outside of the output, a process that is started, a merge that fails and leaves
something behind. The same seed gives the same inputs.

Each finding is written to a folder, with the words that do it again:

    python tests/faults/fuzz.py --replay FOLDER

One line sums it up; the exit code is 1 if there was a finding.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a pool of threads would not outlive a fork
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from fuzzing.corpus import QUICK, Corpus, gathered
from fuzzing.guard import SECONDS, Finding, Guard
from fuzzing.targets import TARGETS, read_valid

__all__ = ["Outcome", "attack", "main"]


@dataclass(slots=True)
class Outcome:
    """What came of the inputs: how many of each target, how many were refused, and the findings, by what they are."""

    inputs: Counter[str] = field(default_factory=Counter)
    findings: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    folders: dict[tuple[str, str, str], Path] = field(default_factory=dict)

    def note(self, target: str, what: str, where: str, folder: Path) -> None:
        """Count a finding; of those that are alike, the first folder is named."""
        kind = target, what, where
        self.findings[kind] += 1
        self.folders.setdefault(kind, folder)

    def line(self, seconds: float) -> str:
        """The summary."""
        targets = ", ".join(f"{name} {self.inputs[name]:,}" for name in TARGETS if self.inputs[name])
        total, found = sum(self.inputs.values()), sum(self.findings.values())
        return f"{total:,} inputs ({targets}); findings: {found} ({len(self.findings)} kinds); {seconds:.0f} s"


class Crew:
    """Forked processes that read the inputs between them; one that dies or hangs is replaced behind that input."""

    def __init__(self, corpus: Corpus, inputs: int, seed: int, only: Collection[str], kept: Path, workers: int) -> None:
        self._corpus, self._inputs, self._seed, self._only = corpus, inputs, seed, only
        self._kept, self._workers = kept, workers
        # of each worker the number of the input that it is at, and the seconds of a core that it had taken before
        self._beats = memoryview(mmap.mmap(-1, 16 * workers)).cast("d")

    def work(self, scratch: Path) -> None:
        """Read all inputs, each below ``scratch``."""
        running = {worker: self._fork(worker, worker, scratch) for worker in range(self._workers)}
        try:
            self._watch(running, scratch)
        finally:
            for child in running.values():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def _watch(self, running: dict[int, int], scratch: Path) -> None:
        while running:
            time.sleep(0.05)
            for worker, child in list(running.items()):
                number, since = int(self._beats[2 * worker]), self._beats[2 * worker + 1]
                stuck = _seconds_of(child) - since > 4 * SECONDS  # of a core: the machine may be busy
                if stuck:
                    os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0 if stuck else os.WNOHANG)
                if not ended:
                    continue
                del running[worker]
                if status:  # the input that it was at is to blame
                    code = os.waitstatus_to_exitcode(status)
                    what = "hangs, and no signal ends it" if stuck else f"the process dies ({code})"
                    keep(self._kept, self._seed, number, self._only, self._corpus, Finding(what))
                    if number + self._workers < self._inputs:
                        running[worker] = self._fork(worker, number + self._workers, scratch)

    def _fork(self, worker: int, first: int, scratch: Path) -> int:
        self._beat(worker, first, 0.0)
        child = os.fork()
        if not child:
            self._be_worker(worker, first, scratch / str(worker))
        return child

    def _beat(self, worker: int, number: int, seconds: float) -> None:
        self._beats[2 * worker + 1] = seconds
        self._beats[2 * worker] = number

    def _be_worker(self, worker: int, first: int, folder: Path) -> NoReturn:
        """What a forked process does; never returns."""
        code = 1
        try:
            with Path(os.devnull).open("w") as nowhere:  # for what libraries print
                os.dup2(nowhere.fileno(), 1)
            sys.dont_write_bytecode = True
            warnings.simplefilter("ignore")
            guard = Guard()
            for number in range(first, self._inputs, self._workers):
                self._beat(worker, number, time.process_time())
                target = target_of(self._seed, number, self._only)
                sample = TARGETS[target].make(random_of(self._seed, number), self._corpus)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                sample.write(folder)
                read = partial(TARGETS[target].read, folder, sample.words, self._corpus)
                found = guard.judge(read, folder / "out")
                if found is not None:
                    keep(self._kept, self._seed, number, self._only, self._corpus, found)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _seconds_of(process: int) -> float:
    """The seconds of a core that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def random_of(seed: int, number: int) -> Random:
    """The random numbers that an input is made of."""
    return Random(f"{seed} {number}")


def target_of(seed: int, number: int, only: Collection[str] = ()) -> str:
    """What the input of a number is for."""
    names = [name for name in TARGETS if not only or name in only]
    (target,) = Random(f"{seed} {number} target").choices(names, [TARGETS[name].share for name in names])
    return target


def keep(kept: Path, seed: int, number: int, only: Collection[str], corpus: Corpus, found: Finding) -> None:
    """Write an input that found something down, with what it found."""
    target = target_of(seed, number, only)
    sample = TARGETS[target].make(random_of(seed, number), corpus)
    folder = kept / f"{number:07}"
    (folder / "input").mkdir(parents=True, exist_ok=True)
    sample.write(folder / "input")
    told = {"target": target, "words": sample.words, "what": found.what, "where": found.where, "example": found.example}
    (folder / "finding.json").write_text(json.dumps(told, indent=1))
    (folder / "traceback.txt").write_text(found.story, errors="backslashreplace")


def attack(corpus: Corpus, inputs: int, seed: int, kept: Path, workers: int = 1, only: Collection[str] = ()) -> Outcome:
    """Read so many inputs in forked processes; findings are written below ``kept``."""
    with tempfile.TemporaryDirectory(dir=_memory()) as scratch:
        Crew(corpus, inputs, seed, only, kept, workers).work(Path(scratch))
    outcome = Outcome(Counter(target_of(seed, number, only) for number in range(inputs)))
    for folder in sorted(kept.iterdir()) if kept.is_dir() else ():
        told = json.loads((folder / "finding.json").read_text())
        outcome.note(told["target"], told["what"], told["where"], folder)
    return outcome


def replay(folder: Path, corpus: Corpus) -> None:
    """Read one input that was kept, in this process and without a guard: what it raises is raised."""
    told = json.loads((folder / "finding.json").read_text())
    with tempfile.TemporaryDirectory(dir=_memory()) as scratch:
        copy = Path(shutil.copytree(folder / "input", Path(scratch) / "input", symlinks=True))
        TARGETS[told["target"]].read(copy, told["words"], corpus)


def _memory() -> Path | None:
    """A folder in memory, if there is one: what is read is the same there."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else None


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=200_000, help="how many  [default: 200000]")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same inputs")
    parser.add_argument(
        "--only", action="append", choices=list(TARGETS), default=[], help="this target only; may repeat"
    )
    parser.add_argument("--kept", type=Path, help="where findings are written  [default: a new folder]")
    parser.add_argument("--quick", action="store_true", help="begin with few types of adapters: starts sooner")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="read one input again that was a finding")
    parser.add_argument("--show", type=int, default=40, help="most kinds of findings that are listed")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        corpus = gathered(Path(folder), QUICK if args.quick else None)
        if args.replay:
            replay(args.replay, corpus)
            print("read, without an error")
            return
        read_valid(corpus)
        kept = args.kept or Path(tempfile.mkdtemp(prefix="fuzz-"))
        began = time.perf_counter()
        outcome = attack(corpus, args.inputs, args.seed, kept, len(os.sched_getaffinity(0)), args.only)
        seconds = time.perf_counter() - began
    for kind, count in outcome.findings.most_common(args.show):
        target, what, where = kind
        folder = outcome.folders[kind]
        example = json.loads((folder / "finding.json").read_text())["example"]
        print(f"{target}: {what} at {where} ({count} times): {example!a}")
        print(f"    python tests/faults/fuzz.py --replay {folder}")
    print(f"fuzz: {outcome.line(seconds)}")
    sys.exit(1 if outcome.findings else 0)


if __name__ == "__main__":
    main()
