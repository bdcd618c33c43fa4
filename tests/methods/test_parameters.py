"""Parameters that differ from place to place, and tensors that are left out."""

from __future__ import annotations

import re
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, equal

import merging
from merging.cli.execution import Execution
from merging.errors import InputError, OptionError
from merging.maths.parameters import plain
from merging.maths.patterns import matches
from merging.maths.randomness import draw_mask
from merging.methods import METHODS, chain, method_class, parameters_of
from merging.plan.recipe import Recipe
from merging.plan.recipe_files import load_recipe
from support import references
from support.changes import CPU, changes, dense
from support.commands import ok, refused
from support.paths import EXAMPLES
from support.references import flatten, unflatten
from support.tiny import checkpoint, fine_tune, identical, load, model, save

# ---- parameters that differ from place to place, and what is left out

NAMES = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)), "lm_head.weight"]


def weights_of(method: str, **options: Any) -> list[Tensor]:
    """What each model counts in the tensors before, in and behind three blocks."""
    models = [{name: torch.eye(2)[i] for name in NAMES} for i in range(2)]
    got = merging.merge_deltas(dense(models), method=method, **options)
    return torch.stack([got[name].dense() for name in NAMES])


@pytest.mark.parametrize(
    ("weights", "first", "second"),
    [
        ("0:1", [0, 0, 0.5, 1, 1], [0, 0, 0.5, 1, 1]),
        (("0:1:0", 0.25), [0, 0, 1, 0, 0], [0.25] * 5),
        (("1:3", "2:0"), [1, 1, 2, 3, 3], [2, 2, 1, 0, 0]),
        ({"mlp": 0.3, "*": "0:1"}, [0, 0.3, 0.3, 0.3, 1], [0, 0.3, 0.3, 0.3, 1]),
        (({"layers.1": 5, "*": "2:4"}, {"*head*": -1, "*": 1}), [2, 2, 5, 4, 4], [1, 1, 1, 1, -1]),
        ({"mlp": [0.3, "0:1:4"], "*": 2}, [2, 0.3, 0.3, 0.3, 2], [2, 0, 1, 4, 2]),
        ("0:1:0.5:0", [0, 0, 0.75, 0, 0], [0, 0, 0.75, 0, 0]),
        ("1:3 else 0.5", [0.5, 1, 2, 3, 0.5], [0.5, 1, 2, 3, 0.5]),
        (("1:3 else -1", {"*head*": 4, "*": "0:1 else 7"}), [-1, 1, 2, 3, -1], [7, 0, 0.5, 1, 4]),
    ],
)
def test_weights_by_depth_and_name(weights: Any, first: Any, second: Any) -> None:
    wanted = torch.tensor([first, second]).T.float()
    assert torch.allclose(weights_of("task_arithmetic", weights=weights), wanted)
    scaled = weights_of("task_arithmetic", weights=weights, scale="2:4")
    assert torch.allclose(scaled, wanted * torch.tensor([[2.0], [2], [3], [4], [4]]))
    if bool((wanted.sum(1) != 0).all()):
        mean = weights_of("linear", weights=weights)
        assert torch.allclose(mean, wanted / wanted.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("normalize", "divided"),
    [
        ("true:false", [True, True, True, False, False]),
        ("true:false:true else false", [False, True, False, True, False]),
        ({"mlp": "false:true", "*": True}, [True, False, False, True, True]),
    ],
)
def test_switches_by_depth_and_name(normalize: Any, divided: list[bool]) -> None:
    """Points of true and false are steps, as in mergekit."""
    wanted = torch.tensor([[1.0, 4.0]] * 5) / torch.tensor([5.0 if each else 1.0 for each in divided])[:, None]
    for method in ("linear", "task_arithmetic"):
        assert torch.allclose(weights_of(method, weights=(1.0, 4.0), normalize=normalize), wanted)
    assert chain("linear", {"normalize": normalize}) == chain(
        "linear", {"normalize": plain(chain("linear", {"normalize": normalize}).normalize)}
    )


def test_task_arithmetic_of_normalized_weights() -> None:
    assert torch.allclose(
        weights_of("task_arithmetic", weights=(1.0, 4.0), scale=0.5, normalize=True)[0], torch.tensor([0.1, 0.4])
    )
    assert not weights_of("task_arithmetic", weights=0.0, normalize=True).any()
    assert chain("task_arithmetic", {"weights": (1.0, 4.0), "normalize": True}).multiple(2) == 0.2
    with pytest.raises(OptionError, match="sum to zero"):
        weights_of("task_arithmetic", weights=(1.0, -1.0), normalize=True)


@pytest.mark.parametrize(
    ("density", "first", "second"),
    [
        ("0.21:0.83", [0.21, 0.21, 0.52, 0.83, 0.83], [0.21, 0.21, 0.52, 0.83, 0.83]),
        (("0.21:0.83", 0.4), [0.21, 0.21, 0.52, 0.83, 0.83], [0.4] * 5),
        ({"mlp": "0.3:0.9:0.5", "*": 1.0}, [1.0, 0.3, 0.9, 0.5, 1.0], [1.0, 0.3, 0.9, 0.5, 1.0]),
    ],
)
def test_density_by_depth_and_name(density: Any, first: Any, second: Any) -> None:
    models = changes(2, 3, shapes=dict.fromkeys(NAMES, (11, 17)))
    got = merging.merge_deltas(dense(models), method="ties", scope="tensor", density=density)
    for name, *shares in zip(NAMES, first, second, strict=True):
        tau = flatten([{name: each[name]} for each in models])
        assert equal(got[name].dense().flatten(), references.ties(tau, shares))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {"density": "0.2:0.8"}, "scope = tensor"),
        ("ties", {"density": ("0.2:0.8", 0.3)}, "scope = tensor"),
        ("ties", {"density": "0.2:1.4", "scope": "tensor"}, "density"),
        ("ties", {"density": (0.5, "0.2:-0.1"), "scope": "tensor"}, "density"),
        ("task_arithmetic", {"weights": {"mlp": 0.3, "embed": "0:1"}}, "no pattern matches lm_head.weight"),
        ("consensus", {"threshold": "0.2:-0.2"}, "threshold"),
        ("dare", {"drop": {"layers.2": 1.1, "*": 0.5}}, "drop"),
        ("linear", {"weights": (1, "1:-1")}, "sum to zero"),
        ("linear", {"weights": {"mlp": [1, 2, 3], "*": 1}}, "weights has 3 values for 2 models"),
        ("linear", {"weights": [{"mlp": [1, 2], "*": 1}, 1]}, "a list has a value for each model"),
        ("task_arithmetic", {"scale": [0, 0.5, 1]}, "from block to block it is written"),
        ("task_arithmetic", {"scale": {"mlp": [0, 1], "*": 1}}, "from block to block it is written"),
        ("linear", {"weights": ({"layers.1": -1, "*": 1}, 1)}, "sum to zero"),
    ],
)
def test_refused_somewhere(method: str, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        weights_of(method, **options)


@pytest.mark.parametrize("method", ["pcb", "ties", "opcm", "lines+ties", "linear"])
def test_exclude(method: str, tmp_path: Path) -> None:
    """What is left out stays the base's, and counts nowhere."""
    base = model(1)
    tuned = [{name: value * 1.5 for name, value in fine_tune(base, i).items()} for i in range(2)]
    out = {name for name in base if "embed" in name or name == "model.layers.1.input_layernorm.weight"}
    patterns = ("embed", "*.1.*norm*")
    got = merging.merge_state_dicts(tuned, method=method, base=base, exclude=patterns)
    rest = [{name: value for name, value in each.items() if name not in out} for each in (base, *tuned)]
    assert identical({name: got[name] for name in out}, {name: base[name] for name in out})
    wanted = merging.merge_state_dicts(rest[1:], method=method, base=rest[0])
    assert identical({name: got[name] for name in rest[0]}, wanted)
    if method in ("pcb", "ties"):
        tau = flatten([{name: each[name] - base[name] for name in rest[0]} for each in tuned])
        change = unflatten(getattr(references, method)(tau), rest[0])
        assert all(equal(got[name], base[name] + change[name]) for name in change)
    paths = [save(tmp_path / str(i), each) for i, each in enumerate((base, *tuned))]
    options: Any = {"method": method, "base": paths[0], "output": tmp_path / "out"}
    merging.merge(paths[1:], exclude=patterns, **options)
    found = load(tmp_path / "out")
    assert found.keys() == got.keys() and all(torch.allclose(found[name], got[name], atol=1e-6) for name in got)
    assert identical({name: found[name] for name in out}, {name: base[name] for name in out})
    for unnamed in (lambda: merging.merge_state_dicts(tuned, method=method, base=base, exclude=["embed", "nothing"]),
                    lambda: merging.merge(paths[1:], exclude=["nothing"], overwrite=True, **options)):  # fmt: skip
        with pytest.raises(OptionError, match="'nothing' names no tensor"):
            unnamed()


def test_patterns_that_name_nothing_are_refused() -> None:
    """A typo in a name would go unnoticed."""
    models = changes(2)
    for density in ({"nothere": 0.3, "*": 0.2}, ({"": 0.3, "*": 0.2}, 0.5)):
        with pytest.raises(OptionError, match="names no tensor"):
            merging.merge_deltas(dense(models), method="ties", scope="tensor", density=density)


def test_values_by_depth_in_recipes_are_no_numbers_of_base_60() -> None:
    recipe = load_recipe("{models: [a], method: linear, parameters: {weights: {mlp: [1, 0:1:0.5], '*': 1:2}}}")
    assert recipe.to_dict()["parameters"] == {"weights": {"mlp": [1, "0:1:0.5"], "*": "1:2"}}
    assert load_recipe(recipe.to_yaml()) == recipe
    recipe = load_recipe("{models: [a], method: task_arithmetic, parameters: {scale: 1:2, weights: [1:0.5]}}")
    assert recipe.to_dict()["parameters"] == {"scale": "1:2", "weights": ["1:0.5"]}
    assert load_recipe(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("task_arithmetic", {"scale": float("inf")}, "scale = inf: should be"),
        ("ties", {"density": float("nan")}, "density = nan: should be at most 1"),
        ("orthogonalize", {"gamma": float("inf")}, "gamma = inf: should be at most"),
        ("do", {"steps": 10**18}, "steps = 1000000000000000000: should be at most"),
        ("linear", {"weights": "0.5 0.5"}, "linear.weights = '0.5 0.5': should be a number$"),
        ("ties", {"density": -1}, "ties.density = -1: should be at least 0$"),
        ("ties", {"density": {}}, "should have at least 1 value$"),
        ("ties", {"scope": "all"}, "ties.scope = 'all': should be 'model' or 'tensor'$"),
        ("linear", {"normalize": "yes:no"}, "should be true or false$"),
        ("dare+ties", {"seed": 1.5}, "dare.seed = 1.5: should be a whole number$"),
    ],
)
def test_values_out_of_bounds(method: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        chain(method, value)


@pytest.mark.parametrize(
    ("word", "hint"), [("TIES", "'ties'"), ("lines_ties", "'lines+ties'"), ("dare-linear", "'dare+")]
)
def test_names_that_others_give_the_methods(word: str, hint: str) -> None:
    with pytest.raises(OptionError, match=rf"did you mean {re.escape(hint)}"):
        chain(word)


def test_wrappers_make_a_method_of_weights_one_of_changes(tmp_path: Path) -> None:
    base = model(0)
    tuned = [fine_tune(base, i) for i in (1, 2)]
    with pytest.raises(OptionError, match="give base="):
        merging.merge_state_dicts(tuned, method="dare+linear")
    got = merging.merge_state_dicts(tuned, method="dare+linear", base=base, drop=0.5)
    masks = [{n: draw_mask(0.5, 0, v.numel(), CPU, 0, i, n).view(v.shape) for n, v in base.items()} for i in "01"]
    thinned = [{n: (t[n] - base[n]) * m[n] * 2 for n in base} for t, m in zip(tuned, masks, strict=True)]
    for name, value in base.items():
        assert torch.allclose(got[name], value + (thinned[0][name] + thinned[1][name]) / 2, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "opcm", "do", "lines+ties", "orthogonalize"])
def test_values_that_a_method_cannot_merge_are_named(method: str, tmp_path: Path) -> None:
    """Whatever is allowed."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(EXAMPLES / "bbc", spoilt)
    state = load_file(spoilt / "adapter_model.safetensors")
    next(iter(state.values()))[0, 0] = torch.nan
    save_file(state, spoilt / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"holds NaN|infinities or NaN|cannot be decomposed"):
        merging.merge([EXAMPLES / "spam", spoilt], method=method, output=tmp_path / "out", allow_nonfinite=True)
    assert not (tmp_path / "out").exists()


def test_patterns_that_others_precede_are_refused() -> None:
    """The first that matches counts, so that one behind "*" would be ignored in silence. "*" itself is the rest."""
    models = [{"mlp.weight": torch.ones(2, 2), "q.weight": torch.ones(2, 2)}] * 2
    for scale in ({"*": 1.0, "mlp": 0.0}, {"mlp": 0.0, "weight": 1.0, "q": 0.5}):
        with pytest.raises(OptionError, match=r"takes effect nowhere, since .* comes before it"):
            merging.merge_state_dicts(models, method="task_arithmetic", base=models[0], scale=scale)
    merging.merge_state_dicts(models, method="task_arithmetic", base=models[0], scale={"mlp": 0.0, "*": 1.0})
    merging.merge_state_dicts(models, method="task_arithmetic", base=models[0], scale={"weight": 0.0, "*": 1.0})


@pytest.mark.parametrize("method", ["karcher", "varm", "ties", "arcee_fusion", "tsv", "wudi", "knots+ties"])
def test_tensors_that_cannot_be_merged_are_named(method: str) -> None:
    """In memory as well."""
    odd = torch.ones(8, 8).index_fill(0, torch.tensor([3]), torch.nan)
    models = [{"a.weight": torch.ones(8, 8), "q.weight": value} for value in (torch.rand(8, 8), odd)]
    base = {"a.weight": torch.zeros(8, 8), "q.weight": torch.zeros(8, 8)}
    with pytest.raises(InputError, match=r"q\.weight"):
        merging.merge_state_dicts(models, method=method, base=base, allow_nonfinite=True)


def test_wudi_by_steps_refuses_what_is_not_finite() -> None:
    models = [{"q.weight": torch.full((4, 4), torch.inf)}]
    base, options = {"q.weight": torch.zeros(4, 4)}, {"mode": "adam", "allow_nonfinite": True}
    with pytest.raises(InputError, match=r"q\.weight: cannot be decomposed"):
        merging.merge_state_dicts(models, method="wudi", base=base, **options)


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("breadcrumbs_ties", {"gamma": 0.05}, ["breadcrumbs.gamma has no effect: a density of 1 keeps everything"]),
        ("breadcrumbs_ties", {"gamma": 0.05, "breadcrumbs.density": 0.9}, []),
        ("breadcrumbs_ties", {"breadcrumbs.density": {"mlp": 1, "*": 0.9}, "gamma": 0.05}, []),
        (
            "breadcrumbs_ties",
            {"breadcrumbs.density": {"mlp": 1, "*": 0.9}, "gamma": {"mlp": 0.05, "*": 0.02}},
            ["breadcrumbs.gamma has no effect on 'mlp': a density of 1 keeps everything"],
        ),
        ("della_linear", {"epsilon": 0.1}, ["della.epsilon has no effect: a density of 1 keeps everything"]),
        ("dare_ties", {"seed": 3}, ["dare.seed has no effect: a drop of 0 keeps everything"]),
        ("dare_ties", {"seed": 3, "drop": 0.5}, []),
        ("wudi", {"steps": 30}, ["wudi.steps has no effect: mode = closed takes no steps"]),
        ("tsv", {"embeddings": True}, []),
        (
            "ties",
            {"density": 1, "scope": "tensor", "zero": "plus"},
            ["ties.scope has no effect: a density of 1 trims nothing"],
        ),
        ("ties", {"density": 1, "scope": "tensor"}, []),  # the majority is of the tensor then
        ("task_arithmetic", {"layers": 7}, ["layers= has no effect: task_arithmetic does not depend on depth"]),
        ("tsv", {"scale": {"norm": 0.5, "*": 1}}, []),
    ],
)
def test_parameters_without_effect_are_said(
    tmp_path: Path, method: str, parameters: dict[str, Any], said: list[str]
) -> None:
    """They were asked for, so silence would be taken for a merge that has them."""
    base, tuned = checkpoint(tmp_path)
    notices = merging.preview(tuned, method=method, base=base, **parameters).notices
    assert [notice for notice in notices if "has no effect" in notice] == said


def test_parameters_of_matrices_where_there_is_none(tmp_path: Path) -> None:
    vectors = [save(tmp_path / f"{i}", {"layers.0.norm.weight": torch.ones(4) * i}) for i in range(3)]
    notices = merging.preview(vectors[1:], method="svd", base=vectors[0], max_rank=2, embeddings=True).notices
    assert "svd.max_rank has no effect: svd decomposes only matrices" in notices
    assert "svd.embeddings has no effect: there is no embedding table" in notices


def test_no_parameter_is_called_as_an_option_of_merging() -> None:
    """From Python both are given by name, on the command line as well: one would hide the other."""
    options = {*Recipe.model_fields, *(info.alias for info in Recipe.model_fields.values())}
    options |= {*signature(merging.merge).parameters, *Execution.__annotations__}
    for name in METHODS:
        assert not options & set(parameters_of(method_class(name))), name


@pytest.mark.parametrize("pattern", ["*a" * 25 + "*[bc]", "[!b]*" * 50 + "b", "*?" * 60 + "b"])
def test_wildcards_of_a_recipe_end(pattern: str) -> None:
    """However many: each takes what it first can, and nothing is tried again."""
    assert not matches(pattern, "a" * 300)
    assert matches(pattern, "a" * 300 + "b")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_coefficients_in_tensors_are_finite(value: float) -> None:
    """The merged values would be blamed else."""
    models = [{"layers.0.w": torch.ones(2)}] * 2
    with pytest.raises(OptionError, match=r"linear\.weights holds NaN or infinities"):
        merging.merge_state_dicts(models, method="linear", weights=torch.tensor([value, 1.0]))
    with pytest.raises(OptionError, match=r"task_arithmetic\.scale holds NaN or infinities"):
        merging.merge_state_dicts(models, method="task_arithmetic", base=models[0], scale=torch.tensor(value))


def test_density_of_dare_is_pointed_to_drop() -> None:
    for name in ("dare_linear", "dare_ties"):
        with pytest.raises(OptionError, match="use drop instead"):
            chain(name, {"density": 0.5})


def test_values_by_name_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["-m", "ties", "--scope", "tensor", "--density", '{mlp: [0.3, 0.1:0.5], "*": 0.2}', "a", "b"]
    recipe = load_recipe(ok(*words, "--recipe-only").stdout)
    assert recipe.to_dict()["parameters"] == {"density": {"mlp": [0.3, "0.1:0.5"], "*": 0.2}, "scope": "tensor"}
    words = ["-m", "linear", "--weights", "0.1:0.3 else 0.2,1", "a", "b", "--recipe-only"]
    assert "- 0.1:0.3 else 0.2" in ok(*words).stdout
    assert "is no number" in refused("-m", "linear", "--weights", "0.1:0.3 else x", "a", code=2)
    assert "--density: is not valid YAML" in refused("-m", "ties", "--density", "{mlp: 0.3", "a")
