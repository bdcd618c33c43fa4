"""Matching of one model's tensor names to another's: they may differ by a prefix; no other difference is safe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from merging.sources.tied_weights import HEADS

__all__ = ["Renaming", "find_renaming"]

_PREFIXES = (
    "model.",
    "transformer.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
    "vision_model.",
    "bert.",
    "roberta.",
    "vit.",
)
"""Prefixes that wrappers of the same network add, in different versions of transformers."""

Norms = Literal["same", "new", "old"]
"""The names of layer norms that are wanted."""

_LEGACY = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
"""Endings of layer norms in very old checkpoints (bert-base-uncased), and today's endings."""

_ENDINGS: dict[Norms, dict[str, str]] = {
    "same": {},
    "new": _LEGACY,
    "old": {new: old for old, new in _LEGACY.items()},
}


@dataclass(frozen=True, slots=True)
class Renaming:
    """A renaming: ``strip`` is removed and ``add`` prepended, and layer norms get today's names or the old ones.

    An output head that stands outside ``strip`` keeps its name: the language part of Qwen3-VL is
    ``model.language_model.*``, next to the same ``lm_head`` that Qwen3 has next to ``model.*``.
    """

    strip: str = ""
    add: str = ""
    norms: Norms = "same"

    @property
    def is_identity(self) -> bool:
        """Whether all names stay as they are."""
        return not self.strip and not self.add and self.norms == "same"

    def __call__(self, name: str) -> str | None:
        """Return the new name, None for a name that does not begin with ``strip``."""
        if not name.startswith(self.strip):
            return name if name in HEADS else None
        name = self.add + name[len(self.strip) :]
        for ending, wanted in _ENDINGS[self.norms].items():
            if name.endswith(ending):
                return name.removesuffix(ending) + wanted
        return name

    def __str__(self) -> str:
        if not self.strip and not self.add:
            return "the same names" if self.norms == "same" else f"{self.norms} names of norms"
        return f"{self.strip + '*' if self.strip else '*'} -> {self.add}*"


def find_renaming(
    names: Iterable[str], known: Mapping[str, object], fits: Callable[[str, str], bool]
) -> tuple[Renaming, list[str]]:
    """Find the renaming under which most ``names`` are ``known``. Return it with the names that remain unmatched.

    One renaming holds for a whole model: separate matches for each name could scatter an adapter over two towers.
    Candidates are, in order: no change, one prefix more or less, and the change that the first unmatched name suggests
    if its ending is unique among the known names.

    Args:
        names: The names to be renamed.
        known: The names of the other model.
        fits: Whether a name may be matched with a known name, as their shapes are equal.
    """
    names = list(names)
    best, unmatched = Renaming(), _names_unmatched(names, Renaming(), known, fits)
    for renaming in _candidates(names, unmatched, known):
        if not unmatched:
            break
        left = _names_unmatched(names, renaming, known, fits)
        if len(left) < len(unmatched):
            best, unmatched = renaming, left
    return best, unmatched


def _names_unmatched(
    names: list[str], renaming: Renaming, known: Mapping[str, object], fits: Callable[[str, str], bool]
) -> list[str]:
    renamed = zip(names, names, strict=True) if renaming.is_identity else ((name, renaming(name)) for name in names)
    return [name for name, match in renamed if match is None or match not in known or not fits(name, match)]


def _candidates(names: list[str], unmatched: list[str], known: Mapping[str, object]) -> list[Renaming]:
    if not unmatched:
        return []
    norms = _norms(names, known)
    prefixes = [
        "",
        *(p for p in _PREFIXES if any(n.startswith(p) for n in names) or any(k.startswith(p) for k in known)),
    ]
    pairs = [(strip, add) for strip in prefixes for add in prefixes if strip != add or norms != "same"]
    return [Renaming(strip, add, norms) for strip, add in [*pairs, *_by_suffix(unmatched[0], known)]]


def _norms(names: list[str], known: Mapping[str, object]) -> Norms:
    """Return the wanted names of norms: "new" where only these names are old, "old" where only the known names are."""
    ours, theirs = (any(name.endswith(tuple(_LEGACY)) for name in each) for each in (names, known))
    return "same" if ours == theirs else "new" if ours else "old"


def _by_suffix(name: str, known: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the change that turns ``name`` into the only known name with the longest common ending."""
    parts = name.split(".")
    for cut in range(len(parts) - 2):
        ending = ".".join(parts[cut:])
        matches = [other for other in known if other == ending or other.endswith("." + ending)]
        if len(matches) == 1:
            return [(name.removesuffix(ending), matches[0].removesuffix(ending))]
        if matches:
            return []
    return []
