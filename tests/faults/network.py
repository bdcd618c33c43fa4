"""Merges of models on the Hub whose network is lost at any point, again and again, and which go on with --resume.

    python tests/faults/network.py --stops 100

The Hub is the project's own on this machine (tests/support/hub_server). A merge is begun with --resume; its connections
are cut within a file, once or for good, or the Hub answers nothing but errors, or the process is killed. It is begun
again until it ends.

Afterwards, each time: the bytes are those of an undisturbed merge, nothing is left next to the output, and a failure
was told in one message. Waits between two tries are left out.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from harness import make_parser, report, run_undisturbed, work_folder
from merges import files_at
from saboteur import Saboteur, command

from merging.engine import journal
from merging.hub import client
from support.hub_fixture import Hub, serve
from support.tiny import adapters, checkpoint

_FOR_GOOD = 10_000

LOSSES: dict[str, Callable[[Hub, random.Random], None]] = {
    "cut once": lambda hub, chance: hub.cut("GET /storage/", chance.randrange(4000)),
    "cut for good": lambda hub, chance: hub.cut("GET /storage/", chance.randrange(200), _FOR_GOOD),
    "errors": lambda hub, chance: hub.fail("GET ", [503] * _FOR_GOOD),
    "errors for files": lambda hub, chance: hub.fail(r"GET /(storage|.*/resolve)/", [504] * _FOR_GOOD),
    "kill": lambda hub, chance: None,
}


def fill(hub: Hub, folder: Path) -> list[tuple[str, list[str]]]:
    """Put models on the Hub; return the kinds of merges, with their words."""
    _, tuned = checkpoint(folder / "models", 2, layers=2)
    origin, changes = adapters(folder / "adapters", 1)
    for name, path in {"one": tuned[0], "two": tuned[1], "base": origin, "lora": changes[0]}.items():
        hub.put(f"org/{name}", path, card={"license": "mit"})
    both = ["--method", "linear", "org/one", "org/two"]
    return [
        ("downloaded", both),
        ("streamed", [*both, "--stream"]),
        ("baked", ["bake", "org/lora", "--base", "org/base"]),
    ]


def run(hub: Hub, folder: Path, stops: int, chance: random.Random) -> tuple[Counter[str], list[str]]:
    """Stop merges of every kind in turn; return the numbers of stops by their reason, and what went wrong."""
    losses: Counter[str] = Counter()
    wrong: list[str] = []
    work, output = folder / "work", folder / "work/out"
    known = {}
    kinds = [(name, [*words, "-o", str(output), "--quiet", "--threads", "1"]) for name, words in fill(hub, folder)]
    for name, words in kinds:
        start_over(folder)
        dry = run_undisturbed(words, Saboteur(reads=folder))
        known[name] = files_at(output), len(dry.calls)
    while losses.total() < stops:
        for name, words in kinds:
            start_over(folder)
            wanted, calls = known[name]
            while True:
                loss = chance.choice([*LOSSES])
                LOSSES[loss](hub, chance)
                kill = Saboteur(chance.randrange(1, calls), "kill", reads=folder) if loss == "kill" else Saboteur()
                ended = command([*words, "--resume"], kill)
                hub.clear()
                if ended.code == 0 or files_at(output) == wanted:
                    break
                losses[loss] += 1
                if ended.code not in (1, None) or (ended.code and ended.said.count("Error: ") != 1):
                    wrong.append(f"{name}, {loss}: exit code {ended.code}: {ended.said.strip()[-300:]}")
                if output.exists():
                    wrong.append(f"{name}, {loss}: something is at the output")
            if files_at(output) != wanted:
                wrong.append(f"{name}: the bytes differ")
            if ended.code == 0 and len(list(work.iterdir())) != 1:
                wrong.append(f"{name}: {sorted(path.name for path in work.iterdir())} stay")
    return losses, wrong


def start_over(folder: Path) -> None:
    """Empty the place to work, and the library's cache."""
    for path in (folder / "work", folder / "home"):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--stops", type=int, default=30, help="losses in all, over all kinds in turn")
    args = parser.parse_args()
    began = time.perf_counter()
    journal._PERIOD = 0.001
    client.backoff = lambda number: 0.01
    with work_folder(args) as (folder, chance), serve(folder / "hub") as hub:
        os.environ.update(hub.environment(folder / "home"), HF_HUB_OFFLINE="0")
        from huggingface_hub import HfApi, hf_hub_download  # noqa: F401  # which read the environment, and take seconds

        losses, wrong = run(hub, folder, args.stops, chance)
    counts = ", ".join(f"{name} {count}" for name, count in losses.most_common())
    report("network", f"{losses.total()} losses ({counts}); wrong: {len(wrong)}", {"wrong": wrong}, args.show, began)


if __name__ == "__main__":
    main()
