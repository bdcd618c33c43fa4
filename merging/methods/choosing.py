"""Advice on the choice of a method by situation, with the figures of the benchmarks that speak for it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ADVICE", "CAVEAT", "FULL", "LORA", "SHIPPED", "STORES", "Advice"]

FULL = {
    "base": "45.8",
    "individual": "85.0",
    "average": "61.9",
    "task arithmetic": "76.0",
    "ties": "78.3",
    "tsv": "81.7",
    "iso_cts": "81.4",
    "decouple+tsv (chosen on validation)": "82.2",
    "karcher of changes": "74.4",
    "model_stock": "46.2",
}
LORA = {
    "individual": "85.4",
    "average": "65.1",
    "task arithmetic": "76.8",
    "tsv": "78.2",
    "varm": "77.6",
    "orthogonalize+task arithmetic": "77.4",
    "karcher of changes": "76.2",
}
"""Accuracy in per cent by row of the quality page's table: of full fine-tunes, and of LoRAs."""

STORES = {"opcm": ("73.5", "76.6"), "task arithmetic 0.3": ("68.8", "72.6"), "ties, scale 1": ("75.0", "76.6")}
"""The same without any choice on validation texts, by row of the page on stores: full fine-tunes, LoRAs."""

SHIPPED = {"linear": "66.5", "task arithmetic 0.4": "70.8", "lines": "73.6", "own adapter": "80.7"}
"""Mean accuracy of the shipped adapters, by column of the quality page's second table."""

CAVEAT = (
    "Figures are accuracy in per cent, of one small encoder on five text tasks whose task vectors are nearly "
    "orthogonal. They are a regression benchmark, and no evidence of how the methods compare on large models, on "
    "images or on your tasks: take two or three candidates, and measure them on your own data."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The methods to try in one situation. Texts have names and options in backticks.

    Attributes:
        have: the models and data at hand.
        first: the method to try first, with its options.
        then: the methods to try second.
        evidence: the figures that speak for them, or that there are none.
        cost: time and memory.
        pages: the pages of the documentation that hold the figures.
    """

    have: str
    first: str
    then: str
    evidence: str
    cost: str
    pages: tuple[str, ...] = ("quality",)


ADVICE = (
    Advice(
        have="full fine-tunes for different tasks, and some validation data",
        first="`tsv`, with `--scale` chosen from 0.6 to 2",
        then="`iso_cts`, `decouple+tsv`; `ties` where matrices are too large to decompose",
        evidence=f"`tsv` {FULL['tsv']}, `iso_cts` {FULL['iso_cts']}, `decouple+tsv` "
        f"{FULL['decouple+tsv (chosen on validation)']}, `ties` {FULL['ties']}, `task_arithmetic` "
        f"{FULL['task arithmetic']}, `linear` {FULL['average']}; each model alone {FULL['individual']}, the base "
        f"{FULL['base']}",
        cost="an SVD of each matrix, seconds to minutes each, which a worker holds for all models; `ties` decomposes "
        "nothing, and takes 78 MB for 3 models (one thread)",
        pages=("quality", "speed"),
    ),
    Advice(
        have="full fine-tunes for different tasks, and no validation data",
        first="`ties`, as it is",
        then="`karcher --space changes`; `opcm`, which has nothing to tune",
        evidence=f"`ties` {STORES['ties, scale 1'][0]}, `karcher` {FULL['karcher of changes']}, `opcm` "
        f"{STORES['opcm'][0]}, `task_arithmetic --scale 0.3` {STORES['task arithmetic 0.3'][0]}, `linear` "
        f"{FULL['average']}",
        cost="`ties` reads the inputs 4 times, and takes 78 MB for 3 models (one thread); `opcm` decomposes each "
        "matrix",
        pages=("quality", "stores", "speed"),
    ),
    Advice(
        have="several runs, seeds or epochs of one fine-tune",
        first="`linear`",
        then="`model_stock`, with the base",
        evidence=f"none here for one task. For different tasks they are wrong: {FULL['average']} and "
        f"{FULL['model_stock']}, where the base has {FULL['base']}",
        cost="`linear` takes 2.0 times as long as reading the inputs and copying the output, and 38 MB",
        pages=("quality", "speed"),
    ),
    Advice(
        have="two models to go between",
        first="`slerp`, with `--t` from 0.3 to 0.7",
        then="`linear --weights 0.5,0.5`",
        evidence="none here",
        cost="`slerp` takes 3.9 times as long as reading the inputs and copying the output, and 30 MB",
        pages=("speed",),
    ),
    Advice(
        have="LoRAs of one base, and some validation data",
        first="`tsv`, with `--scale` chosen from 0.4 to 1.4",
        then="`varm`, `orthogonalize+task_arithmetic`, `task_arithmetic`: choose `--scale` too",
        evidence=f"`tsv` {LORA['tsv']}, `varm` {LORA['varm']}, `orthogonalize+task_arithmetic` "
        f"{LORA['orthogonalize+task arithmetic']}, `task_arithmetic` {LORA['task arithmetic']}, `linear` "
        f"{LORA['average']}; each adapter alone {LORA['individual']}",
        cost="by factors: 11 s and 190 MB for eight adapters of rank 16 of a model of 7 billion parameters; the result "
        "is an adapter",
        pages=("quality", "speed"),
    ),
    Advice(
        have="LoRAs of one base, and no validation data",
        first="`opcm`",
        then="`lines`; `karcher --space changes`",
        evidence=f"`opcm` {STORES['opcm'][1]}, `karcher` {LORA['karcher of changes']}, `linear` {LORA['average']}. "
        f"Of the four shipped adapters: `lines` {SHIPPED['lines']}, `task_arithmetic --scale 0.4` "
        f"{SHIPPED['task arithmetic 0.4']}, `linear` {SHIPPED['linear']}; each alone {SHIPPED['own adapter']}",
        cost="`opcm`: 12 s and 162 MB for eight adapters of rank 16 of a model of 7 billion parameters; `lines`: "
        "as a sum",
        pages=("quality", "stores", "speed"),
    ),
    Advice(
        have="many adapters, and a new task with about a hundred labelled examples",
        first="train a LoRA on the examples, without any merge",
        then="`merge recycle`, which mixes the adapters with it and compares with controls",
        evidence="on one new task the LoRA alone 86.3, the mixture of 31 adapters with it 86.1, the best adapter 79.2, "
        "a simple average 72.9, the base 70.3",
        cost="the training; a pool of a thousand adapters is checked in 72 s",
        pages=("recycling", "stores"),
    ),
    Advice(
        have="many adapters of one base, to serve as one",
        first="`merge pool build` and `dedupe`, then `tsv --rank 64`",
        then="`task_arithmetic --rank 64` on groups that agree (`merge compare`)",
        evidence="none here for more than five tasks at once",
        cost="as for LoRAs; all pairs of a thousand are compared in 3,900 s of processors",
        pages=("speed",),
    ),
    Advice(
        have="models that arrive one after the other",
        first="`merge continual`, with `opcm`",
        then="`merge continual`, with `ties`",
        evidence=f"full fine-tunes: `opcm` {STORES['opcm'][0]}, `ties` {STORES['ties, scale 1'][0]}, a sum with "
        f"`--scale 0.3` {STORES['task arithmetic 0.3'][0]}; LoRAs: {STORES['opcm'][1]}, {STORES['ties, scale 1'][1]}, "
        f"{STORES['task arithmetic 0.3'][1]}",
        cost="each step takes the same, however many came before: 7.0 core seconds and 70 MB for 100 MB by `opcm`",
        pages=("stores",),
    ),
    Advice(
        have="a style and a subject as LoRAs of one diffusion model",
        first="`task_arithmetic --weights 0.8,0.8`, which equals loading both at 0.8",
        then="`tsv`, or `knots+ties`, where the sum shows artifacts",
        evidence="none here for images: look at pictures of both prompts",
        cost="a sum of factors: seconds, and the rank is the sum of the ranks unless `--rank` is given",
        pages=(),
    ),
)
"""The situations, from full models to adapters."""
