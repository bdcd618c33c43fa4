"""Adapters of PEFT's types merged: into models, with each other, and into one LoRA that PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merging
from merging.api.inspect import inspect
from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from merging.sources import Adapter
from merging.sources.peft.adapter_types import PEFT_TYPES
from support.adapters import (
    LLAMA,
    State,
    assert_close,
    base_state,
    change_of,
    peft,
    quiet,
    reload,
    save_base,
    train,
)
from support.architectures import build
from support.peft_types import CASES, TYPES, changes_by_peft, changes_by_us, make, opened

pytestmark = TYPES


MERGED = ["LoHa", "IA3 biases", "OFT", "VeRA", "HRA", "FourierFT Conv1D", "LoHa conv2d", "HiRA embedding", "RoAD 4"]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("case", MERGED)
def test_baked_into_a_model_they_are_what_peft_bakes_in(tmp_path: Path, case: str, method: str) -> None:
    base, adapter = save_base(tmp_path / "base", CASES[case][0]), make(tmp_path / "a", case)
    merging.merge([adapter], method=method, base=base, kind="model", output=tmp_path / "out")
    wanted = peft.PeftModel.from_pretrained(reload(base), adapter).merge_and_unload().state_dict()
    got = base_state(tmp_path / "out")
    assert_close({name: got[name] for name in wanted}, wanted)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], State]:
    """A Llama, adapters of three types, and the sum of what they change."""
    root = tmp_path_factory.mktemp("mixed")
    with quiet():
        base = save_base(root / "base", "llama")
        adapters = [train(root / "lora", base, 5, LLAMA), make(root / "loha", "LoHa"), make(root / "hra", "HRA")]
        changes = [changes_by_peft(adapter, reload(base)) for adapter in adapters]
    return base, adapters, {name: sum(change[name] for change in changes) for name in changes[0]}


def test_adapters_of_different_types_make_one_model(mixed: tuple[Path, list[Path], State], tmp_path: Path) -> None:
    base, adapters, change = mixed
    merging.merge(adapters, method="task_arithmetic", base=base, kind="model", output=tmp_path / "out")
    before, after = base_state(base), base_state(tmp_path / "out")
    assert_close(after, {name: before[name] + change[name] for name in before})


def test_adapters_of_different_types_make_one_lora(mixed: tuple[Path, list[Path], State], tmp_path: Path) -> None:
    """Of the sum of their ranks it is exact, of a lower one the best that there is, as PEFT reads it."""
    base, adapters, change = mixed
    exact, low = tmp_path / "exact", tmp_path / "low"
    assert merging.merge(adapters, method="task_arithmetic", base=base, output=exact).rank == 16
    assert_close(change_of(base, exact), change)
    assert merging.merge(adapters, method="task_arithmetic", base=base, output=low, rank=6).rank == 6
    got = change_of(base, low)
    for name in (each for each in change if change[each].abs().max() > 0):
        best = torch.linalg.svdvals(change[name])[6:].square().sum().sqrt()
        assert float((got[name] - change[name]).norm()) <= 1.01 * float(best) + 1e-5


def test_rank_of_full_changes_is_asked_for(tmp_path: Path) -> None:
    """A LoRA holds what its rank allows, which is the user's choice; with it, PEFT reads the best of that rank."""
    base, adapter = save_base(tmp_path / "base", "llama"), make(tmp_path / "a", "OFT")
    with pytest.raises(InputError, match=r'a PEFT OFT adapter changes in .* has full rank.*rank=.*kind="model"'):
        merging.merge([adapter], method="task_arithmetic", base=base, output=tmp_path / "out")
    merging.merge([adapter], method="task_arithmetic", base=base, output=tmp_path / "out", rank=32)
    assert_close(change_of(base, tmp_path / "out"), changes_by_peft(adapter, reload(base)))


def test_norms_alone_are_no_lora(tmp_path: Path) -> None:
    base, adapter = save_base(tmp_path / "base", "llama"), make(tmp_path / "a", "LayerNorm")
    with pytest.raises(InputError, match=r'no factors.*kind="model"'):
        merging.merge([adapter], method="task_arithmetic", base=base, output=tmp_path / "out")


def test_without_a_base_convolutions_are_remarked_on(tmp_path: Path) -> None:
    """The same tensors mean a linear layer or a convolution; what needs the base says so."""
    adapter = make(tmp_path / "a", "LoHa")
    done = merging.merge([adapter], method="task_arithmetic", output=tmp_path / "out")
    assert [notice for notice in done.notices if "taken for linear layers" in notice]
    base = save_base(tmp_path / "base", "llama")
    assert_close(change_of(base, tmp_path / "out"), changes_by_peft(adapter, reload(base)))
    with pytest.raises(InputError, match="OFT turns the base's weight: give the base with base="):
        merging.merge([make(tmp_path / "b", "OFT")], method="linear", output=tmp_path / "none")


def test_alpha_is_what_each_type_calls_it(tmp_path: Path) -> None:
    loha, oft = make(tmp_path / "a", "LoHa"), make(tmp_path / "b", "OFT")
    six = changes_by_us(opened(loha), build("llama", 0))
    three = open_model(loha, alpha=3)
    assert isinstance(three, Adapter)
    assert_close(changes_by_us(three, build("llama", 0)), {name: value / 2 for name, value in six.items()}, 1e-7)
    with pytest.raises(FormatError, match="type OFT, which has no alpha"):
        open_model(oft, alpha=3)


@pytest.mark.parametrize("case", ["LoHa", "IA3 biases", "OFT", "VeRA", "KaSA", "LayerNorm", "trainable tokens"])
def test_inspect_tells_the_type(tmp_path: Path, case: str) -> None:
    adapter = make(tmp_path / "a", case)
    facts = inspect(adapter)
    kind = json.loads((adapter / "adapter_config.json").read_text())["peft_type"]
    assert facts["kind"] == f"adapter (PEFT {kind})"
    assert facts["about"] == (PEFT_TYPES[kind].summary if kind != "LORA" else "low-rank factors, KaSA")
    assert facts["needs_base"] == [] if PEFT_TYPES[kind].base == "no" else facts["needs_base"]
    assert sum(facts["read_as"].values()) == facts["targets"]
    assert facts["tensors"] == len(load_file(adapter / "adapter_model.safetensors"))
