"""A document of mergekit while it is read: its values by their keys, refusals with their lines, and what is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merging.errors import OptionError, nearest
from merging.plan.recipe_document import Keys, RecipeDocument

__all__ = ["Reading"]


@dataclass(frozen=True, slots=True)
class Reading:
    """A document that is read, and remarks about it.

    Attributes:
        document: the document in mergekit's schema.
        lenient: whether keys and values that mergekit ignores are ignored too, with a notice.
        notices: remarks for people.
    """

    document: RecipeDocument
    lenient: bool = False
    notices: list[str] = field(default_factory=list)

    def value(self, keys: Keys) -> Any:
        """Return the value at the keys, None where it does not exist."""
        value: Any = self.document.values
        for key in keys:
            if isinstance(value, dict):
                value = value.get(key)
            elif isinstance(value, list) and isinstance(key, int) and key < len(value):
                value = value[key]
            else:
                return None
        return value

    def error(self, keys: Keys, message: str) -> OptionError:
        """Return the error about a value, with its line."""
        return OptionError(f"{self.document.origin(keys)}: {message}")

    def note(self, keys: Keys, message: str) -> None:
        """Add a remark about a value, with its line."""
        self.notices.append(f"{self.document.origin(keys)}: {message}")

    def ignore(self, keys: Keys, message: str) -> None:
        """Refuse what mergekit ignores; a lenient reading ignores it too, and says so.

        Raises :class:`~merging.errors.OptionError`.
        """
        if not self.lenient:
            raise self.error(keys, message)
        self.note(keys, f"{message}: ignored")

    def mapping(self, keys: Keys, name: str) -> Mapping[str, Any]:
        """Return the mapping at the keys, an empty one where there is none. Raises OptionError for other values."""
        value = self.value(keys)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(keys, f"{name} should be a mapping of names to values, and is {value!r:.80}")
        return {str(key): each for key, each in value.items()}

    def items(self, keys: Keys, name: str) -> list[Any]:
        """Return the list at the keys, which has at least one value. Raises OptionError for other values."""
        value = self.value(keys)
        if not isinstance(value, list):
            raise self.error(keys, f"{name} should be a list, and is {value!r:.80}")
        if not value:
            raise self.error(keys, f"{name} is empty")
        return value

    def check_keys(self, keys: Keys, name: str, known: Mapping[str, str]) -> dict[str, Any]:
        """Return a mapping without unknown keys, which are refused or, in a lenient reading, ignored.

        Args:
            keys: the way to the mapping.
            name: the name of such a mapping, which errors state.
            known: the keys that it may have; the values are words about keys that belong elsewhere, or empty.
        """
        values = self.mapping(keys, name)
        allowed = [key for key, elsewhere in known.items() if not elsewhere]
        for key in values:
            if key not in allowed:
                hint = known.get(key, "")
                near = f": {hint}" if hint else nearest(key, allowed) or f": its keys are {', '.join(allowed)}"
                self.ignore((*keys, key), f"{name} has no key {key!r}{near}")
        return {key: value for key, value in values.items() if key in allowed}
