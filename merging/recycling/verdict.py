"""What a gain is owed to, in a sentence that follows from the figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merging.recycling.bootstrap import LEVEL, Gap, Metric
from merging.recycling.controls import CONTROLS
from merging.recycling.experts import BASE, FEW_SHOT

__all__ = ["Evidence", "Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """By how much the merge is ahead of each row that it must be compared with, on the same examples.

    ``controls`` holds every kind of :data:`~merging.recycling.controls.CONTROLS`. ``fallback`` names what came back
    instead of the tuned merge because that was worse on validation.
    """

    base: Gap
    few_shot: Gap
    single: Gap
    average: Gap
    controls: Mapping[str, Gap]
    tested: bool = True
    fallback: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether there is transfer, and the sentence that says so or names what explains the gain instead."""

    transfer: bool
    sentence: str


def judge(evidence: Evidence, metric: Metric) -> Verdict:
    """Transfer is said only where the merge beats both the few-shot LoRA and every random control beyond chance.

    All of these comparisons must hold, so that no correction for their number is due. Without test examples nothing is
    concluded: what was chosen on examples looks good on them. Raises ValueError if a control is missing.
    """
    missing = CONTROLS.keys() - evidence.controls.keys()
    if missing:
        raise ValueError(f"no verdict without the controls {', '.join(sorted(missing))}")
    if not evidence.tested:
        return Verdict(False, "Not told: without test examples there is only what the merge was chosen on")
    if evidence.fallback == BASE:
        return Verdict(False, "No gain: nothing was better than the base on validation, so that the base came back")
    gained = f"{evidence.base.shown(metric)}, {LEVEL:.0%} interval"
    if not evidence.base.above:
        how = "worse than" if evidence.base.high < 0 else "no better than"
        return Verdict(False, f"No gain: the merge is {how} the base ({gained})")
    if evidence.fallback == FEW_SHOT:
        told = "the LoRA trained on the same examples came back, as nothing mixed with it was better on validation"
        return Verdict(False, f"Gain over the base ({gained}) without any adapter of the pool: {told}")
    unknowing = {name: gap for name, gap in evidence.controls.items() if not gap.above}
    if evidence.few_shot.above and not unknowing:
        return Verdict(True, f"Transfer: {_transfer(evidence, metric)}")
    reasons = []
    if not evidence.few_shot.above:
        how = "does better" if evidence.few_shot.high < 0 else "does as well"
        reasons.append(f"a LoRA trained on the same examples {how} ({evidence.few_shot.shown(metric)})")
    if unknowing:
        who = ", ".join(f"{CONTROLS[name].stand_in} ({gap.shown(metric)})" for name, gap in unknowing.items())
        reasons.append(f"{who} in the adapters' place do as well, so that it is the tuning, and not what they learnt")
    return Verdict(False, f"Gain over the base ({gained}) that is explained otherwise: {'; '.join(reasons)}")


def _transfer(evidence: Evidence, metric: Metric) -> str:
    nearest = min(evidence.controls.values(), key=lambda gap: gap.low)
    told = (
        f"the merge beats a LoRA trained on the same examples ({evidence.few_shot.shown(metric)}) and all adapters "
        f"that know nothing ({nearest.shown(metric)} at least)"
    )
    if evidence.fallback:
        return f"{told}; but {evidence.fallback} alone came back, as no mixture was better on validation"
    if not evidence.single.above:
        return f"{told}; but the best single adapter does as well ({evidence.single.shown(metric)})"
    if not evidence.average.above:
        return f"{told}; but the adapters' simple average does as well ({evidence.average.shown(metric)})"
    return told
