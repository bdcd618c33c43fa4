"""The recipe that an output states: in its weights' header, in mergekit_config.yml, or on its model card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merging.display.tables import Displayed
from merging.errors import InputError, MergingError
from merging.hub.address import hub_address, local_path, no_such_path
from merging.hub.repository import open_repository
from merging.output.header import DEVICE_KEY, RECIPE_KEY, SOURCES_KEY, VERSION_KEYS
from merging.plan.provenance import SourceRecord, parse_sources
from merging.plan.recipe import Recipe
from merging.plan.recipe_files import parse_recipe
from merging.plan.recipe_values import make_recipe
from merging.serving.subject import Subject, open_subject
from merging.sources.origin import Origin
from merging.sources.small_files import RECIPE_LIMIT, is_there, parse_json, read_text

__all__ = ["MOE_KEY", "RecipeRecord", "find_record", "read_record", "record_of"]

MERGEKIT_FILE = "mergekit_config.yml"
"""The file in which mergekit leaves its recipe in each output."""

MOE_KEY = "merging_moe_recipe"
"""The entry of a mixture's header that states its recipe, which has another schema."""

_BLOCK = re.compile(r"^([ \t]*)(```+|~~~+)[ \t]*(?:ya?ml)?[ \t]*\n(.*?)^[ \t]*\2[ \t]*$", re.MULTILINE | re.DOTALL)
_RECIPE = re.compile(r"^\s*[\"']?(merge_method|method|stack)[\"']?\s*:", re.MULTILINE)
_MERGES = re.compile(r"^\s*[\"'-]*\s*(models|slices|modules|stack)[\"']?\s*:", re.MULTILINE)
_NAMED = re.compile(r"^name\s*:", re.MULTILINE)


@dataclass(frozen=True, slots=True, repr=False)
class RecipeRecord(Displayed):
    """The recipe that an output states.

    Attributes:
        where: the place where it is stated.
        text: the recipe as YAML or JSON, as it is stated there.
        folder: the folder of the output, from which its sources may be found.
        sources: records of its sources, by their names in the recipe; empty where none are stated.
        versions: the versions of the programs that wrote the output.
        device: the type of the device that it was made on.
    """

    where: str
    text: str
    folder: Path | None = None
    sources: Mapping[str, SourceRecord] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"

    def recipe(self, lenient: bool = False) -> Recipe:
        """Return the recipe. Raises :class:`~merging.errors.MergingError` if it is none that is understood.

        ``lenient`` is as for :func:`~merging.load_recipe`.
        """
        if not self.sources and not self.versions:
            return parse_recipe(self.text, self.where, lenient=lenient).recipe
        return make_recipe(parse_json(self.text, self.where), self.where)


def read_record(path: str | Path) -> RecipeRecord:
    """Return the recipe that an output states.

    Args:
        path: a folder or weights file, a model card (``README.md``), or a name on the Hub.

    Raises:
        InputError: if it states no recipe, or several.
        MergingError: for files that are not understood.
    """
    record = find_record(path)
    if record is None:
        raise InputError(
            f"{path}: states no recipe: neither its weights' header, nor {MERGEKIT_FILE}, nor a block of YAML in its "
            f"README.md holds one"
        )
    return record


def find_record(path: str | Path) -> RecipeRecord | None:
    """Return the recipe that an output states, None if it states none. Raises as :func:`read_record` does."""
    name = str(path)
    if hub_address(name) is not None:
        return record_of(open_subject(name))
    place = local_path(name)
    if not place.exists():
        raise no_such_path(place)
    if place.suffix == ".md":
        return _on_card(place)
    try:
        subject = open_subject(name)
    except MergingError:
        if place.is_dir() and (stated := _in_folder(place)):
            return stated  # a folder without weights, as people keep recipes in
        raise
    return record_of(subject)


def record_of(subject: Subject) -> RecipeRecord | None:
    """Return the recipe that an opened model states, None if it states none. Raises as :func:`read_record` does."""
    metadata, place = subject.metadata, str(subject.name if subject.remote else subject.weights or subject.name)
    if MOE_KEY in metadata:
        raise InputError(f"{subject.name}: is a mixture of experts: `merge moe` makes it from the recipe on its card")
    address = hub_address(subject.name)
    if address is not None:
        repository = open_repository(address)
        origin = Origin(address.repo, repository.commit, address.path)
        repository.download_files((MERGEKIT_FILE,), origin.folder)
    folder = subject.folder or (subject.weights.parent if subject.weights else None)
    if RECIPE_KEY in metadata:
        sources = parse_sources(metadata.get(SOURCES_KEY, "[]"), place)
        versions = {key: metadata[key] for key in VERSION_KEYS if key in metadata}
        return RecipeRecord(
            place, metadata[RECIPE_KEY], folder, sources, versions=versions, device=metadata.get(DEVICE_KEY, "cpu")
        )
    return _in_folder(subject.folder) if subject.folder else None


def _in_folder(folder: Path) -> RecipeRecord | None:
    """Return the recipe of a folder's mergekit_config.yml, else of its card."""
    file = folder / MERGEKIT_FILE
    if is_there(file):
        return RecipeRecord(str(file), read_text(file, RECIPE_LIMIT), folder)
    card = folder / "README.md"
    return _on_card(card) if is_there(card) else None


def _on_card(card: Path) -> RecipeRecord | None:
    """Return the recipe on a model card; stages in blocks of their own are put together.

    Raises :class:`~merging.errors.InputError` for a card with several recipes.
    """
    text = read_text(card, given=True, errors="replace")
    blocks = list(_recipes_in(text))
    if not blocks:
        return None
    lines = [str(line) for line, _ in blocks]
    if any(_NAMED.search(block) is None for _, block in blocks[:-1]):
        raise InputError(
            f"{card}: holds {len(blocks)} recipes, in lines {', '.join(lines)}: copy one of them into a file"
        )
    where = f"{card}, line {lines[0]}"
    return RecipeRecord(where, "\n---\n".join(block for _, block in blocks), card.parent)


def _recipes_in(text: str) -> Iterator[tuple[int, str]]:
    """Yield the blocks of code that are recipes, and the line of each."""
    for match in _BLOCK.finditer(text):
        indent, block = match[1], match[3]
        if _RECIPE.search(block) and _MERGES.search(block):
            lines = [line.removeprefix(indent) for line in block.splitlines()]
            yield text.count("\n", 0, match.start(3)) + 1, "\n".join(lines) + "\n"
