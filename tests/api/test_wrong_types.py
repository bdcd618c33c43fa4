"""A wrong type is one error of the package, whatever public function, class or method it is given to."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from merging.errors import InputError, MergingError, OptionError
from merging.pool import Pool
from merging.type_checks import check_types
from support.tiny import adapters, checkpoint

STATE = {"w": torch.ones(2, 2)}
EXAMPLES = [{"text": "a", "label": "b"}]
FACTORS = {"base_model.model.q.lora_A.weight": torch.ones(1, 2), "base_model.model.q.lora_B.weight": torch.ones(2, 1)}

RIGHT: dict[str, dict[str, Any]] = {
    "ContinualStore": {"path": "store"},
    "ContinualStore.add": {"model": "tuned0", "again": True, "threads": 1},
    "ContinualStore.create": {"path": "new", "base": "base"},
    "ContinualStore.export": {"output": "new"},
    "ContinualStore.fetch": {"model": "tuned0"},
    "ContinualStore.gc": {"keep": 1},
    "ContinualStore.plot": {"output": "new.png"},
    "ContinualStore.relocate": {"base": "base"},
    "ContinualStore.rollback": {"to": 0},
    "ContinualStore.watch": {"source": "."},
    "Dense": {"value": torch.ones(2)},
    "LayerPart": {"model": "a"},
    "LayerStack": {"stack": ({"model": "a"},)},
    "LowRank": {"up": torch.ones(2, 1), "down": torch.ones(1, 2), "shape": (2, 2)},
    "Pool": {"path": "pool"},
    "Pool.add_base_names": {"names": ["other"]},
    "Pool.build": {"candidates": []},
    "Pool.create": {"path": "new", "base": "base"},
    "Pool.dedupe": {},
    "Pool.overrule": {"names": [], "verdict": None},
    "Pool.remove": {"names": []},
    "Recipe": {"models": ("a",), "method": "linear"},
    "bake": {"adapters": ["adapter0"], "output": "new", "base": "loras/base"},
    "chain": {"text": "linear"},
    "collect_merged_statistics": {"models": ["tuned0", "tuned1"], "data": ["base", "base"], "output": "new"},
    "collect_statistics": {"model": "tuned0", "data": "base", "output": "new.safetensors"},
    "compare": {"models": ["adapter0", "adapter1"]},
    "suggest": {"models": ["adapter0", "adapter1"]},
    "compress": {"model": "adapter0", "output": "new.safetensors"},
    "decompress": {"pack": "pack.safetensors", "output": "new"},
    "extract": {"model": "tuned0", "base": "base"},
    "load_recipe": {"source": "models: [a]\nmethod: linear"},
    "make_moe": {"recipe": {"base_model": "base", "experts": []}, "output": "new"},
    "merge": {"models": ["adapter0", "adapter1"], "method": "linear"},
    "merge_deltas": {"adapters": [{"w": merging.Dense(STATE["w"])}], "method": "linear"},
    "merge_state_dicts": {"models": [STATE, STATE], "method": "linear"},
    "method": {"name": "a_method"},
    "peft_deltas": {"state_dict": FACTORS, "config": {"peft_type": "LORA", "r": 1}},
    "peft_state_dict": {"deltas": {"w": merging.Dense(STATE["w"])}, "rank": 1},
    "predict": {"plan": merging.Recipe(models=("adapter0", "adapter1"), method="linear")},
    "preview": {"models": ["adapter0", "adapter1"], "method": "linear"},
    "rerun": {"path": "made.safetensors", "output": "new.safetensors"},
    "soup": {"checkpoints": ["tuned0", "tuned1"], "output": "new"},
    "resize": {"lora": "adapter0"},
    "recycle": {"pool": ["adapter0"], "base": "base", "train": EXAMPLES},
    "search": {"models": ["adapter0"], "base": "base", "data": EXAMPLES},
    "verify_against_sources": {"path": "made.safetensors"},
}
"""Right arguments of every public function, class and method that takes some."""

NOT_CALLED = {
    "Found": "is a result",
    "CollectedStatistics": "is a result",
    "Merged": "is a result",
    "Recycled": "is a result",
    "merge_peft": "its model and adapters are in test_peft_model.py",
}
"""Public names without a case here, besides errors, warnings and values, each with the reason."""

WRONG = (None, 3, {}, object(), [1, 2])


def find(name: str, folder: Path) -> Callable[..., object]:
    """Return a function by its name; methods are bound to a store or a pool."""
    owner, _, method = name.partition(".")
    if owner == "Pool":
        found: Any = Pool if method in ("", "create") else Pool(folder / "pool")
    else:
        found = getattr(merging, owner)
        found = found(folder / "store") if method not in ("", "create") else found
    function = getattr(found, method) if method else found
    assert callable(function)
    return function  # type: ignore[no-any-return]


def parameters(function: Callable[..., object]) -> Iterator[inspect.Parameter]:
    yield from (each for each in inspect.signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, adapters, a store and a pool of one adapter."""
    folder = tmp_path_factory.mktemp("models")
    base, _ = checkpoint(folder)
    _, loras = adapters(folder / "loras", 2)
    for number, lora in enumerate(loras):
        lora.rename(folder / f"adapter{number}")
    merging.merge([folder / "adapter0"], method="passthrough", output=folder / "made.safetensors")
    merging.compress(folder / "adapter0", folder / "pack.safetensors")
    merging.ContinualStore.create(folder / "store", base=base).add(folder / "tuned0", threads=1)
    Pool.create(folder / "pool", base)
    return folder


@pytest.fixture(autouse=True)
def place(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models)
    return models


def test_every_public_function_is_here() -> None:
    values = {name for name in merging.__all__ if not callable(getattr(merging, name))}
    errors = {name for name in merging.__all__ if name.endswith(("Error", "Warning"))}
    assert values == {"Delta", "METHODS", "__version__"}
    assert set(merging.__all__) - values - errors == {name for name in RIGHT if "." not in name} - {"Pool"} | {
        *NOT_CALLED
    }


@pytest.mark.parametrize("name", RIGHT)
def test_required_parameters(name: str, place: Path) -> None:
    """Each required one in turn gets each wrong value, and all others are right."""
    function, right = find(name, place), RIGHT[name]
    required = [each.name for each in parameters(function) if each.default is each.empty]
    assert set(required) <= set(right)
    for parameter in required:
        for value in WRONG:
            if not is_right(name, parameter, value):
                with pytest.raises(MergingError) as caught:
                    function(**{**right, parameter: value})
                assert len(str(caught.value)) < 2000
    assert not (place / "new").exists()


def is_right(name: str, parameter: str, value: object) -> bool:
    """Return whether a value of the wrong ones is right for a parameter."""
    right = {
        ("ContinualStore.gc", "keep"): 3,
        ("Pool.overrule", "verdict"): None,
        ("peft_deltas", "config"): {},  # PEFT's defaults
    }
    return (name, parameter) in right and right[name, parameter] == value


@pytest.mark.parametrize("name", RIGHT)
def test_no_parameter_takes_any_object(name: str, place: Path) -> None:
    function, right = find(name, place), RIGHT[name]
    for parameter in parameters(function):
        with pytest.raises(MergingError, match=parameter.name.replace("dequantise", "dequantize")):
            function(**{**right, parameter.name: object()})


@pytest.mark.parametrize("name", [name for name in RIGHT if name not in ("Recipe", "LayerPart")])
def test_paths_that_no_file_can_have(name: str, place: Path) -> None:
    """A name with a NUL byte, or with five thousand characters; what opens no file takes any name."""
    function, right = find(name, place), RIGHT[name]
    for parameter in parameters(function):
        if parameter.name in (
            "path",
            "model",
            "base",
            "data",
            "output",
            "pack",
            "train",
            "valid",
            "test",
            "pool",
            "source",
        ):
            for path in (Path("a\0b"), Path("x" * 5000), *(("a\0b", "x" * 5000) if name != "load_recipe" else ())):
                with pytest.raises(MergingError) as caught:
                    function(**{**right, parameter.name: path})
                assert "\0" not in str(caught.value)
                assert len(str(caught.value)) < 7000


def test_right_arguments_are_taken(place: Path) -> None:
    """The tests above would pass if all were refused."""
    names = ("Dense", "LowRank", "Recipe", "chain", "compare", "load_recipe", "merge_deltas", "peft_deltas")
    assert all(find(name, place)(**RIGHT[name]) for name in names)


@pytest.mark.parametrize("name", [name for name in merging.__all__ if callable(getattr(merging, name))])
def test_types_are_known_at_run_time(name: str) -> None:
    public = getattr(merging, name)
    hints = typing.get_type_hints(public)
    if not inspect.isclass(public):
        assert hints.keys() == inspect.signature(public).parameters.keys() | {"return"}
    for _, method in inspect.getmembers(public, inspect.isfunction) if inspect.isclass(public) else ():
        if method.__module__.startswith("merging."):
            assert typing.get_type_hints(method) is not None


@check_types("unchecked")
def takes(
    path: str | Path = "",
    number: float = 0,
    names: typing.Sequence[str] = (),
    by_name: Mapping[str, int | None] | None = None,
    unchecked: int = 0,
    **options: int,
) -> None:
    """A function with parameters of some types."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": 3}, "path should be a path, and is 3"),
        ({"path": b"a"}, "path should be a path, and is b'a'"),
        ({"number": "3"}, "number should be a number, and is '3'"),
        ({"number": True}, "number should be a number, and is True"),
        ({"names": "abc"}, "names should be a list, and is 'abc'"),
        ({"names": ["a", 2]}, r"names\[1\] should be text, and is 2"),
        ({"by_name": {"a": 1.5}}, r"by_name\['a'\] should be a whole number, and is 1\.5"),
        ({"by_name": {1: 1}}, "a key of by_name should be text, and is 1"),
        ({"names": object()}, "names should be a list, and is an object"),
    ],
)
def test_words_of_wrong_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}$"):
        takes(**arguments)


def test_values_that_stand_for_others_are_taken() -> None:
    import numpy as np

    takes("", np.float32(1.5), ("a", "b"), {"a": None}, unchecked="x", of=1)  # type: ignore[arg-type]
    takes(number=np.int64(2))
    with pytest.raises(TypeError, match="positional arguments"):
        takes("", 1, (), None, 1, 2)  # type: ignore[call-arg]  # as Python says it
    with pytest.raises(InputError, match=r"^'a\\x00b': cannot be a path: .*embedded null "):
        takes("a\0b")
