"""A plain function as a method: its parameters, its declaration, its errors."""

from __future__ import annotations

import re
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor

import merging
from merging.cli.execution import Execution
from merging.cli.merge import merge_command
from merging.cli.run import run_command
from merging.errors import OptionError
from merging.maths.site import Site
from merging.methods import chain, parameters_of
from merging.methods.contract.function import OPTIONS
from merging.plan.recipe import Recipe
from merging.plan.recipe_files import load_recipe
from merging.testing import check_method
from support.commands import refused
from support.tiny import checkpoint


@merging.method("test-mean", needs="element", paper="Nobody 2026")
def mean(
    deltas: Tensor,
    *,
    scale: Annotated[float, "what the mean is multiplied by"] = 1.0,
    weights: list[float] = [1.0],  # noqa: B006
    share: Annotated[float, Field(gt=0, le=1, description="a share")] = 1.0,
    mode: Literal["plain", "negative"] = "plain",
    power: int = 1,
) -> Tensor:
    """Weighted mean of the changes.

    For tests.
    """
    total = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    assert isinstance(total, Tensor)
    return (-1 if mode == "negative" else 1) * scale**power * share * total / sum(weights)


@merging.method("test_doubled_norms", models=(1, 1))
def doubled_norms(deltas: Tensor, site: Site) -> Tensor:
    """Norms twice as large."""
    return deltas[0] * (2 if site.kind == "vector" else 1)


@merging.method("test_largest", space="weights", summary="the largest weight")
def largest(weights: Tensor) -> Tensor:
    return weights.amax(0)


NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]


def models(count: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    random = torch.Generator().manual_seed(0)
    made = [{name: torch.randn(6, 4, generator=random) for name in NAMES} for _ in range(count + 1)]
    return made[0], made[1:]


def merged(method: Any, count: int = 2, **options: Any) -> list[Tensor]:
    """The changes of two layers."""
    base, tuned = models(count)
    out = merging.merge_state_dicts(tuned, base=base, method=method, **options)
    return [out[name] - base[name] for name in base]


def changes(count: int = 2) -> list[list[Tensor]]:
    base, tuned = models(count)
    return [[each[name] - base[name] for name in base] for each in tuned]


def close(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.allclose(one, other, atol=1e-6) for one, other in zip(got, wanted, strict=True))


def test_parameters_are_fields() -> None:
    one, other = changes()
    assert parameters_of(type(mean)) == ["scale", "weights", "share", "mode", "power"]
    assert close(merged(mean), [(a + b) / 2 for a, b in zip(one, other, strict=True)])
    assert close(merged(mean(weights=(1, 3))), [(a + 3 * b) / 4 for a, b in zip(one, other, strict=True)])
    assert close(merged("test-mean", mode="negative", scale=3, power=2), [-9 * each for each in merged(mean)])
    assert mean(scale=2) == chain("test-mean", {"scale": 2})
    assert mean.function(torch.ones(2, 3), scale=5.0, weights=[1, 1]).tolist() == [5.0] * 3


def test_floats_differ_from_place_to_place() -> None:
    plain = merged(mean)
    assert close(merged(mean(scale="0:2")), [0 * plain[0], 2 * plain[1]])
    assert close(merged(mean(share={"layers.0": 0.5, "*": 1})), [plain[0] / 2, plain[1]])
    one, other = changes()
    wanted = [(one[0] + other[0]) / 2, (one[1] + 3 * other[1]) / 4]
    assert close(merged(mean(weights=(1, {"layers.0": 1, "*": 3}))), wanted)


def test_gradients_reach_the_parameters() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    torch.stack(merged(mean(scale=scale))).sum().backward()  # type: ignore[no-untyped-call]
    assert scale.grad is not None
    assert torch.allclose(scale.grad, torch.stack(merged(mean)).sum(), atol=1e-5)


def test_declaration() -> None:
    assert (mean.name, mean.summary, mean.paper) == ("test_mean", "Weighted mean of the changes", "Nobody 2026")
    assert "For tests." in (type(mean).__doc__ or "")
    assert type(mean).model_fields["scale"].description == "what the mean is multiplied by"
    assert type(mean).model_fields["share"].description == "a share"
    assert (mean.merge_space, largest.merge_space, largest.summary) == ("delta", "weights", "the largest weight")
    assert mean.grain_at(Site("", ())) == "element"
    assert largest.grain_at(Site("", ())) == "matrix"
    with pytest.raises(OptionError, match="test_doubled_norms merges 1 model, and 2 were given"):
        merged(doubled_norms)


def test_site() -> None:
    base = {"a.weight": torch.zeros(2, 2), "a.norm.weight": torch.zeros(2)}
    out = merging.merge_state_dicts([{n: v + 1 for n, v in base.items()}], base=base, method=doubled_norms)
    assert {name: float(value.max()) for name, value in out.items()} == {"a.weight": 1, "a.norm.weight": 2}


def test_weights_need_no_base() -> None:
    _, tuned = models(2)
    out = merging.merge_state_dicts(tuned, method=largest)
    assert torch.equal(out[NAMES[0]], torch.maximum(*(each[NAMES[0]] for each in tuned)))


def test_in_chains_and_recipes() -> None:
    recipe = Recipe(models=("a", "b"), method=chain("lines+test-mean", {"weights": (1, 2), "beta": 0.2}))
    assert recipe.method.chain == "lines+test_mean"
    assert load_recipe(recipe.to_yaml()) == recipe
    assert close(merged("dare+test_mean", drop=0.0), merged(mean))


@pytest.mark.parametrize("method", [mean(weights=(1, 2, 3)), mean(scale="0:1"), doubled_norms])
def test_laws(method: Any) -> None:
    check_method(method)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"share": 2}, r"test_mean\.share = 2: should be at most 1"),
        ({"share": float("nan")}, r"test_mean\.share"),
        ({"mode": "other"}, r"test_mean\.mode = 'other'"),
        ({"scael": 1}, "test_mean has no parameter 'scael'.*scale"),
    ],
)
def test_parameters_are_checked(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        mean(**parameters)


def no_tensor(*, scale: float = 1.0) -> Tensor:
    raise AssertionError


def three_tensors(a: Tensor, b: Site, c: Tensor) -> Tensor:
    raise AssertionError


def any_keywords(a: Tensor, **options: float) -> Tensor:
    raise AssertionError


def no_type(a: Tensor, *, scale=1.0) -> Tensor:  # type: ignore[no-untyped-def]
    raise AssertionError


def no_default(a: Tensor, *, scale: float) -> Tensor:
    raise AssertionError


def taken(a: Tensor, *, rank: int = 1) -> Tensor:
    raise AssertionError


def own(a: Tensor, *, merge: int = 1) -> Tensor:
    raise AssertionError


def letter(a: Tensor, *, m: int = 1) -> Tensor:
    raise AssertionError


def setting(a: Tensor, *, set: int = 1) -> Tensor:
    raise AssertionError


def helping(a: Tensor, *, help: int = 1) -> Tensor:
    raise AssertionError


def many(a: Tensor, *, weights: list[float] = [1.0, 2.0]) -> Tensor:  # noqa: B006
    raise AssertionError


def strange(a: Tensor, *, scale: Nowhere = 1.0) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
    raise AssertionError


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_tensor, "takes the models' tensors"),
        (three_tensors, "takes the models' tensors"),
        (any_keywords, r"\*options cannot be a parameter"),
        (no_type, "'scale' needs a type and a default"),
        (no_default, "'scale' needs a type and a default"),
        (taken, "'rank' cannot name a parameter"),
        (own, "'merge' cannot name a parameter"),
        (letter, "'m' cannot name a parameter"),
        (setting, "'set' cannot name a parameter"),
        (helping, "'help' cannot name a parameter, as all merges or methods have it"),
        (many, "'weights' is a list of one number"),
        (strange, "Nowhere"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_functions_that_cannot_be_methods(function: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merging.method("test_refused")(function)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ties", "there is a built-in method 'ties'"),
        ("dare-ties", "there is a built-in method 'dare_ties'"),
        ("test_mean", "there is a method 'test_mean' already"),
        ("Mean", "cannot name a method"),
        ("a+b", "cannot name a method"),
        ("", "cannot name a method"),
    ],
)
def test_names_that_are_taken(name: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merging.method(name)(largest.function)


def test_a_method_may_be_declared_again() -> None:
    """As a notebook does whose cell is run twice; the later one counts."""

    def declared(number: float) -> Any:
        def again(deltas: Tensor) -> Tensor:
            return deltas.mean(0) * number

        return merging.method("test_again")(again)

    declared(1.0)
    declared(2.0)
    assert close(merged("test_again"), [2 * each for each in merged(mean)])


def test_results_of_another_shape(tmp_path: Path) -> None:
    def summed(deltas: Tensor) -> Tensor:
        return deltas.sum()

    def nothing(deltas: Tensor) -> Tensor:
        return None  # type: ignore[return-value]

    with pytest.raises(
        OptionError, match=r"made a result of the shape \[\] of model\.layers\.0\.mlp\.up_proj\.weight.*\[6, 4\] here"
    ):
        merged(merging.method("test_summed")(summed))
    with pytest.raises(OptionError, match="made a result of the type NoneType"):
        merged(merging.method("test_nothing")(nothing))


def test_no_parameter_is_called_as_an_option() -> None:
    options = {*Recipe.model_fields, *(info.alias for info in Recipe.model_fields.values() if info.alias)}
    options |= {*signature(merging.merge).parameters, *(field.name for field in fields(Execution))} - {"options"}
    for command in (merge_command, run_command):
        with command.make_context("merge", [], resilient_parsing=True) as context:
            every = command.get_params(context)
        options |= {param.name for param in every if param.name} - {"as_"}
        options |= {flag.lstrip("-").replace("-", "_") for param in every for flag in param.opts}
    options -= {"_click_default_help"}
    assert "help" in options
    assert options | {"h"} <= OPTIONS


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ({"needs": "rows"}, "needs = 'rows': use one of"),
        ({"space": "deltas"}, "space = 'deltas': use one of delta, weights"),
        ({"models": 2}, "models = 2: write the fewest and the most"),
        ({"models": (3, 2)}, r"models = \(3, 2\)"),
        ({"models": (0, None)}, r"models = \(0, None\)"),
    ],
    ids=str,
)
def test_declarations_that_say_nothing(declaration: dict[str, Any], message: str) -> None:
    """A misspelled word would otherwise count as another one, and the bytes would be others."""
    with pytest.raises(OptionError, match=message):
        merging.method("test_declared", **declaration)
    with pytest.raises(OptionError, match="declared with its name"):
        merging.method(lambda deltas: deltas)  # type: ignore[arg-type, return-value]
    with pytest.raises(OptionError, match="made of a function"):
        merging.method("test_declared")(torch.sum)


def test_defaults_that_are_no_values() -> None:
    """They are refused where they are declared, and leave no method of the name behind."""

    def text(deltas: Tensor, *, scale: float = "a") -> Tensor:  # type: ignore[assignment]
        return deltas.mean(0)

    def beyond(deltas: Tensor, *, scale: Annotated[float, Field(gt=0)] = -1.0) -> Tensor:
        return deltas.mean(0)

    def infinite(deltas: Tensor, *, scale: float = float("nan")) -> Tensor:
        return deltas.mean(0)

    def bare(deltas: Tensor, *, scale: list[float] = 1.0) -> Tensor:  # type: ignore[assignment]
        return deltas.mean(0)

    def unreadable(deltas: Tensor, *, scale: Any = 1.0) -> Tensor:
        return deltas.mean(0)

    unreadable.__annotations__["scale"] = "1 +"
    for function in (text, beyond, infinite, bare, unreadable):
        with pytest.raises(OptionError, match=r"scale|type of its parameters"):
            merging.method("test_wrong_default")(function)
    with pytest.raises(OptionError, match="there is no method 'test_wrong_default'"):
        chain("test_wrong_default")


def test_results_of_another_form() -> None:
    def wave(deltas: Tensor) -> Tensor:
        return deltas.mean(0).to(torch.complex64)

    def nowhere(deltas: Tensor) -> Tensor:
        return deltas.mean(0).to("meta")

    def sparse(deltas: Tensor) -> Tensor:
        return deltas.mean(0).to_sparse()

    def signs(deltas: Tensor) -> Tensor:
        return deltas.sum(0).sign().to(torch.int8)

    def flags(deltas: Tensor) -> Tensor:
        return deltas.sum(0) > 0

    for function in (wave, nowhere, sparse, signs, flags):
        name = f"test_{function.__name__}"
        with pytest.raises(OptionError, match=rf"^{name} made {NAMES[0]} as torch.*a dense tensor of floating-point"):
            merged(merging.method(name)(function))


def fail(deltas: Tensor, *, cause: int = 0) -> Tensor:
    if cause == 0:
        return {}["no such key"]  # type: ignore[no-any-return]
    if cause == 1:
        raise ValueError("of the method")
    return deltas[:, :, :, 5]


@pytest.mark.parametrize(
    ("cause", "message"),
    [(0, "KeyError: 'no such key'"), (1, "ValueError: of the method"), (2, "IndexError: too many")],
)
def test_methods_that_fail(cause: int, message: str, tmp_path: Path) -> None:
    """The error names the method, the tensor and the cause, which is chained. On the command line it is one message."""
    method = merging.method("test_fail")(fail)
    with pytest.raises(OptionError, match=rf"^the method test_fail failed at {NAMES[0]}: {message}") as caught:
        merged(method(cause=cause))
    assert type(caught.value.__cause__).__name__ == message.partition(":")[0]
    base, tuned = checkpoint(tmp_path)
    words = ["-m", "test_fail", "--cause", cause, "--base", base, *tuned, "-o", tmp_path / "out"]
    text = refused(*words)
    assert re.match(rf"Error: the method test_fail failed at [\w.]+: {message}", text)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match=r"^the method test_fail failed at "):
        merged(chain("lines+test_fail", {"cause": cause}))
