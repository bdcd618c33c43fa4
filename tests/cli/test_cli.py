"""The command line: what is understood, what is refused and how, what is printed, and what is not imported."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import yaml

import merging
from merging.cli.main import cli
from merging.cli.output import format_size
from merging.cli.types import Size
from merging.methods import GROUPS, METHODS
from merging.methods.choosing import ADVICE
from support.commands import merge, ok, refused
from support.tiny import checkpoint, identical, load, model, save


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with base, tuned0 and tuned1."""
    checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mean(*paths: Path) -> dict[str, torch.Tensor]:
    models = [load(path) for path in paths]
    return {name: sum(each[name] for each in models) / len(models) for name in models[0]}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


# ---- merging


@pytest.mark.parametrize(
    "words",
    [
        "--method linear tuned0 tuned1",
        "tuned0 tuned1 --method=linear",
        "tuned0 -m linear tuned1",
        "tuned0 tuned1 -mlinear",
        "-m linear --weights 2 tuned0 tuned1",
        "-mlinear --weights 2,2 tuned0 tuned1",
        "--method linear --no-normalize --weights 0.5,0.5 tuned0 tuned1 --threads 1 --max-memory 1GiB",
    ],
)
def test_the_default_command_merges(folder: Path, words: str) -> None:
    done = ok(*words.split())
    assert done.stdout.startswith("merged: model, 2 models by linear, 9 tensors, ")
    assert close(load(folder / "merged"), mean(folder / "tuned0", folder / "tuned1"))


def test_bare_files_make_a_bare_file(folder: Path) -> None:
    files = [folder / f"tuned{i}" / "model.safetensors" for i in range(2)]
    assert ok("-m", "linear", *files).stdout.startswith("merged.safetensors: model")
    assert close(load(folder / "merged.safetensors"), mean(*files))


@pytest.mark.parametrize("weights", ["-1,0.5", "-1", "-.5,-2e-1"])
@pytest.mark.parametrize("form", ["--weights {}", "--weights={}"])
def test_negative_weights_and_lists(folder: Path, weights: str, form: str) -> None:
    ok("-m", "task_arithmetic", "--base", "base", *form.format(weights).split(), "tuned0", "tuned1", "-o", "out")
    numbers = [float(part) for part in weights.split(",")]
    base, one, two = (load(folder / name) for name in ("base", "tuned0", "tuned1"))
    want = {n: v + numbers[0] * (one[n] - v) + numbers[-1] * (two[n] - v) for n, v in base.items()}
    assert close(load(folder / "out"), want)


def test_options_of_a_chain(folder: Path) -> None:
    words = [
        "-m",
        "lines+linear",
        "--beta",
        "0.1",
        "--published",
        "--tail",
        "depth",
        "--base",
        "base",
        "tuned0",
        "tuned1",
    ]
    ok(*words, "-o", "out")
    merging.merge(
        ["tuned0", "tuned1"], method="lines+linear", beta=0.1, published=True, tail="depth", base="base", output="other"
    )
    assert identical(load(folder / "out"), load(folder / "other"))


def test_overwrite_and_its_refusal(folder: Path) -> None:
    ok("-m", "linear", "tuned0", "tuned1")
    assert "merged: exists already: choose another -o, or use --overwrite" in refused(
        "-m", "linear", "tuned0", "tuned1"
    )
    ok("-m", "linear", "tuned0", "tuned1", "--overwrite")


def test_recipe_options_reach_the_output(folder: Path) -> None:
    words = [
        "--dtype",
        "bfloat16",
        "--shard-size",
        "500",
        "--as",
        "model",
        "--on-mismatch",
        "base",
        "--allow-nonfinite",
    ]
    ok("-m", "linear", *words, "tuned0", "tuned1")
    assert {value.dtype for value in load(folder / "merged").values()} == {torch.bfloat16}
    assert (folder / "merged" / "model.safetensors.index.json").is_file()


def test_notices_go_to_stderr(folder: Path) -> None:
    save(folder / "stranger", model(99))
    done = ok("-m", "task_arithmetic", "--base", "base", "stranger")
    assert "warning: stranger differs from the base by" in done.stderr
    assert "stranger: 9 of 9 tensors matched by the same names" in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_progress(folder: Path) -> None:
    """Silent where nobody looks, unless asked for."""
    words = ["-m", "linear", "tuned0", "tuned1", "--overwrite"]
    assert "merging" not in ok(*words).stderr
    ok(*words, "--progress")
    ok(*words, "--quiet")


# ---- refusals


def test_no_method_lists_them() -> None:
    said = refused("a/", "b/")
    assert "which method?" in said
    assert all(f"  {name} " in said and listed.summary in said for name, listed in METHODS.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-m linaer a b", "there is no method 'linaer' (did you mean 'linear'?)"),
        ("-m xyz a b", "there is no method 'xyz': the methods are linear, "),
        ("-m linear+lines a", "linear is not a wrapper, so it can only stand last in the chain 'linear+lines'"),
        ("-m lines+lines a", "lines stands twice"),
        ("-m linear", "there is nothing to merge"),
        ("-m linear a b --t 0.3", "'t' is a parameter of nearswap, slerp, which the chain 'linear' does not have"),
        ("-m linear a b --no-published", "'published' is a parameter of lines"),
        ("-m linear --weights 0.1,0.2,-0.3 tuned0 tuned1 tuned0", "the weights of linear sum to zero"),
        ("-m linear tuned0 tuned1 --rank 4", "--rank: only a merged adapter has ranks, and this merge makes a full"),
        ("-m linear tuned0 tuned1 --size 2KB", "--size: only a merged adapter has ranks, and this merge makes a full"),
        ("-m linear tuned0 tuned1 --energy 0.5", "out, or make an adapter with --as adapter and --base BASE"),
        ("-m linear tuned0 tuned1 --lora-alpha 4", "--lora-alpha is a setting of adapters"),
        ("-m linear --weights 1e30,1e30 --no-normalize tuned0 tuned1 --dtype float16", "beyond the range of F16"),
        ("-m slerp tuned0", "slerp merges 2 models, and 1 was given"),
        ("-m linear --weights 1,2,3 tuned0 tuned1", "weights has 3 values for 2 models: give one value for all, or 2"),
        ("-m linear --weights 1,-1 tuned0 tuned1", "the weights of linear sum to zero"),
        ("-m linear --weights nan tuned0 tuned1", "linear.weights = "),
        ("-m linear nowhere tuned1", "nowhere: there is no such file or folder"),
        ("-m linear org/name tuned1", "org/name: there is no such file or folder, and no such model in the Hub"),
        ("-m task_arithmetic tuned0 tuned1", "full checkpoints need this model as --base"),
        ("-m lines+linear tuned0 tuned1", "full checkpoints need this model as --base"),
        ("-m linear --as adapter tuned0 tuned1", "a merge of full checkpoints makes a model"),
        ("-m linear --rank 0 tuned0 tuned1", "--rank 0: should be at least 1"),
        ("-m linear --threads 0 tuned0 tuned1", "threads = 0: at least one is needed"),
        ("-m linear --max-memory 1KB tuned0 tuned1", "max_memory = 0 MB is too little: this merge needs"),
        ("-m linear --device tpu9 tuned0 tuned1", "device = 'tpu9': use cpu, cuda, cuda:N, cuda:N,M, mps, xpu or auto"),
        ("-m linear --device meta tuned0 tuned1", "device = 'meta': use cpu, cuda, cuda:N, cuda:N,M, mps, xpu or auto"),
        ("-m linear --device cuda:99 tuned0 tuned1", "device = 'cuda:99': this machine has"),
        ("-m linear tuned0 tuned1 -o tuned0/config.json/out", "config.json is not a folder"),
        ("-m linear tuned0 tuned1 -o tuned1 --overwrite", "tuned1: the output would replace the input tuned1"),
        (
            "-m linear tuned0 --base tuned0/config.json tuned1",
            "config.json: has no weight_map, so it is not an index of shards: to name a model, name the folder, tuned0",
        ),
        ("linear tuned0 tuned1 -o out", "linear is a method: write --method linear"),
        ("core tuned0 tuned1", "core is a method: write --method core"),
        ("lines+ties tuned0 tuned1", "lines+ties is a method: write --method lines+ties"),
        ("methods linaer", "there is no method 'linaer' (did you mean 'linear'?)"),
        ("inspect nowhere", "nowhere: there is no such file or folder"),
        ("inspect tuned0 base/config.json", "has no weight_map"),
    ],
)
def test_refusals_are_one_message(folder: Path, words: str, message: str) -> None:
    said = refused(*words.split())
    assert said.startswith("Error: ")
    assert message in said
    assert {path.name for path in folder.iterdir()} == {"base", "tuned0", "tuned1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tuned0 --nonsense", "No such option"),
        ("-m linear --dtype int8 tuned0", "'int8' is not one of"),
        ("-m linear --weights one tuned0", "'one' is no number: write 0.3, or 0.3,0.5 for a value each, or 0.2:0.8"),
        ("-m linear --weights 1,,2 tuned0", "'1,,2' is no number"),
        ("-m linear --shard-size 5parsec tuned0", "'5parsec' is no size: write 500MB, 2GB or 2GiB"),
        ("-m linear --threads many tuned0", "'many' is not a valid integer"),
        ("-m lines --tail nose tuned0", "'nose' is not one of"),
        ("-m", "requires an argument"),
        ("run", "Missing argument"),
        ("run nowhere.yaml", "does not exist"),
        ("run base", "is a directory"),
        ("inspect", "Missing argument"),
    ],
)
def test_wrong_usage_is_exit_code_two(folder: Path, words: str, message: str) -> None:
    assert message in refused(*words.split(), code=2)
    assert not (folder / "merged").exists()


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = os.strerror(errno.EIO)

    def iterdir(path: Path) -> Iterator[Path]:
        raise OSError(errno.EIO, reason, str(path))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    words = ("--method", "linear", folder / "tuned0", folder / "tuned1", "-o", folder / "out")
    assert refused(*words) == f"Error: {folder / 'tuned0'}: {reason}\n"
    assert isinstance(merge(*words, "--debug").exception, OSError)


def test_debug_shows_a_traceback(folder: Path) -> None:
    done = merge("-m", "linear", "nowhere", "--debug")
    assert isinstance(done.exception, merging.InputError)


# ---- plans and outcomes


def test_dry_run_writes_nothing(folder: Path) -> None:
    before = set(folder.iterdir())
    said = ok("-m", "linear", "tuned0", "tuned1", "--dry-run").stdout
    assert said.startswith("linear: 2 models into the model merged\n")
    assert "tuned1: 9 of 9 tensors matched by the same names" in said
    assert set(folder.iterdir()) == before


def test_plan_and_outcome_as_json(folder: Path) -> None:
    words = ["-m", "lines", "--base", "base", "tuned0", "tuned1", "-o", "out", "--json"]
    plan = json.loads(ok(*words, "--dry-run", "--threads", "1").stdout)
    size = sum(value.nbytes for value in load(folder / "base").values())
    stated = {"method": "lines+task_arithmetic", "models": ["tuned0", "tuned1"], "base": "base", "output": "out"}
    stated |= {"kind": "model", "tensors": 9, "write_bytes": size, "read_bytes": 3 * size, "workers": 1}
    assert stated.items() <= plan.items()
    assert plan["peak_memory_bytes"] > 0
    assert not (folder / "out").exists()
    done = json.loads(ok(*words).stdout)
    stated = {
        "path": "out",
        "kind": "model",
        "method": "lines+task_arithmetic",
        "tensors": 9,
        "bytes": size,
        "rank": None,
    }
    assert stated.items() <= done.items()
    assert done["notices"] == []


def test_recipe_round_trip(folder: Path) -> None:
    """--recipe-only prints what ``merge run`` carries out, to the same bytes."""
    words = ["-m", "lines+slerp", "--t", "0.3", "--beta", "0.25", "--published", "--base", "base", "--dtype", "float16"]
    words += ["--shard-size", "1KB", "--on-mismatch", "base", "--layers", "3", "tuned0", "tuned1"]
    text = ok(*words, "--recipe-only").stdout
    assert not (folder / "merged").exists()
    (folder / "recipe.yaml").write_text(text)
    ok(*words, "-o", "one")
    ok("run", "recipe.yaml", "-o", "two", "--threads", "1")
    for file in (folder / "one").iterdir():
        assert file.read_bytes() == (folder / "two" / file.name).read_bytes(), file.name
    assert json.loads(ok("run", "recipe.yaml", "--dry-run", "--json").stdout)["method"] == "lines+slerp"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [a", "recipe.yaml, line 2: is not valid YAML"),
        ("- a\n- b", "recipe.yaml, line 1: should be a YAML mapping"),
        ("models: [a]\nmethod: linear\nbsae: b", "recipe.yaml, line 3: there is no 'bsae' (did you mean 'base'?)"),
        ("models: [a]", "recipe.yaml: the recipe has no 'method'\n"),
        ("models: []\nmethod: linear", "recipe.yaml, line 1: models = []: should have at least 1 value\n"),
        ("models: [a]\nmethod: linear\nparameters: {desnity: 1}", "has a parameter 'desnity'"),
        ("models: [a]\nmethod: lnear", "did you mean 'linear'?"),
        ("models: [a]\nmethod: linear\nparameters: {1: 2}", "parameters should be a mapping of names to values"),
        ("models: [a]\nmethod: 3", "recipe.yaml, line 2: method"),
        ("models: [a]\nmethod: linear\nparameters: [1]", "parameters should be a mapping of names to values"),
        (b"\xff\xfe\x00", "recipe.yaml: is not text in UTF-8"),
    ],
)
def test_recipes_that_are_refused(folder: Path, text: str | bytes, message: str) -> None:
    (folder / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused("run", "recipe.yaml")


def test_recipes_that_cannot_run_are_not_printed(folder: Path) -> None:
    said = "weights has 3 values for 2 models: give one value for all"
    assert said in refused("-m", "linear", "--weights", "1,2,3", "tuned0", "tuned1", "--recipe-only")
    (folder / "recipe.yaml").write_text("models: [a, b]\nmethod: linear\nparameters: {weights: [1, 2, 3]}\n")
    assert said in refused("run", "recipe.yaml", "--recipe-only")


# ---- sub-commands


def test_help_me_choose() -> None:
    """It names a method for each situation, and says how far its figures go."""
    shown = ok("methods", "--help-me-choose").stdout
    assert all(f"You have {each.have}:\n" in shown for each in ADVICE)
    assert shown.count("\n  first  ") == shown.count("\n  cost  ") == len(ADVICE)
    assert "no evidence of how the methods compare on large models" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 120
    assert "takes no method" in refused("methods", "tsv", "--help-me-choose", code=2)


def test_methods() -> None:
    """On one screen, in a process without the methods that other tests declare."""

    def said(*words: str) -> str:
        command = [sys.executable, "-m", "merging", "methods", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    listed = said()
    assert all(f"  {name} " in listed and each.summary in listed for name, each in METHODS.items())
    assert all(group in listed for group in GROUPS)
    assert len(listed.splitlines()) <= 70
    assert max(map(len, listed.splitlines())) <= 120
    facts = json.loads(said("--json"))
    assert {name: each["summary"] for name, each in facts.items()} == {n: each.summary for n, each in METHODS.items()}
    assert {name: facts[name]["adapters"] for name in ("linear", "ties", "slerp", "decouple", "knots")} == {
        "linear": "exact", "ties": "cut", "slerp": "base", "decouple": "inner", "knots": "exact"
    }  # fmt: skip
    assert facts["ties"]["reads"] == "4"
    assert facts["tsv"]["reads"] == "1 + SVD"


def test_names_of_the_peer(tmp_path: Path) -> None:
    """They are chains, with what the peer fixes fixed."""
    said = ok("methods", "dare_ties").stdout
    assert "mergekit's name for dare+ties" in said
    assert "Fixed: ties.density = 1.\n" in said
    for option, default in {"drop": "0", "rescale": "l1", "normalize": "false", "vote": "weighted"}.items():
        assert re.search(rf"--{option} .*\[default: {default}\]", said), option
    assert "mergekit's ties has other defaults: it is ties here with density = 1, scope = tensor" in (
        ok("methods", "ties").stdout
    )
    shown = " ".join(ok("--method", "dare_ties", "--help").stdout.split())
    assert re.search(r"--drop NUMBERS [^-]*\[default: 0\.0\]", shown)
    said = ok("--method", "breadcrumbs_ties", "--help").stdout
    assert "--density" in said
    assert "ties.density" not in said
    recipe = yaml.safe_load(ok("-m", "breadcrumbs_ties", "--density", "0.6", "a", "b", "--recipe-only").stdout)
    assert recipe["method"] == "breadcrumbs+ties"
    summed = {"normalize": False, "vote": "weighted", "zero": "plus"}
    assert recipe["parameters"] == {"breadcrumbs.density": 0.6, "ties.density": 1.0, **summed}
    error = refused("-m", "dare_ties", "--density", "0.5", "a", "b")
    assert "ties.density is fixed at 1 in 'dare_ties': mergekit's density is 1 - drop: use drop instead" in error


@pytest.mark.parametrize("name", METHODS)
def test_methods_in_full(name: str) -> None:
    said = ok("methods", name).stdout
    assert said.startswith(f"{name}: {METHODS[name].summary}\n")
    facts = json.loads(ok("methods", name, "--json").stdout)
    assert facts["name"] == name
    for field, each in facts["parameters"].items():
        assert f"--{field.replace('_', '-')}" in said
        assert each["help"] in said


@pytest.mark.parametrize("name", [*METHODS, "lines+slerp"])
def test_help_of_a_chain_has_its_options(name: str) -> None:
    from merging.methods import links, parameters_of

    said = " ".join(ok("--method", name, "--help").stdout.partition("Options:")[2].split())
    for cls in links(name):
        for field in set(parameters_of(cls)) - {"blocks"}:  # an option of every merge
            assert f"--{field.replace('_', '-')}" in said
            assert f"[{cls.name}] {cls.model_fields[field].description}"[:30] in said
    others = {field for method in METHODS for field in parameters_of(links(method)[0])}
    shared = {"energy", "blocks"}  # options of ranks and of every merge
    own = {field for cls in links(name) for field in parameters_of(cls)} | shared
    for field in others - own:
        assert f"--{field} " not in said


def test_help_and_version() -> None:
    for words in (["--help"], ["-h"]):
        said = ok(*words).stdout
        assert said.startswith(
            "Usage: merge --method METHOD [OPTIONS] MODEL...\n       merge COMMAND [ARGUMENTS] | --version\n"
        )
        assert "merge merge -h" in said
    for words in ([], ["--help"], ["-h"]):
        done = merge(*words)
        assert (done.exit_code, done.stdout) == (0 if words else 1, said)
    said = ok("merge", "-h").stdout
    assert said.startswith("Usage: merge --method METHOD [OPTIONS] MODEL...")
    assert "--base" in said
    assert "--weights" not in said.partition("Options:")[2]
    assert ok("--version").stdout == f"merge, version {merging.__version__}\n"
    for command in cli.commands.keys() - {"merge"}:
        assert ok(command, "-h").stdout.startswith(f"Usage: merge {command}")


def test_inspect(folder: Path) -> None:
    (facts,) = json.loads(ok("inspect", "base", "--json", "--values").stdout)
    assert facts == {
        "path": "base", "kind": "checkpoint", "architecture": "LlamaForCausalLM", "files": 1, "parameters": 608,
        "tensors": 9, "dtypes": {"F32": 9}, "layers": {"model.layers": 3}, "bytes": 2432, "nonfinite": [],
        "components": [], "dequantised": 0, "quantised": {}, "type": "llama", "library": "transformers",
        "format": "safetensors", "vocabulary": 12, "head": "lm_head.weight", "experts": None, "merged_by": None,
        "merged_from": [], "recipe": None, "notices": [], "family": None, "family_evidence": None,
    }  # fmt: skip
    tensors = load(folder / "base")
    tensors["model.norm.weight"][0] = float("nan")
    save(folder / "bad", tensors)
    said = ok("inspect", "base", "bad", "--values").stdout
    assert said.splitlines()[0] == "base"
    assert [line for line in said.splitlines() if "nonfinite" in line] == [
        "  nonfinite     none", "  nonfinite     model.norm.weight",
    ]  # fmt: skip


def test_a_model_named_like_a_sub_command(folder: Path) -> None:
    (folder / "tuned0").rename(folder / "inspect")
    ok("./inspect", "tuned1", "-m", "linear")
    assert close(load(folder / "merged"), mean(folder / "inspect", folder / "tuned1"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5kb", 1500), (" 3 g ", 3_000_000_000), ("1TiB", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "-1", "0", "0GB", "1.2.3", "1PB", "MB", "1e9", "iB", "1IB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size"):
        Size().convert(text, None, None)


def test_sizes_as_text() -> None:
    assert [format_size(n) for n in (0, 999, 1000, 2_500_000, 7e10)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "2.5 MB",
        "70.0 GB",
    ]


# ---- in a process of its own


def test_sub_command_that_is_misspelt(tmp_path: Path) -> None:
    assert "did you mean 'inspect'?" in refused("inspct", tmp_path, code=2)


@pytest.mark.parametrize("words", ["--help", "", "merge -h", "pool build -h", "continual add -h", "completion zsh"])
def test_help_imports_nothing_heavy(words: str) -> None:
    script = (
        f"import sys\nsys.argv = {['merge', *words.split()]}\nfrom merging.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'rich', 'numpy', 'yaml', 'safetensors'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("#compdef" if "zsh" in words else "Usage: merge")
    assert done.stdout.splitlines()[-1] == "[]"


def test_as_a_module(folder: Path) -> None:
    command = [sys.executable, "-m", "merging"]
    ok("-m", "linear", "tuned0", "tuned1")
    done = subprocess.run([*command, "-m", "linear", "tuned0", "tuned1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: merged: exists already: choose another -o, or use --overwrite\n"
    done = subprocess.run([*command, "--bad"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
