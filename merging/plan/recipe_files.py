"""Recipes in files: the paths in them are relative to the recipe's folder."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from merging.errors import InputError, MergingError, MergingWarning, OptionError
from merging.hub.address import hub_address, local_path, no_such_path, resolve_path
from merging.plan.mergekit.schema import is_mergekit
from merging.plan.mergekit.translate import translate
from merging.plan.recipe import Recipe
from merging.plan.recipe_document import Keys, RecipeDocument, parse_documents
from merging.plan.recipe_settings import Setting, change_document, is_from_setting
from merging.plan.recipe_stages import join_stages
from merging.plan.recipe_values import check_counts, make_recipe, map_names, names_in, patterns_in
from merging.sources.small_files import RECIPE_LIMIT, read_text
from merging.type_checks import check_types

__all__ = ["LoadedRecipe", "load_recipe", "parse_recipe", "read_recipe", "resolve_name"]

_ENDINGS = (".yml", ".yaml", ".json")


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe from a document.

    Attributes:
        recipe: the recipe, whose paths are relative to the working folder.
        document: the values and their lines.
        folder: the folder of the recipe's file.
        notices: remarks for people about the paths.
    """

    recipe: Recipe
    document: RecipeDocument
    folder: Path
    notices: tuple[str, ...] = ()

    def check_paths(self, made: Collection[Path] = ()) -> None:
        """Refuse a local path that does not exist, with its line and the folders where it was looked for.

        Absolute paths in ``made``, and below them, count as existing: earlier merges will have made them.

        Raises :class:`~merging.errors.InputError`.
        """
        for keys, name in names_in(self.document.values):
            origin = self.document.origin(keys)
            with _before_errors(origin):
                path = local_path(name)
                absolute = resolve_path(path)
                if hub_address(name) or path.exists() or not {absolute, *absolute.parents}.isdisjoint(made):
                    continue
            own = [] if is_from_setting(origin) else [self.folder.resolve()]
            tried = " or ".join(dict.fromkeys(str(folder) for folder in [*own, Path.cwd()]))
            place = "" if Path(name).expanduser().is_absolute() else f"; it was looked for in {tried}"
            raise InputError(f"{origin}: {no_such_path(path)}{place}")

    def check_counts(self) -> None:
        """Refuse parameters that do not suit the number of models, with their line.

        Raises :class:`~merging.errors.OptionError`.
        """
        check_counts(self.document.values, self.document.origin)

    @contextmanager
    def name_lines(self) -> Iterator[None]:
        """Put the line of a model or a pattern in front of an error about it.

        Such as a model that the Hub does not have, or a pattern that names no tensor.
        """
        try:
            yield
        except MergingError as error:
            for keys, pattern, is_open in patterns_in(self.document.values):
                missing = is_open and ": no pattern matches " in str(error)
                if missing or str(error).startswith(f"{pattern!r} in "):
                    raise type(error)(f"{self.document.origin(keys)}: {error}") from None
            for keys, name in names_in(self.document.values):
                beginnings = [f"{name}: ", f"{name}@", f"{local_path(name)}: "]
                if any(str(error).startswith(each) or f": {each}" in str(error) for each in beginnings):
                    raise type(error)(f"{self.document.origin(keys)}: {error}") from None
            raise


@contextmanager
def _before_errors(origin: str) -> Iterator[None]:
    """Put a place in front of the errors in the body."""
    try:
        yield
    except MergingError as error:
        raise type(error)(f"{origin}: {error}") from None


@check_types("source")
def load_recipe(source: str | Path, where: str = "recipe", *, lenient: bool = False) -> Recipe:
    """Read a recipe from a file, or from YAML: a recipe of ours, or of mergekit.

    Args:
        source: the path of a file, or YAML itself. A text is a path if it ends in ``.yml``, ``.yaml`` or ``.json``, or
            if there is such a file. Relative paths of models in a file are relative to its folder, in YAML to the
            working folder.
        where: the source of YAML, which errors name.
        lenient: whether keys and parameters of a recipe of mergekit that mergekit ignores are ignored, with a warning
            each, and not refused.

    Returns:
        The recipe, with all paths relative to the working folder.

    Raises:
        FormatError: for a text that is not a YAML mapping.
        OptionError: for fields or values that no recipe has.
        InputError: for a file that is not there.

    Example:
        >>> import merging
        >>> recipe = merging.load_recipe("models: [a, b]\\nmethod: linear")
        >>> recipe.models
        ('a', 'b')
    """
    if isinstance(source, str) and not _is_path(source):
        loaded = parse_recipe(source, where, lenient=lenient)
    else:
        loaded = read_recipe(source, lenient=lenient)
    for notice in loaded.notices:
        warnings.warn(notice, MergingWarning, stacklevel=2)
    return loaded.recipe


def _is_path(text: str) -> bool:
    if "\n" in text:
        return False
    try:
        return text.endswith(_ENDINGS) or Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or with characters that no path has
        return False


@check_types("settings")
def read_recipe(source: str | Path, settings: Sequence[Setting] = (), *, lenient: bool = False) -> LoadedRecipe:
    """Read a recipe from a file.

    Args:
        source: the file. Relative paths of models in it are relative to its folder.
        settings: values to change; paths in them are relative to the working folder.
        lenient: whether what mergekit ignores in its recipes is ignored, with a notice, and not refused.

    Raises:
        FormatError: for a file that is not a YAML mapping.
        OptionError: for fields or values that no recipe has, and for a path that means one model in the recipe's folder
            and another in the working folder.
    """
    path = Path(source)
    text = read_text(path, RECIPE_LIMIT, given=True)
    document, remarks = _parse(text, str(path), path.parent, lenient)
    document, notices = _resolve_paths(document, path.parent)
    return _make(document, settings, path.parent, [*remarks, *notices])


def parse_recipe(text: str, where: str, settings: Sequence[Setting] = (), *, lenient: bool = False) -> LoadedRecipe:
    """Read a recipe from a text, whose paths are relative to the working folder. Raises as :func:`read_recipe` does."""
    document, notices = _parse(text, where, Path(), lenient)
    return _make(document, settings, Path(), notices)


def _parse(text: str, where: str, folder: Path, lenient: bool) -> tuple[RecipeDocument, list[str]]:
    """Return the document of a recipe in our schema, with its stages inside, and remarks."""
    stages, notices = [], []
    for document in parse_documents(text, where):
        if is_mergekit(document.values):
            document, remarks = translate(document, folder, lenient)
            notices += remarks
        stages.append(document)
    joined, remarks = join_stages(stages)
    return joined, [*notices, *remarks]


def _make(
    document: RecipeDocument, settings: Sequence[Setting], folder: Path, notices: Sequence[str] = ()
) -> LoadedRecipe:
    changed = change_document(document, settings)
    recipe = make_recipe(changed.values, document.origin(()), changed.origin)
    return LoadedRecipe(recipe, changed, folder, tuple(notices))


def _resolve_paths(document: RecipeDocument, folder: Path) -> tuple[RecipeDocument, list[str]]:
    """Return a document whose paths are relative to the working folder, and remarks."""
    if folder.samefile(Path.cwd()):
        return document, []
    notices: list[str] = []

    def resolve(name: str, keys: Keys) -> str:
        path, notice = resolve_name(name, folder, document.origin(keys))
        notices.extend([notice] if notice else [])
        return path

    return RecipeDocument(map_names(document.values, resolve), document.origins), notices


def resolve_name(name: str, folder: Path, origin: str) -> tuple[str, str]:
    """Return a model's name for the working folder, and a remark if it is not found in the recipe's folder.

    Raises :class:`~merging.errors.OptionError` for a name that means two models.
    """
    if not name or name.startswith("~") or "://" in name or Path(name).is_absolute():
        return name, ""
    here, inside = Path(name), folder / name
    if not here.exists():
        is_address = not inside.exists() and not inside.parent.is_dir() and hub_address(name)
        return (name if is_address else str(inside)), ""
    if not inside.exists():
        return (
            name,
            f"{origin}: {name} is not in the recipe's folder: {name} in the working folder is read",
        )
    if inside.samefile(here):
        return name, ""
    raise OptionError(
        f"{origin}: {name} is both in the recipe's folder and in the working folder: write the whole path of the model "
        f"that you mean, {inside.absolute()} or {here.absolute()}"
    )
