"""A day of a continual store in minutes: two writers, a watcher and exports, all killed again and again.

    python tests/faults/soak.py --hours 24 --seconds 240

Models arrive over simulated hours, in random intervals: some for a writer, some in the watched folder, some for
several at once, which all but the first then know. Two processes add their models, one watches the folder, one exports
over its last export. Each command of theirs runs in a fork. More often than not it is killed by SIGKILL at a random
moment, and begun again.

At the end every model must be in the store once, verify must find nothing, and nothing may be left over. A second store
takes the models in the same order undisturbed: its states, its steps and its exports must have the same bytes, and each
export that was ever in place must be the export of some step.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from continual import litter_of
from harness import make_parser, report, run_undisturbed, sha256, work_folder
from saboteur import Ended, command

from merging.continual import ContinualStore
from support.tiny import checkpoint

_KILLED = 0.6
"""The share of commands that are killed."""

_RARE = 0.05
"""Seconds between two looks of a process that has nothing to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """The folders of a run."""

    root: Path
    seed: int

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def over(self) -> bool:
        """Whether all models have arrived."""
        return (self.root / "over").exists()

    def queue(self, writer: int) -> Path:
        return self.root / f"queue{writer}"


class Actor:
    """A process that runs commands, each killed by chance, and notes what went wrong."""

    def __init__(self, name: str, place: Place) -> None:
        self.name, self.place = name, place
        self.chance = random.Random(f"{name} {place.seed}")
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.exports: set[str] = set()
        self.usual = 0.2

    def run(self, words: list[str], certain: bool = False) -> Ended:
        """Run a command; with ``certain`` it is always killed, as it does not end by itself."""
        killed = certain or self.chance.random() < _KILLED
        ended = command(words, kill_after=self.chance.uniform(0, 2 * self.usual) if killed else None)
        self.counts["killed" if ended.code is None else "ended"] += 1
        if ended.code is not None and not certain:
            self.usual = 0.7 * self.usual + 0.3 * ended.seconds
        if ended.code not in (0, 1, None) or "Traceback" in ended.said:
            self.wrong.append(f"{self.name}: {' '.join(words[:2])}: {ended.code}: {ended.said.strip()[-200:]}")
        return ended

    def note(self) -> None:
        """Write down what happened, for the parent."""
        found = {"counts": self.counts, "wrong": self.wrong, "exports": sorted(self.exports)}
        (self.place.root / f"{self.name}.json").write_text(json.dumps(found))


def add_models(actor: Actor, writer: int) -> None:
    """Add the models of a writer's queue in their order, each until it is there."""
    place, done = actor.place, 0
    while True:
        over = place.over  # before the look: what arrives after it is seen the next time
        arrived = sorted(place.queue(writer).iterdir())
        for model in arrived[done:]:
            words = ["continual", "add", str(place.store), model.read_text(), "--threads", "1", "--quiet"]
            while (ended := actor.run(words)).code is None:
                pass
            if ended.code:
                actor.wrong.append(f"{actor.name}: {model.name}: {ended.said.strip()[-200:]}")
        done = len(arrived)
        if over:
            return
        time.sleep(_RARE)


def watch_folder(actor: Actor) -> None:
    """Watch the folder, from kill to kill; some watches end by themselves."""
    place = actor.place
    words = ["continual", "watch", str(place.store), "--from", str(place.inbox), "--threads", "1"]
    while not place.over:
        once = actor.chance.random() < 0.3
        actor.run([*words, *(["--once"] if once else ["--interval", "0.05"])], certain=not once)
    for _ in range(2):
        run_undisturbed([*words, "--once"])


def export_again(actor: Actor) -> None:
    """Export over the last export, and note the bytes that are in place."""
    place = actor.place
    words = [
        "continual",
        "export",
        str(place.store),
        "-o",
        str(place.export),
        "--overwrite",
        "--threads",
        "1",
        "--quiet",
    ]
    while not place.over:
        if ContinualStore(place.store).manifest().steps:
            actor.run(words)
            if place.export.exists():
                actor.exports.add(sha256(place.export / "model.safetensors"))
        time.sleep(_RARE)


def begin(place: Place, name: str, work: Callable[[Actor], None]) -> int:
    """Run an actor in a fork, and return its process."""
    child = os.fork()
    if child:
        return child
    actor = Actor(name, place)
    try:
        work(actor)
    except BaseException as error:
        actor.wrong.append(f"{name}: {type(error).__name__}: {error}")
    actor.note()
    os._exit(0)


def let_arrive(place: Place, models: list[Path], seconds: float, chance: random.Random) -> None:
    """Let the models arrive at random moments."""
    began = time.perf_counter()
    moments = sorted(chance.uniform(0, seconds) for _ in models)
    for number, (moment, model) in enumerate(zip(moments, models, strict=True)):
        time.sleep(max(0.0, began + moment - time.perf_counter()))
        for where in chance.sample(range(3), chance.choice((1, 1, 2, 3))):
            if where == 2:
                shutil.copytree(model, place.inbox / f"arrival{number:04}")
                continue
            new = place.root / "new"
            new.write_text(str(model))
            new.rename(place.queue(where) / f"{number:04}")
    time.sleep(max(0.0, began + seconds - time.perf_counter()))
    (place.root / "over").touch()


def compare(place: Place, base: Path, method: str, count: int, exports: set[str]) -> list[str]:
    """Return what differs from a store that took the same models in the same order undisturbed."""
    store = ContinualStore(place.store)
    steps = store.manifest().steps
    wrong = [str(problem) for problem in store.verify().problems]
    if len(steps) != count:
        wrong.append(f"{len(steps)} steps of {count} models")
    if litter := litter_of(place.store):
        wrong.append(f"left over: {litter}")
    wrong += [f"left over: {path.name}" for path in place.root.glob(".export*")]
    other = ContinualStore.create(place.root / "undisturbed", base=base, method=method)
    known = set()
    for step in steps:
        other.add(step.source, threads=1)
        other.export(place.root / "wanted", overwrite=True, threads=1)
        known.add(sha256(place.root / "wanted" / "model.safetensors"))
    store.export(place.export, overwrite=True, threads=1)
    if sha256(place.export / "model.safetensors") != sha256(place.root / "wanted" / "model.safetensors"):
        wrong.append("the last export is different")
    if strange := exports - known:
        wrong.append(f"{len(strange)} exports are of no step")
    for ours, theirs in zip(steps, other.manifest().steps, strict=True):
        if ours.model_dump(exclude={"time"}) != theirs.model_dump(exclude={"time"}):
            wrong.append(f"step {ours.source} is different")
        for name, part in ours.parts.items():
            if sha256(place.store / part.file) != sha256(other.path / theirs.parts[name].file):
                wrong.append(f"the state of {ours.source} is different")
    return wrong


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--hours", type=float, default=24, help="simulated hours, with two models each")
    parser.add_argument("--seconds", type=float, default=240, help="real seconds in which they pass")
    parser.add_argument("--method", default="opcm")
    args = parser.parse_args()
    began = time.perf_counter()
    with work_folder(args) as (folder, chance):
        base, models = checkpoint(folder / "models", max(1, round(2 * args.hours)), layers=2)
        place = Place(folder / "run", args.seed)
        for each in (place.inbox, place.queue(0), place.queue(1)):
            each.mkdir(parents=True)
        run_undisturbed(["continual", "init", str(place.store), "--base", str(base), "--method", args.method])
        work: dict[str, Callable[[Actor], None]] = {
            "writer0": lambda actor: add_models(actor, 0),
            "writer1": lambda actor: add_models(actor, 1),
            "watcher": watch_folder,
            "exporter": export_again,
        }
        children = [begin(place, name, each) for name, each in work.items()]
        let_arrive(place, models, args.seconds, chance)
        for child in children:
            os.waitpid(child, 0)
        notes = {name: json.loads((place.root / f"{name}.json").read_text()) for name in work}
        wrong = [line for note in notes.values() for line in note["wrong"]]
        exports = set(notes["exporter"]["exports"])
        wrong += compare(place, base, args.method, len(models), exports)
    counts = sum((Counter(note["counts"]) for note in notes.values()), Counter())
    summary = f"{len(models)} models in {args.hours:g} hours, {counts['killed']} kills, {len(exports)} exports"
    report("soak", f"{summary}; wrong: {len(wrong)}", {"wrong": wrong}, args.show, began)


if __name__ == "__main__":
    main()
