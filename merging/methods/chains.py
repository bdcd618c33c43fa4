"""Methods made of chains as they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merging.errors import OptionError
from merging.methods import aliases, links, owner_of
from merging.methods.blocks import read_weights
from merging.methods.contract.method import Method, build
from merging.type_checks import check_types

__all__ = ["chain"]


@check_types()
def chain(text: str, parameters: Mapping[str, Any] | None = None) -> Method:
    """Return the method of a chain.

    Args:
        text: the chain as it is written, such as ``"lines+task_arithmetic"``.
        parameters: the parameters by name, ``"density"``, or ``"ties.density"`` where several links have the name.
            With ``blocks`` or ``elements``, :class:`~merging.methods.blocks.BlockWeighted` goes around the chain.

    Raises:
        OptionError: a name is unknown, or a parameter has a wrong value or belongs to no link or to several.

    Example:
        >>> import merging
        >>> merging.chain("lines+ties", {"density": 0.3}).chain
        'lines+ties'
    """
    text, parameters = _weigh_blocks(text, parameters or {})
    classes = links(text)
    stated = {key: value for part in aliases(text) for key, value in {**part.fixed, **part.defaults}.items()}
    own = [{key.rpartition(".")[2]: stated[key] for key in stated if key.startswith(f"{cls.name}.")} for cls in classes]
    spellings: dict[tuple[int, str], str] = {}
    for key, value in parameters.items():
        owner, field = owner_of(key, classes, text), key.rpartition(".")[2]
        first = spellings.setdefault((owner, field), key)
        if first != key:
            raise OptionError(f"{first} and {key} are the same parameter: give one of them")
        own[owner][field] = value
    method = build(classes[-1], own[-1])
    for cls, values in zip(reversed(classes[:-1]), reversed(own[:-1]), strict=True):
        method = build(cls, {**values, "then": method})
    return method


def _weigh_blocks(text: str, parameters: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return a chain with weights by block around it if it has parameters for them, and these as one."""
    stated = {key: parameters[key] for key in ("blocks", "elements") if parameters.get(key) is not None}
    rest = {key: value for key, value in parameters.items() if key not in ("blocks", "elements")}
    if not stated:
        return text, rest
    try:
        weights = read_weights(stated.get("blocks"), stated.get("elements"))
    except ValueError as error:
        raise OptionError(f"{' and '.join(stated)}: {error}") from None
    around = "blocks" in (part.strip() for part in text.split("+"))
    return text if around else f"blocks+{text}", {**rest, "blocks": weights}
