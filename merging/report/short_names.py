"""Short, distinct names of models: the ends of their paths, as long as needed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath

__all__ = ["short_names"]

_COMMIT = re.compile("@[0-9a-f]{40}(?=/|$)")


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest endings of the paths that differ. Parts in which all paths end are left out.

    Equal paths are numbered. Commits of the Hub are left out if the names are distinct without them.
    """
    bare = [_COMMIT.sub("", path) for path in paths]
    paths = bare if len(set(bare)) == len(set(paths)) else paths
    parts = [list(PurePath(path).parts) or [path] for path in paths]
    while len(set(paths)) > 1 and all(len(each) > 1 for each in parts) and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    whole = ["/".join(each) for each in parts]
    names = [_shortest(each, whole) for each in parts]
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(f"{name} #{seen[name]}" if names.count(name) > 1 else name)
    return out


def _shortest(parts: list[str], whole: Sequence[str]) -> str:
    """Return the shortest ending that no other path has."""
    this = "/".join(parts)
    others = [other for other in set(whole) if other != this]
    for start in range(len(parts) - 1, 0, -1):
        ending = "/".join(parts[start:])
        if not any(other == ending or other.endswith("/" + ending) for other in others):
            return ending
    return this
