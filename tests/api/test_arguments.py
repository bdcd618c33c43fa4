"""Arguments of a wrong type are one clear error, and those that have several forms mean the same in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import merging
from merging.errors import MergingError, OptionError
from merging.maths.delta import Dense
from merging.methods.linear import Linear
from merging.plan.sizes import parse_size
from support.tiny import adapters, checkpoint, identical, load, model

STATE = {"w": torch.ones(2, 2)}
MODULE = torch.nn.Linear(2, 2)


def generator() -> Iterator[str]:
    yield "a"


FILES: dict[str, tuple[Any, str]] = {
    "a state dict": (
        STATE,
        r"models should be a list of paths, and is a state dict: merge_state_dicts\(\) merges tensors",
    ),
    "a module": (MODULE, r"is a Linear: save it first, or give its state_dict\(\) to merge_state_dicts\(\)"),
    "a string": ("a", r"models should be a list of paths, and is 'a': write \['a'\]"),
    "a path": (Path("a"), r"models should be a list of paths, and is 'a': write \['a'\]"),
    "a generator": (generator(), "is a generator: make a list of it, in the order of the weights"),
    "a set": ({"a", "b"}, "models should be a list of paths, and is a set"),
    "None": (None, "models should be a list of paths, and is None"),
    "a number": (3, "models should be a list of paths, and is 3"),
    "state dicts": (
        [STATE],
        r"models\[0\] should be a path or a name on the Hub, and is a state dict: merge_state_dicts",
    ),
    "modules": (["a", MODULE], r"models\[1\] should be a path .* is a Linear: save it first"),
    "None among them": (["a", None], r"models\[1\] should be a path .* is None"),
    "bytes": ([b"a"], r"models\[0\] should be a path .* is b'a'"),
}
STATES: dict[str, tuple[Any, str]] = {
    "one state dict": (STATE, r"is one state dict: write \[first, second\]"),
    "a module": (MODULE, r"should be a list of state dicts, and is a Linear: save it first, or give its state_dict"),
    "modules": ([MODULE], r"models\[0\] should be a state dict, and is a Linear: give its state_dict\(\)"),
    "paths": (["a"], r"models\[0\] should be a state dict, and is 'a': merge\(\) merges files"),
    "a string": ("a", "models should be a list of state dicts, and is 'a'"),
    "None": (None, "models should be a list of state dicts, and is None"),
    "a generator": (generator(), "is a generator: make a list of it"),
    "numbers": ([{"w": 1.0}], r"models\[0\] should hold tensors by name, and 'w' is 1\.0"),
    "changes": ([{"w": Dense(STATE["w"])}], r"'w' is a Dense: merge_deltas\(\) merges changes"),
}
DELTAS: dict[str, tuple[Any, str]] = {
    "one mapping": ({"w": Dense(STATE["w"])}, "adapters should be a list with one mapping an adapter"),
    "tensors": ([STATE], r"'w' is a Parameter|'w' is a Tensor: peft_deltas\(\) makes them of a PEFT state dict"),
    "paths": (["a"], r"adapters\[0\] should be a mapping .* is 'a': merge\(\) merges files"),
    "None": (None, "adapters should be a list of mappings from target to change, and is None"),
    "a generator": (generator(), "is a generator: make a list of it"),
}
ALL: list[tuple[Callable[..., object], Any, str]] = [
    *((merging.merge, *case) for case in FILES.values()),
    *((merging.preview, *case) for case in FILES.values()),
    *((merging.merge_state_dicts, *case) for case in STATES.values()),
    *((merging.merge_deltas, *case) for case in DELTAS.values()),
]


@pytest.mark.parametrize(
    ("function", "models", "message"),
    ALL,
    ids=[
        f"{name}-{case}"
        for name, cases in (("merge", FILES), ("preview", FILES), ("states", STATES), ("deltas", DELTAS))
        for case in cases
    ],
)
def test_models_of_a_wrong_type(function: Callable[..., object], models: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        function(models, method="linear")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights": [1, 2, 3]},
            "weights has 3 values for 2 models: give one value for all, or a list of 2, in the order",
        ),
        ({"outptu": "out"}, "'outptu' is no option, and no parameter of 'linear' .did you mean 'output'"),
        ({"base_model": "base"}, "'base_model' is no option, .* .did you mean 'base'"),
        ({"wieghts": [1, 2]}, "did you mean 'weights'"),
        ({"density": 0.5}, "'density' is a parameter of ties"),
        ({"method": None}, "method should be a name or a method, and is None"),
        ({"method": Linear}, "method should be a name or a method, and is the class Linear: call it"),
        ({"base": STATE}, "base should be a path or a name on the Hub, and is a state dict"),
        ({"base": ["a"]}, "base should be a path or a name on the Hub, and is a list"),
        ({"output": 3}, "output should be a path, and is 3"),
        ({"dtype": "int8"}, "merge: dtype = 'int8': should be 'float64', 'float32', 'bfloat16' or 'float16'"),
        ({"dtype": torch.int8}, "merge: dtype = 'int8': should be"),
        ({"max_memory": "5parsec"}, "max_memory = '5parsec' is no size: write 500MB, 2GB or 2GiB"),
        ({"max_memory": [1]}, r"max_memory = \[1\] is no size"),
        ({"shard_size": "-1"}, "shard_size = '-1' is no size"),
    ],
)
def test_options_of_a_wrong_type(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path)
    with pytest.raises(MergingError, match=message):
        merging.merge(["tuned0", "tuned1"], **{"method": "linear", "output": "out", **options})
    assert not (tmp_path / "out").exists()


def test_several_models_where_one_is_taken(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    store = merging.ContinualStore.create(tmp_path / "store", base=tmp_path / "base")
    pair: Any = [tmp_path / "tuned0", tmp_path / "tuned1"]
    calls: list[Callable[[], object]] = [
        lambda: store.add(pair),
        lambda: merging.ContinualStore.create(tmp_path / "other", base=pair),
        lambda: merging.compress(pair, tmp_path / "pack"),
        lambda: merging.decompress(pair, tmp_path / "model"),
    ]
    for call in calls:
        with pytest.raises(OptionError, match=r"^(model|base|pack) should be a path, and is a list$"):
            call()
    assert not store.log()


def test_tensors_of_a_wrong_base_or_method() -> None:
    with pytest.raises(OptionError, match="base should be a state dict, and is 'base': merge"):
        merging.merge_state_dicts([STATE], method="linear", base="base")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="method should be a name or a method, and is 3"):
        merging.merge_state_dicts([STATE], method=3)  # type: ignore[arg-type]


def test_a_tuple_and_anything_with_a_path_are_taken(tmp_path: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(tmp_path / "tuned0")

    checkpoint(tmp_path)
    plan = merging.preview((Place(), tmp_path / "tuned1"), method="linear")  # type: ignore[arg-type]
    assert plan.recipe.models == (str(tmp_path / "tuned0"), str(tmp_path / "tuned1"))
    merged = merging.merge_state_dicts((model(), model()), method="linear")
    assert identical(merged, model())


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5 k", 1500), ("1000000", 1_000_000), (7, 7)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "0", "-5", "5parsec", True, None, 1.5])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(OptionError, match="is no size"):
        parse_size(text)


def test_sizes_and_types_mean_the_same_in_every_form(tmp_path: Path) -> None:
    """As on the command line: ``"500MB"``; and torch's own types, their names, and the names without ``torch.``."""
    _, tuned = checkpoint(tmp_path)
    forms: list[dict[str, Any]] = [
        {"dtype": torch.bfloat16, "max_memory": "500MB", "shard_size": "1KB"},
        {"dtype": "bfloat16", "max_memory": 500_000_000, "shard_size": 1000},
        {"dtype": "torch.bfloat16", "shard_size": "1000"},
    ]
    outputs = []
    for number, form in enumerate(forms):
        outputs.append(tmp_path / f"out{number}")
        merging.merge(tuned, method="linear", output=outputs[-1], **form)
    names = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in outputs]
    assert names[0] == names[1] == names[2]
    assert {value.dtype for value in load(outputs[0]).values()} == {torch.bfloat16}
    assert len(names[0]) > 3
    with pytest.raises(OptionError, match=r"max_memory = 0 MB is too little"):
        merging.merge(tuned, method="linear", output=tmp_path / "no", max_memory="1KB")
    _, loras = adapters(tmp_path / "loras", 2)
    assert merging.compare(loras, max_memory="500MB").to_dict() == merging.compare(loras).to_dict()
