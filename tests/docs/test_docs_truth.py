"""Links lead somewhere, tables are those of the code, options exist, and the README stays short."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest
from click.testing import CliRunner

from merging.cli.main import cli, merge_command
from merging.cli.run import FULL_RECIPE, SMALL_RECIPE
from merging.methods import METHODS, method_class, parameters_of
from merging.methods.choosing import ADVICE, FULL, LORA, SHIPPED, STORES, Advice
from merging.methods.contract.method import Method
from merging.methods.contract.wrapper import Wrapper
from merging.report.drawing import draw_svg
from merging.report.style import DARK_SCREEN
from merging.searches.settings import SearchSettings
from merging.serving import PROGRAMS
from merging.sources.denoisers import FAMILIES
from support.for_all import for_all
from support.pages import PAGES, ROOT, blocks, prose, text_of

LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
MADE = re.compile(r"docs/(methods/\w+|cli/\w+|changelog|mergekit-recipes|diffusion-families)\.md")
"""Pages that mkdocs makes."""

FOREIGN = {
    *(
        "--concat",
        "--extra-index-url",
        "--lora-merge-cache",
        "--out-path",
        "--models",
        "--new_rank",
        "--ratios",
        "--save_to",
        "--sd_model",
    ),
    *("--strict", "--markdown"),
}
"""Options of other programs that the pages name."""

SCRIPTS = {
    "--steps",
    "--width",
    "--hidden",
    "--matrices",
    "--only",
    "--quick",
    "--stream",
    "--factored",
    "--tasks",
    "--tensors",
    "--fixed",
    "--local",
    "--lm-eval",
    "--methods",
    "--work",
}
"""Options of benchmarks that the pages name without the script."""


def said(*words: str) -> str:
    """Return the output of ``merge`` with these words."""
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text.lower()).strip()) for text in headings}


def broken(page: str) -> Iterator[str]:
    """Yield the links of a page that lead nowhere; those to other hosts are read, and not followed."""
    for target in LINK.findall(prose(page)):
        address = urlsplit(target)
        if address.scheme:
            if address.scheme != "https" or "." not in address.netloc:
                yield target
            continue
        path = ((ROOT / page).parent / address.path).resolve() if address.path else ROOT / page
        name = path.relative_to(ROOT).as_posix()
        missing = not path.exists() and not MADE.fullmatch(name)
        if missing or (address.fragment and address.fragment not in anchors(name)):
            yield target


OTHERS = ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md"]


@for_all([*PAGES, *OTHERS])
def test_links_lead_somewhere(page: str) -> None:
    assert list(broken(page)) == []


def test_links_are_found() -> None:
    """The test above would pass if it found none."""
    assert sum(len(LINK.findall(prose(page))) for page in PAGES) > 60
    assert LINK.findall("[a [b]](c.md#d) ![e](f.svg)") == ["c.md#d", "f.svg"]


@for_all([*PAGES, *OTHERS])
def test_named_files_exist(page: str) -> None:
    """Files of the repository that are named, and the options of scripts that are called."""
    for name in re.findall(r"`((?:merging|cli|tests|examples|docs|\.ci)/[\w./]*)", prose(page)):
        assert (ROOT / name).exists(), name
    calls = re.findall(r"python ((?:tests|examples|docs)/[\w/]+\.py)([^`\n]*)", text_of(page))
    for script, words in calls:
        source = (ROOT / script).read_text(encoding="utf-8")
        shared = [
            (ROOT / script).parent / f"{name}.py" for name in re.findall(r"^from (\w+) import", source, re.MULTILINE)
        ]
        source += "".join(path.read_text(encoding="utf-8") for path in shared if path.exists())
        for option in re.findall(r"--[a-z-]+", words):
            assert f'"{option}"' in source, f"{script} has no {option}"


def _options(command: click.Command) -> Iterator[str]:
    for param in command.params:
        yield from (*param.opts, *param.secondary_opts)
    for inner in getattr(command, "commands", {}).values():
        yield from _options(inner)


@cache
def known_options() -> frozenset[str]:
    """Return the options of every command and of every method, and the settings of a search."""
    fields = [field.replace("_", "-") for name in METHODS for field in parameters_of(method_class(name))]
    own = [f"--{word}{field}" for field in fields for word in ("", "no-")]
    own += [f"--{name}.{field}" for name in METHODS for field in parameters_of(method_class(name))]
    own += [f"--{field.replace('_', '-')}" for field in SearchSettings.model_fields]
    return frozenset([*_options(cli), *_options(merge_command), *own, "--help", "--version"])


@for_all(PAGES)
def test_named_options_exist(page: str) -> None:
    """In prose and tables, where nothing is run; scripts have options of their own."""
    text = re.sub(r"`python [^`]*`", "", prose(page))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z]", " ".join(re.findall(r"`([^`]*)`", text))))
    assert named - known_options() - FOREIGN <= SCRIPTS


def test_table_of_methods_is_generated() -> None:
    assert f"<!-- methods -->\n{said('methods', '--markdown')}" in text_of("docs/methods/index.md")


def test_table_of_formats_is_generated() -> None:
    """And the screen and JSON name the same formats."""
    page = text_of("docs/formats.md")
    assert f"<!-- formats -->\n{said('formats', '--markdown')}" in page
    screen = " ".join(said("formats").split())
    for each in json.loads(said("formats", "--json")):
        assert each["name"].split(",")[0] in screen
        assert f"| {each['name']} |" in page


def test_table_of_a_recipes_keys_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generate"))
    table = import_module("recipe_table").recipe_table()
    assert f"<!-- keys -->\n{table}\n" in text_of("docs/tasks/recipes.md")


def test_recipes_in_help_are_those_of_the_page() -> None:
    shown = {block.title: block.text for block in blocks("docs/tasks/recipes.md")}
    assert (shown["small.yml"], shown["full.yml"]) == (SMALL_RECIPE, FULL_RECIPE)


def test_every_program_that_serves_is_in_the_table() -> None:
    assert re.findall(r"^\| `(.*?)` \| [\w. ]+ \|", text_of("docs/tasks/verify.md"), re.MULTILINE) == list(PROGRAMS)


def test_architecture_names_every_folder_on_its_floor() -> None:
    (layers,) = (ROOT / "tests").rglob("test_layers_of_code.py")
    tree = ast.parse(layers.read_text(encoding="utf-8"))
    (floors,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "FLOORS" and node.value
    )
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", text_of("docs/contributing/architecture.md"), re.MULTILINE)
    assert [(int(number), sorted(re.findall(r"`(\w+)`", names))) for number, names in rows] == [
        (number, sorted(floor)) for number, floor in enumerate(floors, 1)
    ]


def test_members_of_the_contract_exist() -> None:
    rows = re.findall(r"^\| [123] \| ([^|]*) \|", text_of("docs/contributing/method.md"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    known = {*dir(Wrapper), *Wrapper.model_fields, *Method.__annotations__}
    assert len(rows) == 3
    assert [name for name in named if name not in known] == []


def _rows(page: str) -> dict[str, list[str]]:
    """Return the cells of every row of a page's tables, by the first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text_of(page).splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows}


def test_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    readme, quality = _rows("README.md"), _rows("docs/benchmarks/quality.md")
    measured = re.findall(r"^\| .* MB \(.* MB\) \|$", text_of("README.md"), re.MULTILINE)
    assert len(measured) == 3
    assert all(f"\n{row}\n" in text_of("docs/benchmarks/speed.md") for row in measured)
    rows = {"opcm": "opcm, alpha 0.5", "single models": "individual"}
    columns = re.findall(r"^\| (\| base .*) \|$", text_of("README.md"), re.MULTILINE)[0].strip("| ").split(" | ")
    for title, cell in (("full fine-tunes", 1), ("LoRA, rank 16", 4)):
        figures = dict(zip(columns, readme[title], strict=True))
        assert figures == {name: quality[rows.get(name, name)][cell].split()[0] for name in columns}


def test_differences_from_mergekit_have_reasons_and_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generate"))
    page = import_module("mergekit_page")
    for each in page.DIFFERENCES:
        assert all((each.peer, each.ours, each.reason, each.seen)), each
        for pattern in each.recipes:
            assert any(fnmatchcase(name, pattern) for name in page.RECIPES), pattern
    assert len(page.RECIPES) >= 95
    assert f"{len(page.RECIPES)} recipes" in page.mergekit_page()


def test_the_page_of_families_has_every_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generate"))
    page = import_module("families_page").families_page()
    assert "| `double_blocks.{}.img_attn.qkv` | `transformer_blocks.{}.attn.to_q`, " in page
    assert "| Qwen-Image (Qwen-Image-Edit) | one name everywhere |" in page
    for family in FAMILIES:
        assert f"| {family.name} " in page
        assert all(f"| `{rule.published}` | `{rule.diffusers[0]}`" in page for rule in family.rules)


def test_table_of_advice_is_generated() -> None:
    assert f"<!-- advice -->\n{said('methods', '--help-me-choose', '--markdown')}" in text_of("docs/methods/choose.md")


def test_figures_of_the_advice_are_those_of_the_benchmarks() -> None:
    quality, stores = _rows("docs/benchmarks/quality.md"), _rows("docs/benchmarks/stores.md")
    for table, cell in ((FULL, 1), (LORA, 4)):
        assert table == {name: quality[name][cell].split()[0] for name in table}
    assert {name: (stores[name][0].split()[0], stores[name][2].split()[0]) for name in STORES} == STORES
    shipped = dict(zip(quality["task"], quality["mean"], strict=True))
    assert {name: shipped[name] for name in SHIPPED} == SHIPPED
    fixed, chosen = (quality[row][1].split()[0] for row in ("running sum 0.3", "task arithmetic"))
    assert f"has {fixed} with 0.3 and {chosen} with the best" in text_of("docs/methods/choose.md")


@pytest.mark.parametrize("advice", ADVICE, ids=lambda advice: advice.have)
def test_numbers_of_the_advice_are_on_the_pages_that_it_names(advice: Advice) -> None:
    """Also those that are written out, but for values of options and counts of models."""
    said_there = " ".join(text_of(f"docs/benchmarks/{page}.md") for page in advice.pages)
    text = re.sub(r"`[^`]*`|\b(?:of rank \d+|reads the inputs \d times)", "", f"{advice.evidence} {advice.cost}")
    numbers = re.findall(r"\d+(?:\.\d+)?", text)
    assert [each for each in numbers if not re.search(rf"(?<![\d.]){re.escape(each)}(?![\d]|\.\d)", said_there)] == []


def test_methods_of_the_advice_exist() -> None:
    """And take the options that it gives them."""
    quoted = [text for each in ADVICE for text in re.findall(r"`([^`]+)`", f"{each.first} {each.then} {each.evidence}")]
    merges = [text for text in quoted if not text.startswith(("merge ", "--", "dedupe"))]
    assert len(merges) > 20
    for text in merges:
        assert said("-m", *text.split(), "a", "b", "--recipe-only")


def test_number_of_methods_is_right() -> None:
    assert f"[{len(METHODS)} methods]" in text_of("README.md")


def test_pictures_are_drawn_by_their_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generate"))
    pictures = import_module("pictures")
    for name, draw in pictures.PICTURES.items():
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == draw().svg()
        assert f"(pictures/{name}.svg)" in text_of("docs/concepts.md")


def test_figures_are_shown_with_their_captions() -> None:
    """Every figure that docs/generate/figures.py draws is on a page, and says how to read it in its own words."""
    folder = ROOT / "docs" / "pictures"
    captions = json.loads((folder / "captions.json").read_text())
    concepts = set(re.findall(r"pictures/([\w-]+)\.svg", text_of("docs/concepts.md")))
    assert {path.stem for path in folder.glob("*.svg")} == captions.keys() | concepts
    pages = {"compare": "compare", "store": "continual", "pool": "pool", "recycle": "recycle", "report": "report"}
    for name, caption in captions.items():
        page = " ".join(text_of(f"docs/tasks/{pages[name.partition('-')[0]]}.md").split())
        assert re.search(rf"!\[[^\]]+\]\(\.\./pictures/{name}\.svg\) \*{re.escape(caption)}\*", page, re.IGNORECASE), (
            name
        )
        drawing = (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert drawing.startswith("<svg")
        assert DARK_SCREEN in drawing
        assert not re.search(r"<text|dc:date", drawing)


def test_the_compared_figures_are_drawn_by_their_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn again, their captions are the same, but for the number of chance; the words in a drawing too."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generate"))
    drawn = dict(import_module("figures").compared())
    captions = json.loads((ROOT / "docs" / "pictures" / "captions.json").read_text())
    assert {name for name in captions if name.startswith("compare-")} == drawn.keys()
    for name, panel in drawn.items():
        assert panel.caption == captions[name]
        written = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
        words = {text for text in re.findall("<!-- (.*?) -->", draw_svg(panel)) if re.search("[a-z]{3}", text)}
        assert words and words <= set(re.findall("<!-- (.*?) -->", written))


def test_examples_on_the_pages_of_methods_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As recipes: the chain, the base and the number of models suit each method."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generate"))
    monkeypatch.chdir(tmp_path)
    pages = import_module("method_pages").method_pages()
    assert len(pages) == len(METHODS)
    for text in pages.values():
        (line,) = re.findall(r"^merge --method .*$", text, re.MULTILINE)
        recipe = said(*line.split()[1:], "--recipe-only")
        assert "models:" in recipe


def test_commands_for_a_fresh_machine_are_marked() -> None:
    """The blocks of the README that .ci/run takes."""
    for name in ("main", "tests"):
        assert f"<!-- run: {name} -->\n```bash\n" in text_of("README.md")


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) < 150


def test_pages_have_code_only_in_known_languages() -> None:
    for page in PAGES:
        assert {block.language for block in blocks(page)} <= {"bash", "python", "text", "yaml"}, page
