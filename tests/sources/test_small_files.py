"""The one door for small files: what is no ordinary file, too large, or a link out of its folder stays outside."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import merging
from merging import os_calls
from merging.cli.main import cli
from merging.errors import FormatError, MergingError
from merging.hub.cards import stated_licence
from merging.hub.open_model import open_model
from merging.hub.push import Target, push
from merging.plan.recipe_files import load_recipe
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.sources.links import check_inside, refuse_link
from merging.sources.plain_yaml import load_yaml
from merging.sources.small_files import TEXT_LIMIT, copy_file, read_json, read_text
from support.paths import ROOT
from support.tiny import checkpoint, load, model, save

OPENERS = ("open", "fdopen", "read_text", "read_bytes", "open_regular", "mmap", "get_node")
LOADERS = ("json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.parse", "torch.load", "shutil.copyfile")
ALLOWED = {
    "merging/sources/small_files.py": {"fdopen", "open_regular", "json.loads"},
    "merging/sources/plain_yaml.py": {"yaml.load", "yaml.parse"},
    "merging/plan/recipe_document.py": {"get_node"},  # behind check_yaml, with the lines of faults
    "merging/os_calls.py": {"open", "fdopen"},  # the last of the system's own
    "merging/storage/atomic.py": {"fdopen"},
    # weights, which are large
    "merging/sources/header.py": {"open", "json.loads"},
    "merging/sources/open_files.py": {"open_regular"},
    "merging/api/rerun.py": {"fdopen", "open_regular"},
    "merging/output/model_folder.py": {"fdopen", "open_regular"},
    "merging/pool/files.py": {"fdopen", "open_regular"},
    "merging/continual/manifest.py": {"fdopen", "open_regular"},
    "merging/hub/download.py": {"open", "fdopen", "open_regular"},
    "merging/storage/output_file.py": {"open"},
    "merging/storage/placed_files.py": {"open"},
    "merging/storage/gguf_writer.py": {"open", "read_bytes"},
    "merging/storage/store_output.py": {"fdopen", "open_regular"},
    "merging/object_stores/uploads.py": {"open"},
    "merging/sources/links.py": {"shutil.copyfile"},  # where the file system has no links
    "merging/statistics/examples.py": {"fdopen", "open_regular"},  # line by line
    "merging/statistics/network.py": {"open"},  # images, by Pillow
    "merging/storage/staging.py": {"open"},  # to make what was written durable
    "cli/errors.py": {"open"},  # the null device
    "merging/sources/checkpoint.py": {"read_bytes"},  # a sample of a tensor
    # what the system says about itself
    "merging/engine/process_memory.py": {"open", "read_text"},
    "merging/engine/remote_work.py": {"read_text"},
    "merging/sources/quantized/quantized_weights.py": {"json.loads"},  # a marker of a few bytes
    # what this process wrote or made itself
    "merging/api/resuming.py": {"json.loads"},
    "merging/engine/journal.py": {"json.loads", "open"},
    "merging/engine/sweeps.py": {"json.loads", "open"},
    "merging/api/calibrate.py": {"open"},
    "merging/maths/kernels/kept_code.py": {"read_bytes"},  # with a checksum of its content
    "merging/storage/scratch.py": {"open", "fdopen"},
    "merging/object_stores/upload_record.py": {"json.loads", "read_text"},  # and when a process started
    "merging/recycling/run_checkpoint.py": {"torch.load"},
    "merging/recycling/facts.py": {"json.loads"},
    "merging/searches/run.py": {"json.loads"},
    "merging/searches/output.py": {"read_text"},  # the card of the merge that it has just written
    "merging/recycling/workflow.py": {"json.loads"},
    # texts in an index or a file that came through a door
    "merging/recycling/data.py": {"json.loads"},
    "merging/sources/gguf/model_config.py": {"json.loads"},
}


def _calls(path: Path) -> set[str]:
    """The functions that open or parse files, by the names that they are called by."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name in LOADERS:
                found.add(name)
            elif name == "open" or method in OPENERS:
                found.add(method or name)
    return found


def test_no_other_place_opens_small_files() -> None:
    """By the syntax tree of every file."""
    files = [path for folder in ("merging", "cli") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix(): calls for path in files if (calls := _calls(path))}
    assert found == ALLOWED


# ---- what is no ordinary file, or has no end


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 31)


ODD: dict[str, Callable[[Path], None]] = {"pipe": _pipe, "device": _device, "folder": Path.mkdir, "huge": _huge}
NAMES = (
    "README.md", "config.json", "adapter_config.json", "model_index.json", "modules.json",
    "model.safetensors.index.json", "tokenizer.json", "vocab.json", "vocab.txt", "LICENSE", "tokenizer.model",
)  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", NAMES)
def test_odd_companions_of_models(tmp_path: Path, name: str, kind: str) -> None:
    """Refused with their name, or left where they are; never read without end, and nothing is written."""
    base, tuned = checkpoint(tmp_path, layers=1)
    if name.startswith("model.safetensors"):
        (base / "model.safetensors").unlink()
    (base / name).unlink(missing_ok=True)
    ODD[kind](base / name)
    try:
        merging.merge(tuned, method="task_arithmetic", base=base, output=tmp_path / "out")
        assert kind == "folder" and name.startswith(("LICENSE", "tokenizer", "vocab")), "not copied, and not read"
    except MergingError as error:
        assert re.search(rf"{re.escape(name)}: (is|cannot be read)|model .* and the config of an adapter", str(error))
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")
@pytest.mark.parametrize("kind", ["pipe", "huge", "device"])
def test_odd_files_that_users_name(tmp_path: Path, kind: str) -> None:
    """A recipe, an index, a model: one message, exit code 1."""
    for name, words in (
        ("recipe.yaml", ["run"]),
        ("x.safetensors.index.json", ["inspect"]),
        ("x.safetensors", ["inspect"]),
        ("x.bin", ["inspect"]),
    ):
        ODD[kind](tmp_path / name)
        done = CliRunner().invoke(cli, [*words, str(tmp_path / name)])
        assert (done.exit_code, done.exception.__class__) == (1, SystemExit), (name, done.output)
        assert name in done.output and done.output.count("Error:") == 1


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": "' + b"x" * (TEXT_LIMIT - 9) + b'"}')
    assert len(read_json(path)["a"]) == TEXT_LIMIT - 9
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(FormatError, match=r"config\.json: is larger than 8 MiB, which no such file is"):
        read_json(path)
    path.write_text('{"a": [' + "[]," * 2_100_000 + "0]}")
    with pytest.raises(FormatError, match="holds more than 2,097,152 lists and objects"):
        read_json(path)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert read_text(tmp_path / "a.txt") == "one\ntwo\nthree"


# ---- links


@pytest.mark.parametrize("check", [refuse_link, lambda path: check_inside(path, path.parent)], ids=["refuse", "check"])
def test_a_link_that_is_exchanged_while_it_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Path], Path]
) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    readlink = os.readlink

    def exchanged(path: str, **rest: int) -> str:
        Path(path).unlink()
        Path(path).write_text("")
        return readlink(path, **rest)

    monkeypatch.setattr(os, "readlink", exchanged)
    if sys.version_info >= (3, 13) and check is not refuse_link:  # there it sees the file that is in the link's place
        assert check(tmp_path / "link") == tmp_path / "link"
        return
    with pytest.raises(FormatError, match=r"link: (cannot be followed to where it leads: Invalid|is a link, to)"):
        check(tmp_path / "link")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says where an open file lies")
@pytest.mark.parametrize("use", [lambda path: copy_file(path, path.with_name("copy")), read_text], ids=["copy", "read"])
def test_a_link_that_comes_after_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], object]
) -> None:
    """Where an open file lies is looked at once more, so that no secret is copied or read."""
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model" / "LICENSE").write_text("free")
    opened = os_calls.open_regular

    def exchanged(path: Path) -> int:
        path.unlink()
        path.symlink_to(tmp_path / "secret")
        return opened(path)

    monkeypatch.setattr(os_calls, "open_regular", exchanged)
    with pytest.raises(FormatError, match=r"LICENSE: is a link out of its folder, to .*secret"):
        use(tmp_path / "model" / "LICENSE")
    assert not any("secret" in path.read_text() for path in (tmp_path / "model").glob("copy"))


def test_links_out_of_a_model_are_not_read(tmp_path: Path) -> None:
    """A licence, tokenizer, template, config or weights that lead elsewhere would be copied, and published."""
    (tmp_path / "secret").write_text("{}")
    base, tuned = checkpoint(tmp_path, layers=1)
    shutil.copy(base / "model.safetensors", tmp_path / "elsewhere.safetensors")
    for name in ("LICENSE", "tokenizer.json", "chat_template.jinja", "config.json", "README.md", "model.safetensors"):
        folder = tmp_path / f"with {name}"
        shutil.copytree(base, folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / ("secret" if "safetensors" not in name else "elsewhere.safetensors"))
        with pytest.raises(FormatError, match=rf"{re.escape(name)}: is a link out of its folder, to "):
            merging.merge(tuned, method="task_arithmetic", base=folder, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    inside = tmp_path / "with a folder"
    shutil.copytree(base, inside)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.jinja").write_text("secret")
    (inside / "additional_chat_templates").symlink_to(tmp_path / "templates")
    with pytest.raises(FormatError, match=r"a\.jinja: is a link out of its folder"):
        merging.merge(tuned, method="task_arithmetic", base=inside, output=tmp_path / "out")


def test_links_to_shards_and_components(tmp_path: Path) -> None:
    base = save(tmp_path / "base", model(1), shards=2)
    shard = next(base.glob("*-of-*.safetensors"))
    shard.rename(tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    with pytest.raises(FormatError, match=r"-of-.*is a link out of its folder"):
        open_model(base)


def test_links_of_the_hubs_cache_and_of_users_go_on_working(tmp_path: Path) -> None:
    """A snapshot's files lie among the blobs; a model, or one file of it, may be linked by who names it."""
    base, tuned = checkpoint(tmp_path, layers=1)
    (base / "LICENSE").write_text("to be copied")
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "mine").symlink_to(snapshot)
    wanted = load(merging.merge(tuned, method="task_arithmetic", base=base, output=tmp_path / "a").path)
    for number, named in enumerate((snapshot, tmp_path / "mine")):
        merged = merging.merge(tuned, method="task_arithmetic", base=named, output=tmp_path / f"out{number}").path
        assert load(merged).keys() == wanted.keys()
        assert (merged / "LICENSE").read_text() == "to be copied" and not (merged / "LICENSE").is_symlink()
    (tmp_path / "one.safetensors").symlink_to(tuned[0] / "model.safetensors")
    assert open_model(tmp_path / "one.safetensors").tensors.keys() == wanted.keys()
    (repository / "blobs").rename(tmp_path / "blobs")
    (repository / "blobs").symlink_to(tmp_path / "blobs")
    with pytest.raises(FormatError, match="is a link out of its folder"):
        open_model(snapshot)


def test_links_out_of_a_folder_are_not_published(tmp_path: Path) -> None:
    """Before anything is asked of the Hub."""
    folder = save(tmp_path / "out", model(1))
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match=r"LICENSE: is a link out of its folder"):
        push(folder, Target("org/name", False, "0" * 40), "a merge")


def test_links_of_unfinished_runs(tmp_path: Path) -> None:
    """A run is neither gone on with, nor removed, through a link."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "plan.json").write_text("{}")
    (tmp_path / "run").symlink_to(tmp_path / "precious")
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(FormatError, match="run: is a link"):
            RunCheckpoint(tmp_path / "run", {}, **options)
    assert (tmp_path / "precious" / "plan.json").exists()


# ---- YAML


DOUBLES = "b0: &b0 {x: 1}\n" + "".join(f"b{n + 1}: &b{n + 1} {{<<: [*b{n}, *b{n}]}}\n" for n in range(40))
HEADS = {
    "half a character": ('license: "\\ud83d"', "half a character"),
    "keys that double": (DOUBLES, "holds more than"),
    "a deep nest": ("a: " + "[" * 5000, "nested too deeply"),
    "a deeper nest": ("a:\n" + "".join("  " * n + "- \n" for n in range(1, 500)), "nested too deeply"),
    "itself": ("license: &a [*a]", "holds itself"),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_cards(tmp_path: Path, head: str) -> None:
    text, told = HEADS[head]
    tuned = [save(tmp_path / str(seed), model(seed)) for seed in (1, 2)]
    (tuned[0] / "README.md").write_text(f"---\n{text}\n---\n# A model\n")
    done = CliRunner().invoke(cli, ["-m", "linear", *map(str, tuned), "-o", str(tmp_path / "out")])
    assert (done.exit_code, done.exception.__class__) == (1, SystemExit)
    assert re.search(rf"README\.md: .*{told}", done.output) and not (tmp_path / "out").exists()
    with pytest.raises(FormatError, match=told):
        load_recipe(text)


def test_heads_that_are_no_yaml_state_no_licence(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert stated_licence(card) is None
    for head in ("license: [", "license: 2024-99-99", "a: !!timestamp x", "license: {a: b}", "- license", "\tlicense"):
        card.write_text(f"---\n{head}\n---\n")
        assert stated_licence(card) is None
    card.write_bytes(b"---\nlicense: mit\ntags: [\xff]\n---\n")
    assert stated_licence(card) == "mit"
    card.write_text("license: mit\n---\nx\n---\n")
    assert stated_licence(card) is None


def test_plain_yaml_of_reasonable_size() -> None:
    assert load_yaml("a: &a {b: 1}\nc: {<<: *a, d: 2}", "x")["c"] == {"b": 1, "d": 2}


def test_recipes_of_many_keys_take_no_square_time() -> None:
    """What took half a minute is refused, or read, after each key was seen once."""
    keys = "".join(f"k{number}: 1\n" for number in range(10_000))
    with pytest.raises(MergingError, match="there is no 'k0'"):
        load_recipe(f"models: [a]\nmethod: linear\n{keys}")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there is no such device here")
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "folder/adapter_model.bin", "folder/pytorch_model.bin"])
def test_devices_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(MergingError, match=r"is a device, and should be a file|is a link out of its folder"):
        open_model(tmp_path / name if name.startswith("a.") else tmp_path / "folder")
