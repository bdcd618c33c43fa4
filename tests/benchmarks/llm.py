"""MergeBench's protocol: language models of 2 to 3 billion parameters, fine-tuned for five domains, and their merges.

    python tests/benchmarks/llm.py --base Llama-3.2-3B --json llm.json
    python tests/benchmarks/llm.py --base gemma-2-2b --lm-eval --methods ties tsv

Needs network, access to the base on the Hub, `pip install datasets`, and a GPU. The score of an example is the share of
its answer's tokens that the model predicts, each after the right ones; the examples are the two halves of MergeBench's
own sets (MergeBench/math_val and so on). With --lm-eval (`pip install lm_eval`) the test figures of three domains are
those of the paper's tasks: ifeval, gsm8k_cot, and MMLU, ARC and HellaSwag in French, Spanish, German and Russian. The
paper's tests of coding (bigcode-eval) and safety (safety-eval) run code and other models, and are not part of this.
Answers are kept by content under --work, so that a run that was stopped goes on.

--local FOLDER reads FOLDER/tasks.json: base, full and lora name folders of models, tasks maps names to files of JSON
lines with prompt and completion: {"valid": ..., "test": ...}.

Verified in MergeBench's repository and pages: the names of models and datasets, and the tasks of lm-eval. The columns
of the datasets are those that its code reads; for instruction_val (instruction, output) its code only implies them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hub_merges import HubJudge, HubModels, make_parser, run_protocol
from kept_answers import digest
from torch import Tensor

from merging import MergingError
from merging.recycling.data import Split, read_examples
from merging.recycling.load_base import load_network
from merging.recycling.model import EncodedExample
from merging.searches.settings import make_search_settings

BASES = {"Llama-3.2-3B": "meta-llama/Llama-3.2-3B", "gemma-2-2b": "google/gemma-2-2b"}
DOMAINS = ("instruction", "math", "coding", "safety", "multilingual")
COLUMNS = {"prompt": ("query", "prompt", "inputs", "instruction"), "completion": ("response", "targets", "output")}
LANGUAGES = ("fr", "es", "de", "ru")
LM_EVAL = {  # the tasks of a domain: the metric of each, and its filter
    "instruction": {"ifeval": ("prompt_level_strict_acc", "none")},
    "math": {"gsm8k_cot": ("exact_match", "flexible-extract")},
    "multilingual": {
        f"{task}_{language}": (metric, "none")
        for language in LANGUAGES
        for task, metric in (("m_mmlu", "acc"), ("arc", "acc_norm"), ("hellaswag", "acc_norm"))
    },
}


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """A domain: its examples to choose by and to report on, and the tasks of lm-eval in place of the latter."""

    name: str
    valid: Sequence[Mapping[str, str]]
    test: Sequence[Mapping[str, str]]
    lm_eval: Mapping[str, tuple[str, str]]


class TextJudge(HubJudge):
    """A language model with merged weights, asked to continue prompts."""

    def __init__(self, tasks: Sequence[TextTask], base: str, work: Path, options: Any) -> None:
        super().__init__([task.name for task in tasks], work)
        settings = make_search_settings({"max_length": options.length}).of_models()
        loaded = load_network(base, "completion", settings, torch.device(options.device))
        first = read_examples(tasks[0].valid[:1])
        self._model = loaded.model_for(Split(first, first, first), settings)
        self._options = options
        self._counts = {"valid": options.valid, "test": options.limit}
        self._tasks = {task.name: task for task in tasks}
        self.examples = cache(self._encode)

    @property
    def network(self) -> Any:
        """The loaded base, which holds a merge at a time."""
        return self._model.network

    def _encode(self, name: str, split: str) -> list[EncodedExample]:
        """The examples of a task in tokens; answers that leave no room for a prompt are cut."""
        rows = getattr(self._tasks[name], split)[: self._counts[split]]
        room, tokenizer = self._model.limit // 2, self._model.tokenizer
        cut = []
        for row in rows:
            tokens = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            answer = row["completion"] if len(tokens) <= room else tokenizer.decode(tokens[:room])
            cut.append({"prompt": row["prompt"], "completion": answer})
        return [self._model.encode(example) for example in read_examples(cut)]

    def identity(self, name: str, split: str) -> str:
        if split == "test" and self._tasks[name].lm_eval:
            return digest([str(self._tasks[name].lm_eval), str(self._options.limit)])
        return digest([str(self.examples(name, split))])

    @torch.no_grad()
    def ask(self, name: str, split: str) -> Tensor:
        if split == "test" and self._tasks[name].lm_eval:
            return self._ask_lm_eval(self._tasks[name].lm_eval)
        items, scores = self.examples(name, split), []
        for start in range(0, len(items), self._options.batch):
            batch = items[start : start + self._options.batch]
            answers = self._model.answers(batch)
            right = (answers.logits.argmax(-1) == answers.targets).double().cpu()
            sums = torch.zeros(len(batch), dtype=torch.float64).index_add(0, answers.of.cpu(), right)
            scores.append(sums / torch.tensor([len(item.answer) for item in batch]))
        return torch.cat(scores)

    def _ask_lm_eval(self, tasks: Mapping[str, tuple[str, str]]) -> Tensor:
        """The metric of each example of these tasks of lm-eval, one task after the other."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        options, tokenizer = self._options, self._model.tokenizer
        model = HFLM(pretrained=self.network, tokenizer=tokenizer, batch_size=options.batch)
        manager = TaskManager(include_path=str(options.local) if options.local else None)
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), limit=options.limit, log_samples=True, task_manager=manager
        )
        values = []
        for task, (metric, kind) in tasks.items():
            samples = [each for each in found["samples"][task] if each.get("filter", "none") == kind]
            values += [float(each[metric]) for each in sorted(samples, key=lambda each: each["doc_id"])]
        return torch.tensor(values, dtype=torch.float64)


def read_domain(name: str, lm_eval: bool) -> TextTask:
    """Read MergeBench's examples of a domain: one half to choose by, the other to report on."""
    import datasets

    data: Any = datasets.load_dataset(f"MergeBench/{name}_val", split="train").shuffle(seed=0)
    columns = {}
    for part, names in COLUMNS.items():
        columns[part] = next((each for each in names if each in data.column_names), "")
        if not columns[part]:
            raise MergingError(f"MergeBench/{name}_val has the columns {data.column_names}: add its {part} to COLUMNS")
    rows = [{part: str(row[column]) for part, column in columns.items()} for row in data]
    half = len(rows) // 2
    return TextTask(name=name, valid=rows[:half], test=rows[half:], lm_eval=LM_EVAL.get(name, {}) if lm_eval else {})


def from_folder(folder: Path, kind: str, lm_eval: bool) -> tuple[str, dict[str, str], list[TextTask]]:
    """The base, the model of each task, and the tasks of a folder's tasks.json."""
    listed, tasks = json.loads((folder / "tasks.json").read_text(encoding="utf-8")), []
    for name, files in listed["tasks"].items():
        parts = {part: (folder / files[part]).read_text(encoding="utf-8").splitlines() for part in ("valid", "test")}
        rows = {part: [json.loads(line) for line in lines] for part, lines in parts.items()}
        own = {task: tuple(metric) for task, metric in files.get("lm_eval", {}).items()}
        tasks.append(TextTask(name=name, **rows, lm_eval=own if lm_eval else {}))
    return str(folder / listed["base"]), {task.name: str(folder / listed[kind][task.name]) for task in tasks}, tasks


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line, ask what is not known yet, and print the tables."""
    parser = make_parser(__doc__, "merging-llm")
    parser.add_argument("--base", choices=list(BASES), default="Llama-3.2-3B", help="default %(default)s")
    parser.add_argument("--kind", choices=("full", "lora"), default="full", help="lora is for --local alone")
    parser.add_argument("--lm-eval", action="store_true", help="report on the paper's tasks of lm-eval")
    parser.add_argument("--length", type=int, default=1024, help="the most tokens of an example (%(default)s)")
    parser.set_defaults(batch=8)
    chosen = parser.parse_args(arguments)
    if chosen.local:
        base, models, tasks = from_folder(chosen.local, chosen.kind, chosen.lm_eval)
    elif chosen.kind == "lora":
        parser.error("--kind lora: MergeBench has full fine-tunes alone")
    else:
        base, models = BASES[chosen.base], {name: f"MergeBench/{chosen.base}_{name}" for name in DOMAINS}
        tasks = [read_domain(name, chosen.lm_eval) for name in DOMAINS]
    judge = TextJudge(tasks, base, chosen.work, chosen)
    return run_protocol(chosen, HubModels(chosen.kind, models, base, judge.network), judge)


if __name__ == "__main__":
    main()
