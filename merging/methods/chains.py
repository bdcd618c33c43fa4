"""Methods made of chains as they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merging.errors import OptionError
from merging.methods import aliases, links, owner_of
from merging.methods.contract.method import Method, build
from merging.type_checks import check_types

__all__ = ["chain"]


@check_types()
def chain(text: str, parameters: Mapping[str, Any] | None = None) -> Method:
    """Return the method of a chain.

    Args:
        text: the chain as it is written, such as ``"lines+task_arithmetic"``.
        parameters: the parameters by name, ``"density"``, or ``"ties.density"`` where several links have the name.

    Raises:
        OptionError: a name is unknown, or a parameter has a wrong value or belongs to no link or to several.

    Example:
        >>> import merging
        >>> merging.chain("lines+ties", {"density": 0.3}).chain
        'lines+ties'
    """
    classes = links(text)
    stated = {key: value for part in aliases(text) for key, value in {**part.fixed, **part.defaults}.items()}
    own = [{key.rpartition(".")[2]: stated[key] for key in stated if key.startswith(f"{cls.name}.")} for cls in classes]
    spellings: dict[tuple[int, str], str] = {}
    for key, value in (parameters or {}).items():
        owner, field = owner_of(key, classes, text), key.rpartition(".")[2]
        first = spellings.setdefault((owner, field), key)
        if first != key:
            raise OptionError(f"{first} and {key} are the same parameter: give one of them")
        own[owner][field] = value
    method = build(classes[-1], own[-1])
    for cls, values in zip(reversed(classes[:-1]), reversed(own[:-1]), strict=True):
        method = build(cls, {**values, "then": method})
    return method
