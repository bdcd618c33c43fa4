"""Matching the names of one model's tensors to another's: they drift by a prefix, and by nothing else that is safe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["Renaming", "find_renaming", "strip_wrappers"]

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
"""What wrappers of the same network put before its names, in one version of transformers or another."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing put into the names of what they wrap, at any place."""

Norms = Literal["same", "new", "old"]
"""Which names of layer norms are wanted."""

_LEGACY = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
"""Endings of layer norms in very old checkpoints (bert-base-uncased), and what they are called now."""

_ENDINGS: dict[Norms, dict[str, str]] = {
    "same": {},
    "new": _LEGACY,
    "old": {new: old for old, new in _LEGACY.items()},
}


@dataclass(frozen=True, slots=True)
class Renaming:
    """Names lose ``strip`` and gain ``add`` at their beginning, and layer norms take today's names or the old ones."""

    strip: str = ""
    add: str = ""
    norms: Norms = "same"

    def __call__(self, name: str) -> str | None:
        """The new name, or None for one that does not begin with ``strip``."""
        if not name.startswith(self.strip):
            return None
        name = self.add + name[len(self.strip) :]
        for ending, wanted in _ENDINGS[self.norms].items():
            if name.endswith(ending):
                return name.removesuffix(ending) + wanted
        return name

    def __str__(self) -> str:
        if not self.strip and not self.add:
            return "the same names" if self.norms == "same" else f"{self.norms} names of norms"
        return f"{self.strip + '*' if self.strip else '*'} -> {self.add}*"


def strip_wrappers(names: Iterable[str]) -> dict[str, str]:
    """The names without those of wrappers for training, which no library expects in a file; by the names as they are.

    ``module.``, of data-parallel training, is one where all names begin with it. Names stay where two would be one.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name for name in names}
    if plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


def find_renaming(
    names: Iterable[str], known: Mapping[str, object], fits: Callable[[str, str], bool]
) -> tuple[Renaming, list[str]]:
    """The one renaming under which most ``names`` are ``known``, and the names that it leaves without a match.

    Tried in order: the names as they are, one prefix more or less, and the rewriting that the first unmatched name
    suggests if its ending is unique among the known names. ``fits(name, match)`` says whether a match may be one
    (equal shapes). One renaming holds for a whole model: matching each name on its own could scatter an adapter over
    two towers.
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
    renamed = ((name, renaming(name)) for name in names)
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
    """Whose layer norms have the old names: these names', then they need the new ones, or the known names'."""
    ours, theirs = (any(name.endswith(tuple(_LEGACY)) for name in each) for each in (names, known))
    return "same" if ours == theirs else "new" if ours else "old"


def _by_suffix(name: str, known: Mapping[str, object]) -> list[tuple[str, str]]:
    """The rewriting that turns ``name`` into the only known name with the same, longest possible ending."""
    parts = name.split(".")
    for cut in range(len(parts) - 2):
        ending = ".".join(parts[cut:])
        matches = [other for other in known if other == ending or other.endswith("." + ending)]
        if len(matches) == 1:
            return [(name.removesuffix(ending), matches[0].removesuffix(ending))]
        if matches:
            return []
    return []
