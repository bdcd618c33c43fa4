"""Recipes of mergekit run by both programs: MERGEKIT_PYTHON names a Python that has mergekit (tests/peer)."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from pathlib import Path

import pytest

import merging
from support.mergekit_cases import DEEP, load, save
from support.paths import TESTS

PEER = os.environ.get("MERGEKIT_PYTHON")

pytestmark = pytest.mark.skipif(not PEER, reason="MERGEKIT_PYTHON does not name a Python that has mergekit")


def recipe(method: str, models: dict[str, str], base: str = "", parameters: str = "") -> str:
    """Write a recipe: models with their parameters, the base, and parameters of all."""
    lines = [f"merge_method: {method}", "dtype: float64", "models:"]
    lines += [f"- {{model: MODELS/{name}, parameters: {{{own}}}}}" for name, own in models.items()]
    lines += [f"base_model: MODELS/{base}"] if base else []
    return "\n".join([*lines, f"parameters: {{{parameters}}}"])


def summed(method: str, parameters: str = "", **own: str) -> str:
    """Write a recipe of three models on a base."""
    models = {"base": "", "a": "weight: 0.5", "b": "weight: 0.3", "c": "weight: 0.2"}
    return recipe(method, models | own, "base", parameters)


ATTENTION, MLP = "{filter: self_attn, value: [0,0.5,0.3,0.7,1]}", "{filter: mlp, value: [1,0.5,0.7,0.3,0]}"
FILTERS = {
    "a": "weight: [{filter: mlp, value: [1, 0.2]}, {value: 0.3}]",
    "b": "weight: [{filter: q_proj, value: 0.9}]",
}
OPEN = "weight: [{filter: up_proj, value: 3}, {value: [0.5, 0.7, 0.1]}], normalize: [true, false]"
FLAT = {
    "five points": recipe("linear", {"a": "weight: [0, 0.25, 0.7, 0.4, 1]", "b": "weight: [1, 0.75, 0.3, 0.6, 0]"}),
    "filters over two levels": recipe("linear", FILTERS, parameters=OPEN),
    "the base as a model": recipe("linear", {"base": "weight: 0.1", "a": "weight: 0.5"}, "base"),
    "normalized sum": summed("task_arithmetic", "normalize: true, lambda: [0.5, 1.5], int8_mask: true"),
    "normalized here and there": summed("task_arithmetic", "normalize: [{filter: mlp, value: true}, {value: false}]"),
    "weights of 0": summed("task_arithmetic", "normalize: true", a="weight: [0, 1]", b="weight: [0, 1]", c="weight: 0"),
    "ties": summed("ties", "normalize: true, density: [0, 0.5, 1]"),
    "ties by place": summed("ties", "normalize: [true, false], lambda: 0.5"),
    "ties that rescale": summed("ties", "density: 0.5, rescale: true"),
    "breadcrumbs": summed("breadcrumbs", "density: 0.7, gamma: 0.05, rescale: true"),
    "breadcrumbs_ties": summed("breadcrumbs_ties", "density: [0.7, 1, 0], gamma: 0.05, normalize: true"),
    "dare": summed("dare_linear", "density: 1.0, normalize: true"),
    "dare, all or nothing": summed("dare_ties", "density: [0, 0, 1, 1], rescale: false"),
    "della": summed("della", "density: 1"),
    "della_linear": summed("della_linear", "lambda: 0.3"),
    "slerp": recipe("slerp", {"other": "", "base": ""}, "base", f"t: [{ATTENTION}, {MLP}, {{value: 0.5}}]"),
    "slerp without its base": recipe("slerp", {"a": ""}, "base", "t: '3e-1'"),
    "nuslerp": recipe("nuslerp", {"a": "weight: 0.6", "other": "weight: 0.4"}, parameters="nuslerp_row_wise: true"),
    "nuslerp of rows": summed("nuslerp", "nuslerp_flatten: false").replace("- {model: MODELS/c, ", "# {"),
    "multislerp": recipe("multislerp", {"a": "weight: 1", "b": "weight: 2"}, parameters="normalize_weights: false"),
    "karcher": recipe("karcher", {"a": "", "other": "", "b": ""}, parameters="max_iter: 20, tol: 1e-7"),
    "model_stock": recipe("model_stock", {"a": "", "b": ""}, "base", "filter_wise: true"),
    "sce": recipe("sce", {"a": "", "b": "", "c": ""}, "base", "select_topk: 1.0, int8_mask: true"),
    "ramplus_tl": recipe("ramplus_tl", {"a": "", "b": ""}, "base", "epsilon: 0.0015, r: 0.5, alpha: 0.9"),
    "nearswap": recipe("nearswap", {"base": "", "a": ""}, "base", "t: [1e-3, 0.01]"),
    "arcee_fusion": recipe("arcee_fusion", {"base": "", "a": ""}, "base"),
    "passthrough": recipe("passthrough", {"a": "scale: [{filter: o_proj, value: 0}, {value: [0.5, 1]}]"}),
}


def sliced(method: str, *slices: str, base: str = "", parameters: str = "") -> str:
    """Write a recipe of slices, each its sources by model and range, and perhaps parameters."""
    lines = [f"merge_method: {method}", "dtype: float64", "slices:"]
    for each in slices:
        sources, _, own = each.partition(" | ")
        lines.append("- sources:")
        for source in sources.split("; "):
            model, layers, *given = source.split(" ", 2)
            first, last = layers.split(":")
            lines.append(
                f"  - {{model: MODELS/{model}, layer_range: [{first}, {last}], parameters: {{{''.join(given)}}}}}"
            )
        lines += [f"  {own}"] if own else []
    lines += [f"base_model: MODELS/{base}"] if base else []
    return "\n".join([*lines, f"parameters: {{{parameters}}}"])


SCALED = "scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: [0.5, 1, 2]}, {value: 1}]"
SLICED = {
    "one slice": sliced("slerp", "a 0:4; b 0:4", base="a", parameters=f"t: [{ATTENTION}, {MLP}, {{value: 0.5}}]"),
    "other layers": sliced("linear", "a 1:3 weight: [0.2, 0.7]; b 2:4 weight: [0.8, 0.3]"),
    "a slice of ties": sliced(
        "ties", "base 0:4; a 0:4; b 0:4 density: 0.5", base="base", parameters="weight: [0.2, 1]"
    ),
    "a stack": sliced("passthrough", "a 0:3", f"b 1:4 {SCALED}", "c 3:4"),
    "merges in a stack": sliced(
        "linear", "a 0:3; b 0:3 | parameters: {weight: [0.3, 1, 0.2]}", "a 2:4; b 2:4", parameters="weight: [0.4, 0.9]"
    ),
    "a merge of one layer": sliced(
        "linear", "a 0:3", "a 2:3 weight: [0.1, 0.9]; b 2:3", "b 3:4", parameters="weight: 1"
    ),
    "filters by layer": sliced(
        "linear",
        "a 0:2; b 0:2",
        "a 1:4 weight: [{filter: layers.2., value: 3}, {value: 1}]; b 1:4",
        parameters="weight: [{filter: layers.1, value: 0.25}, {value: 1}], "
        "normalize: [{filter: layers.3, value: false}, {value: true}]",
    ),
    "slices without layers": sliced("passthrough", "c 0:0", "a 0:3", "b 1:4", "base 0:0"),
}
RECIPES = FLAT | SLICED


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all recipes and of mergekit's merges, made in one process."""
    root = tmp_path_factory.mktemp("mergekit")
    save(DEEP, root / "models", ("base", "a", "b", "c", "other"))
    words = []
    for index, text in enumerate(RECIPES.values()):
        file = root / f"{index}.yml"
        file.write_text(text.replace("MODELS", str(root / "models" / "float32")))
        words += [str(file), str(root / f"peer-{index}")]
    environment = os.environ | {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    command = [str(PEER), str(TESTS / "peer" / "mergekit_runner.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert not [merge for merge in json.loads(done.stdout) if merge["error"]]
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_file(outputs: Path, name: str) -> None:
    """Both run the file as it is, and agree in float64 but for the order of sums and the peer's 1e-8 in divisions."""
    index = list(RECIPES).index(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merging.load_recipe(outputs / f"{index}.yml").run(output=outputs / f"ours-{index}")
    ours, theirs = load(outputs / f"ours-{index}"), load(outputs / f"peer-{index}")
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert ours[tensor].dtype == value.dtype
        assert (ours[tensor] - value).abs().max() <= 2e-9, tensor
