"""The cause of a gain, in a sentence that follows from the figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merging.display.tables import Displayed
from merging.recycling.bootstrap import LEVEL, Gap, Metric
from merging.recycling.controls import CONTROLS
from merging.recycling.pool_adapters import BASE, FEW_SHOT

__all__ = ["Evidence", "TransferVerdict", "judge"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The lead of the merge over each row that it must be compared with, on the same examples.

    ``controls`` holds every kind of :data:`~merging.recycling.controls.CONTROLS`. ``fallback`` names the baseline that
    replaced the tuned merge because its validation loss was lower.
    """

    base: Gap
    few_shot: Gap
    single: Gap
    average: Gap
    controls: Mapping[str, Gap]
    tested: bool = True
    fallback: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class TransferVerdict(Displayed):
    """Whether there is transfer, and a sentence that says so or names another cause of the gain."""

    transfer: bool
    sentence: str


def judge(evidence: Evidence, metric: Metric) -> TransferVerdict:
    """Return the verdict: transfer only if the merge beats the few-shot LoRA and every control beyond chance.

    All of these comparisons must hold, so that their number needs no correction. Without test examples there is no
    conclusion: a merge looks good on the examples that chose it. Raises ValueError if a control is missing.
    """
    missing = CONTROLS.keys() - evidence.controls.keys()
    if missing:
        raise ValueError(f"no verdict without the controls {', '.join(sorted(missing))}")
    if not evidence.tested:
        return TransferVerdict(
            False, "No conclusion: without test examples there are only the examples that chose the merge"
        )
    if evidence.fallback == BASE:
        return TransferVerdict(False, "No gain: nothing was better than the base on validation, so the base came back")
    gained = f"{evidence.base.text(metric)}, {LEVEL:.0%} interval"
    if not evidence.base.above:
        how = "worse than" if evidence.base.high < 0 else "no better than"
        return TransferVerdict(False, f"No gain: the merge is {how} the base ({gained})")
    if evidence.fallback == FEW_SHOT:
        cause = "the LoRA trained on the same examples came back, as nothing mixed with it was better on validation"
        return TransferVerdict(False, f"Gain over the base ({gained}) without any adapter of the pool: {cause}")
    unknowing = {name: gap for name, gap in evidence.controls.items() if not gap.above}
    if evidence.few_shot.above and not unknowing:
        return TransferVerdict(True, f"Transfer: {_transfer(evidence, metric)}")
    reasons = []
    if not evidence.few_shot.above:
        how = "does better" if evidence.few_shot.high < 0 else "does as well"
        reasons.append(f"a LoRA trained on the same examples {how} ({evidence.few_shot.text(metric)})")
    if unknowing:
        who = ", ".join(f"{CONTROLS[name].stand_in} ({gap.text(metric)})" for name, gap in unknowing.items())
        reasons.append(
            f"{who} in the adapters' place do as well, so the gain is due to the tuning, not to the adapters' knowledge"
        )
    return TransferVerdict(False, f"Gain over the base ({gained}) that is explained otherwise: {'; '.join(reasons)}")


def _transfer(evidence: Evidence, metric: Metric) -> str:
    nearest = min(evidence.controls.values(), key=lambda gap: gap.low)
    lead = (
        f"the merge beats a LoRA trained on the same examples ({evidence.few_shot.text(metric)}) and all adapters "
        f"that know nothing ({nearest.text(metric)} at least)"
    )
    if evidence.fallback:
        return f"{lead}; but {evidence.fallback} alone came back, as no mixture was better on validation"
    if not evidence.single.above:
        return f"{lead}; but the best single adapter does as well ({evidence.single.text(metric)})"
    if not evidence.average.above:
        return f"{lead}; but the adapters' simple average does as well ({evidence.average.text(metric)})"
    return lead
