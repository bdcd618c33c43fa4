"""Parameters held against the places where a method merges: values missing there, and values without effect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from merging.errors import OptionError
from merging.maths.parameters import by_block, find_reached, find_unreached, graded, patterns
from merging.maths.patterns import explain_unmatched
from merging.maths.site import Site
from merging.methods.contract.method import Method

__all__ = ["check_places", "idle_parameters"]


_TIED_HEAD = "lm_head.weight"
"""The name of a head that many files do not hold, as the embedding takes its place."""


def check_places(
    method: Method, sites: Iterable[Site], models: int, remedy: str = "", *, allow_unmatched: bool = False
) -> list[str]:
    """Check the parameters at every place, where they differ from place to place.

    Args:
        method: the method.
        sites: the places where it merges.
        models: the number of models.
        remedy: advice for names that state no depth, where a parameter goes by depth.
        allow_unmatched: whether patterns without effect are named, and not refused.

    Returns:
        Remarks on patterns without effect: of a head that is tied, and others if they are allowed.

    Raises:
        OptionError: for parameters without a value at a place, or without effect.
    """
    sites = list(sites)
    if method.by_depth and sites and all(site.position.layer is None for site in sites):
        raise OptionError(
            f"{_by_depth(method)} goes by the depth of each tensor in the model, and none of their names states it "
            f"({sites[0].name} is one): {remedy}leave it out, or choose a value that is the same everywhere"
        )
    if not any(link.varies for link in method.links()):
        return []
    notices = []
    for link in method.links():
        for field in type(link).model_fields:
            for pattern, problem in _idle_patterns(getattr(link, field), [site.name for site in sites]):
                where = f"{pattern!r} in {link.name}.{field}"
                if allow_unmatched or (pattern and pattern in _TIED_HEAD):
                    notices.append(f"ignored: {where} {problem}")
                else:
                    raise OptionError(f"{where} {problem}")
            for value in by_block(getattr(link, field)):
                notices += value.find_idle(sites)
    for site in sites:
        method.at(site).check(models)
    return list(dict.fromkeys(notices))


def _idle_patterns(value: object, names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each pattern of a parameter that has no effect, and the reason."""
    for pattern in dict.fromkeys(patterns(value)):
        if problem := explain_unmatched(pattern, names):
            yield pattern, problem
    dead = find_unreached(value, names)
    if dead and dead[0] != "*":  # the value for the rest, which may be none
        yield (
            dead[0],
            f"takes effect nowhere, since {dead[1]!r} comes before it and the first that matches counts: put "
            f"{dead[0]!r} first",
        )


def _by_depth(method: Method) -> str:
    """Return the name of the innermost method or parameter that goes by depth."""
    link = next(link for link in reversed(method.links()) if link.by_depth)
    field = next((field for field in type(link).model_fields if graded(getattr(link, field))), None)
    return f"{link.name}.{field}" if field else link.name


def idle_parameters(method: Method, sites: Iterable[Site]) -> list[str]:
    """Return a notice for each given parameter, or each of its patterns, that has no effect at any of its places."""
    links = method.links()
    given = {
        (index, field): getattr(link, field)
        for index, link in enumerate(links)
        for field in sorted(link.model_fields_set - {"then"})
    }
    if not any(link.varies for link in links):  # then places of one kind are alike
        sites = {site.kind: site for site in sites}.values()
    reasons: dict[tuple[int, str, str | None], set[str]] = {}
    for site in sites if given else ():
        idle = [link.idle(site) for link in method.at(site).links()]
        for (index, field), value in given.items():
            reasons.setdefault((index, field, find_reached(value, site)), set()).add(idle[index].get(field, ""))
    notices = []
    for (index, field, pattern), found in reasons.items():
        if "" not in found:
            where = f" on {pattern!r}" if pattern else ""
            notices.append(f"{links[index].name}.{field} has no effect{where}: {' and '.join(sorted(found))}")
    return notices
