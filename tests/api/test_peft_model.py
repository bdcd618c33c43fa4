"""Adapters of a PEFT model merged in memory: as their files are merged, and as PEFT would where it is right."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merging
from merging.errors import InputError, MergingError, OptionError
from support.adapters import QUIRKS, State, assert_close, deep_base, peft, quiet, reload, save_base, train

pytestmark = [*QUIRKS, pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")]

NAMES = ("a", "b", "c")
SETTINGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "a": (["q_proj", "v_proj"], {"r": 4, "use_rslora": True}),
    "b": (["q_proj", "down_proj"], {"r": 3, "lora_alpha": 9, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}}),
    "c": (["k_proj", "q_proj"], {"r": 5, "rank_pattern": {"layers.0.self_attn.k_proj": 2}}),
    "dora": (["q_proj"], {"r": 2, "use_dora": True}),
    "pissa": (["q_proj"], {"r": 2, "init_lora_weights": "pissa"}),
    "head": (["q_proj"], {"r": 2, "modules_to_save": ["lm_head"]}),
    "one": (["q_proj", "v_proj"], {"r": 2, "lora_alpha": 3}),
    "two": (["q_proj", "v_proj"], {"r": 6, "lora_alpha": 1}),
    "rows": (["q_proj"], {"r": 2, "trainable_token_indices": [1, 3]}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters of it on disk, which no test changes."""
    root = tmp_path_factory.mktemp("peft")
    with quiet():
        base = deep_base(root / "base", 3)
        for seed, (name, (targets, settings)) in enumerate(SETTINGS.items()):
            train(root / name, base, seed, targets, **settings)
    return root


def load(folder: Path, *names: str) -> Any:
    """The base with adapters loaded, the first of them active."""
    model = peft.PeftModel.from_pretrained(reload(folder / "base"), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    return model


def baked(model: Any, name: str = "merged") -> State:
    """The weights of a model with an adapter merged into them."""
    model.set_adapter(name)
    return {key: value.clone() for key, value in model.merge_and_unload().state_dict().items()}


def everything(model: Any) -> dict[str, Any]:
    """All that a failure must leave as it was."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: value.requires_grad for name, value in model.named_parameters()}
    return {"values": values, "grads": grads, "configs": sorted(model.peft_config), "active": model.active_adapters}


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    assert all(before[key] == after[key] for key in before if key != "values")
    assert before["values"].keys() == after["values"].keys()
    assert all(torch.equal(value, after["values"][name]) for name, value in before["values"].items())


@pytest.mark.parametrize(
    ("names", "method", "options"),
    [
        (NAMES, "linear", {}),
        (NAMES, "task_arithmetic", {"weights": [1.0, 0.5, -1.0], "scale": 0.7}),
        (NAMES, "lines", {"beta": 0.4}),
        (NAMES, "knots+ties", {"density": 0.5}),
        (NAMES, "ties", {"density": 0.4, "rank": 12}),
        (NAMES, "tsv", {}),
        (NAMES, "task_arithmetic", {"rank": 4}),
        (NAMES, "task_arithmetic", {"exclude": "v_proj"}),
        (("a", "dora"), "task_arithmetic", {"rank": 6}),
        (("a", "head"), "linear", {"exclude": ["lm_head"]}),
        (("a", "a", "b"), "linear", {}),
        (("a", "rows"), "linear", {"exclude": ["embed_tokens"]}),
    ],
)
def test_memory_and_files_make_the_same_model(
    folder: Path, tmp_path: Path, names: tuple[str, ...], method: str, options: dict[str, Any]
) -> None:
    """With rsLoRA, unequal ranks, alphas and ranks of single modules, in every kind of method."""
    model = load(folder, *names)
    active, before = model.active_adapters, set(model.state_dict())
    merging.merge_peft(model, names, method=method, **options)
    assert model.active_adapters == active
    added = set(model.state_dict()) - before
    assert added and all(".merged." in name for name in added)
    merging.merge(
        [folder / name for name in names], method=method, base=folder / "base", output=tmp_path / "files", **options
    )
    of_files = peft.PeftModel.from_pretrained(reload(folder / "base"), tmp_path / "files", adapter_name="merged")
    assert_close(baked(model), baked(of_files), 1e-5)


def test_a_rank_that_discards_much_warns_as_files_do(folder: Path, tmp_path: Path) -> None:
    model, share = load(folder, "one", "two"), r"the rank discards [\d.]+% of the energy of the change on average, .*\)"
    said = []
    with pytest.warns(merging.MergingWarning, match=share) as issued:
        merging.merge_peft(model, ["one", "two"], method="ties", rank=1)
    said.append(str(issued[0].message))
    with pytest.warns(merging.MergingWarning, match=share) as issued:
        merging.merge([folder / "one", folder / "two"], method="ties", rank=1, output=tmp_path / "files")
    said.append(str(issued[0].message))
    assert said[0] == said[1].replace(', or use kind="model"', "")
    assert said[0].endswith(": raise rank=")
    with warnings.catch_warnings():
        warnings.simplefilter("error", merging.MergingWarning)
        merging.merge_peft(model, ["one", "two"], method="linear", adapter_name="exact")


def test_new_adapter_is_saved_and_loads_again(folder: Path, tmp_path: Path) -> None:
    model = load(folder, *NAMES)
    merging.merge_peft(model, list(NAMES), method="linear", adapter_name="mean")
    model.save_pretrained(tmp_path / "out", selected_adapters=["mean"])
    again = peft.PeftModel.from_pretrained(reload(folder / "base"), tmp_path / "out" / "mean", adapter_name="mean")
    tokens = torch.arange(8)[None]
    model.set_adapter("mean")
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert model.peft_config["mean"].base_model_name_or_path == str(folder / "base")
    merging.merge([tmp_path / "out" / "mean"], method="passthrough", output=tmp_path / "ours")


def test_equal_to_cat_where_that_is_right(folder: Path) -> None:
    """PEFT's ``cat`` puts the factors side by side, which is the exact sum for adapters of the same modules."""
    model = load(folder, "one", "two")
    model.add_weighted_adapter(["one", "two"], [0.7, -0.3], "cat", "cat")
    merging.merge_peft(model, ["one", "two"], method="task_arithmetic", weights=[0.7, -0.3])
    assert model.peft_config["merged"].r == model.peft_config["cat"].r == 8
    tokens = torch.arange(8)[None]
    logits = []
    for name in ("cat", "merged"):
        model.set_adapter(name)
        logits.append(model(tokens).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_layers_of_every_kind(architecture: str, method: str, tmp_path: Path) -> None:
    """Conv1D, whose weight is transposed, and embeddings."""
    targets = {"gpt2": ["c_attn", "wte"], "llama": ["embed_tokens", "q_proj"]}[architecture]
    base = save_base(tmp_path / "base", architecture)
    for seed, name in enumerate("ab"):
        train(tmp_path / name, base, seed, targets, fan_in_fan_out=architecture == "gpt2")
    model = load(tmp_path, "a", "b")
    merging.merge_peft(model, ["a", "b"], method=method, rank=8)
    merging.merge([tmp_path / "a", tmp_path / "b"], method=method, base=base, rank=8, output=tmp_path / "files")
    of_files = peft.PeftModel.from_pretrained(reload(base), tmp_path / "files", adapter_name="merged")
    assert_close(baked(model), baked(of_files), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_type_is_kept(folder: Path, dtype: torch.dtype) -> None:
    model = load(folder, "a", "b")
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = value.data.to(dtype)
    merging.merge_peft(model, ["a", "b"], method="linear")
    merged = [value for name, value in model.named_parameters() if ".merged." in name]
    assert merged and {value.dtype for value in merged} == {dtype}
    assert not any(value.is_meta for value in model.parameters())


def test_new_adapter_can_be_trained_further(folder: Path) -> None:
    model = load(folder, "a", "b")
    merging.merge_peft(model, ["a", "b"], method="linear")
    frozen = {name for name, value in model.named_parameters() if value.requires_grad}
    assert not any(".merged." in name for name in frozen)
    for each in model.peft_config.values():
        each.inference_mode = False
    model.set_adapter("merged")
    model(torch.arange(8)[None]).logits.sum().backward()
    grads: list[Tensor | None] = [value.grad for name, value in model.named_parameters() if ".merged." in name]
    assert grads and all(grad is not None for grad in grads)


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], type[MergingError], str]] = {
    "unknown": (("a", "z"), {}, OptionError, r"'z': the model has no such adapter.*it has a, b"),
    "one name": ("a", {}, OptionError, "adapters should be a list of names"),  # type: ignore[dict-item]
    "none": ((), {}, InputError, "nothing to merge"),
    "taken": (
        ("a", "b"),
        {"adapter_name": "b"},
        OptionError,
        "'b': the model has such an adapter already.*adapter_name=",
    ),
    "no name": (("a", "b"), {"adapter_name": ""}, OptionError, "'' cannot name an adapter"),
    "name of no text": (("a", "b"), {"adapter_name": 3}, OptionError, "3 cannot name an adapter"),
    "dotted": (("a", "b"), {"adapter_name": "a.b"}, OptionError, "'a.b' cannot name an adapter: use a word"),
    "torch's": (("a", "b"), {"adapter_name": "keys"}, OptionError, "'keys' cannot name an adapter, as torch"),
    "rank 0": (("a", "b"), {"rank": 0}, OptionError, "rank=0: a rank is a whole number above 0"),
    "rank below 0": (("a", "b"), {"rank": -1}, OptionError, "rank=-1: a rank is"),
    "rank of parts": (("a", "b"), {"rank": 2.5}, OptionError, "rank=2.5: a rank is"),
    "weights": (("a", "b"), {"method": "slerp"}, OptionError, "slerp merges weights"),
    "pattern": (("a", "b"), {"exclude": "nothing"}, OptionError, "'nothing' names no tensor"),
    "all excluded": (("a",), {"exclude": ["q_proj", "v_proj"]}, InputError, "nothing that is not excluded"),
    "parameter": (("a", "b"), {"density": 2}, OptionError, "density"),
    "module in full": (("a", "head"), {}, InputError, r"adapter 'head': lm_head\.weight: .*exclude=\"lm_head\""),
    "rows of tokens": (
        ("a", "rows"),
        {},
        InputError,
        r"adapter 'rows': .*embed_tokens.*exclude=\"model.embed_tokens\"",
    ),
    "exclude of no text": (("a", "b"), {"exclude": 3}, OptionError, "exclude should be text or a list, and is 3"),
    "exclude of numbers": (("a", "b"), {"exclude": [3]}, OptionError, r"exclude\[0\] should be text, and is 3"),
    "keys of numbers": (("a", "b"), {"keys": [1, 2]}, OptionError, "keys should be a list of texts, and is a list"),
    "too few keys": (("a", "b"), {"keys": ["a"]}, OptionError, "keys has 1 values for 2 models"),
    "adapters of no text": ((3,), {}, OptionError, "3: the model has no such adapter"),  # type: ignore[dict-item]
    "method": (("a", "b"), {"method": None}, OptionError, "method should be a name or a method, and is None"),
    "not finite": (("a", "b"), {}, InputError, "adapter 2: .* holds NaN"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_as_it_was(folder: Path, case: str) -> None:
    names, options, error, message = REFUSED[case]
    model = load(folder, "a", "b", *(name for name in names if name in ("head", "rows")))
    if case == "not finite":
        next(value for name, value in model.named_parameters() if ".b." in name).data.fill_(torch.nan)
    before = everything(model)
    with pytest.raises(error, match=message):
        merging.merge_peft(model, names, **{"method": "linear", **options})
    if case != "not finite":
        assert_unchanged(before, everything(model))
    assert "merged" not in model.peft_config


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_start_other_than_zero_is_refused(folder: Path) -> None:
    """What PiSSA took off the base is known on the disk alone."""
    model = load(folder, "a", "pissa")
    with pytest.raises(InputError, match=r"adapter 'pissa': .*pissa took a part.*from their files"):
        merging.merge_peft(model, ["a", "pissa"], method="linear")


def test_what_is_merged_into_the_weights_is_refused(folder: Path) -> None:
    model = load(folder, "a", "b")
    model.merge_adapter()
    with pytest.raises(InputError, match="call unmerge_adapter"):
        merging.merge_peft(model, ["a", "b"], method="linear")


def test_a_model_without_values_is_refused(folder: Path) -> None:
    """All of it is on the meta device, or the weights alone, which DoRA needs."""
    with pytest.raises(InputError, match="adapter 'a' is on the meta device, without values"):
        merging.merge_peft(load(folder, "a", "b").to("meta"), ["a", "b"], method="linear")
    model = load(folder, "dora")
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            layer.base_layer.to("meta")
    with pytest.raises(InputError, match=r"q_proj.*the model's weight is on the meta device"):
        merging.merge_peft(model, ["dora"], method="linear")


def test_other_models_are_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="model should be a PeftModel with its adapters loaded, and is a Llama"):
        merging.merge_peft(reload(folder / "base"), ["a"], method="linear")  # type: ignore[arg-type]


def test_failure_of_peft_leaves_the_model_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new adapter is taken out again when its factors cannot be put in place."""
    model = load(folder, "a", "b")
    before = everything(model)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("merging.api.peft_model._write_factors", fail)
    with pytest.raises(MemoryError):
        merging.merge_peft(model, ["a", "b"], method="linear")
    assert_unchanged(before, everything(model))
