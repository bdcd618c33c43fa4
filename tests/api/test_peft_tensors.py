"""Adapters in memory: from PEFT's state dicts and back, the same numbers as from files, and gradients on the way."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merging
from merging.errors import FormatError, InputError, OptionError
from merging.maths.delta import Delta, Dense, LowRank
from support.adapters import QUIRKS, State, assert_close, base_state, deep_base, peft, quiet, reload, train

pytestmark = QUIRKS

LAYERS = 3
TARGETS = (["q_proj", "v_proj"], ["q_proj", "down_proj"], ["k_proj"])
SETTINGS: tuple[dict[str, Any], ...] = (
    {"r": 4, "use_rslora": True},
    {"r": 3, "lora_alpha": 9, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}},
    {"r": 5, "rank_pattern": {"layers.0.self_attn.k_proj": 2}},
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three adapters of it on disk, which no test changes."""
    root = tmp_path_factory.mktemp("tensors")
    with quiet():
        base = deep_base(root / "base", LAYERS)
        parts = zip(TARGETS, SETTINGS, strict=True)
        return [base, *(train(root / f"{i}", base, i, targets, **each) for i, (targets, each) in enumerate(parts))]


def state_of(base: Path, adapter: Path) -> tuple[State, dict[str, Any]]:
    """What is at hand after training: PEFT's state dict of the adapter, and its config."""
    model = peft.PeftModel.from_pretrained(reload(base), adapter)
    return peft.get_peft_model_state_dict(model), model.peft_config["default"].to_dict()


def deltas_of(folders: list[Path]) -> list[dict[str, Delta]]:
    base, *adapters = folders
    return [merging.peft_deltas(*state_of(base, adapter)) for adapter in adapters]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lines", {}),
        ("lines", {"weights": (1.0, 1.0, -1.0), "beta": 0.3}),
        ("linear", {"weights": (1.0, 2.0, 3.0)}),
        ("task_arithmetic", {"scale": 0.3}),
    ],
)
def test_tensors_and_files_make_the_same_model(
    folders: list[Path], tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    """Merged in memory, handed to PEFT with its config, baked in: what the file route writes as a model."""
    base, *adapters = folders
    merging.merge(adapters, method=method, base=base, kind="model", output=tmp_path / "out", **options)
    merged = merging.merge_deltas(deltas_of(folders), method=method, **options)
    assert all(isinstance(delta, LowRank) for delta in merged.values())
    state, config = merging.peft_state_dict(merged)
    model = peft.get_peft_model(reload(base), peft.LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"}))
    result = peft.set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    assert peft.get_peft_model_state_dict(model).keys() == state.keys()
    assert_close(model.merge_and_unload().state_dict(), base_state(tmp_path / "out"))


def test_state_dict_has_one_rank_and_reads_back(folders: list[Path]) -> None:
    """Padded with zeros to the largest rank, alpha equal to it; read again, each change is the same."""
    merged = merging.merge_deltas(deltas_of(folders), method="task_arithmetic")
    state, config = merging.peft_state_dict(merged)
    assert config["r"] == config["lora_alpha"] == 7
    assert {len(value) for name, value in state.items() if "lora_A" in name} == {7}
    again = merging.peft_deltas(state, config)
    assert_close({k: d.dense() for k, d in again.items()}, {k: d.dense() for k, d in merged.items()}, 1e-7)


def test_config_in_every_form(folders: list[Path]) -> None:
    """PEFT's object, its fields, its file and the adapter's folder mean the same."""
    base, adapter = folders[0], folders[2]
    model = peft.PeftModel.from_pretrained(reload(base), adapter)
    state = peft.get_peft_model_state_dict(model)
    config = model.peft_config["default"]
    forms = [config, config.to_dict(), adapter, str(adapter), adapter / "adapter_config.json"]
    wanted, *others = [merging.peft_deltas(state, form) for form in forms]
    assert wanted
    for other in others:
        assert_close({k: d.dense() for k, d in other.items()}, {k: d.dense() for k, d in wanted.items()}, 0.0)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_rank_makes_an_adapter_of_any_change(folders: list[Path], method: str) -> None:
    """Full changes and high ranks are cut as by files: the best approximation, and all of it at the full rank."""
    merged = merging.merge_deltas(deltas_of(folders), method=method)
    assert any(isinstance(delta, Dense) for delta in merged.values()) == (method == "ties")
    wanted = {name: delta.dense().double() for name, delta in merged.items()}
    for rank in (3, 32):
        cut = (
            pytest.warns(merging.MergingWarning, match="the rank discards .*: raise rank=")
            if rank == 3
            else nullcontext()
        )
        with cut:
            state, config = merging.peft_state_dict(merged, rank=rank)
        assert config["r"] == config["lora_alpha"] == (7 if (method, rank) == ("task_arithmetic", 32) else rank)
        for name, delta in merging.peft_deltas(state, config).items():
            error = (delta.dense().double() - wanted[name]).square().sum()
            least = torch.linalg.svdvals(wanted[name])[rank:].square().sum()
            torch.testing.assert_close(error, least, rtol=0.02, atol=1e-9)


def test_rank_keeps_the_side_of_the_inputs() -> None:
    """GPT-2's full changes are stored as inputs by outputs, and so is the config's word on them."""
    name = "transformer.h.0.attn.c_attn.weight"
    change = torch.randn(4, 2) @ torch.randn(2, 12)
    state, config = merging.peft_state_dict({name: Dense(change)}, rank=2)
    assert config["fan_in_fan_out"]
    assert state["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (2, 4)
    torch.testing.assert_close(merging.peft_deltas(state, config)[name].dense(), change)


def products(deltas: list[dict[str, Delta]], against: State) -> Tensor:
    """<G, delta_i> of each adapter, summed over the targets, in float64."""
    each = [sum((against[k] * delta.dense().double()).sum() for k, delta in one.items()) for one in deltas]
    return torch.stack([torch.as_tensor(value) for value in each])


def loss(merged: dict[str, Delta], against: State) -> Tensor:
    """A number that depends on every element of the merged changes."""
    return torch.stack([(against[name] * delta.dense().double()).sum() for name, delta in merged.items()]).sum()


@pytest.fixture
def against(folders: list[Path]) -> State:
    """Random directions, one a target."""
    random = torch.Generator().manual_seed(0)
    merged = merging.merge_deltas(deltas_of(folders), method="task_arithmetic")
    return {name: torch.randn(d.shape, generator=random, dtype=torch.float64) for name, d in merged.items()}


def test_gradient_reaches_weights_and_scale(folders: list[Path], against: State) -> None:
    """d/dw_i of scale * sum_i w_i <G, delta_i>, and d/dscale."""
    deltas = deltas_of(folders)
    weights = torch.tensor([1.0, 0.5, -1.0], requires_grad=True)
    scale = torch.tensor(0.7, requires_grad=True)
    merged = merging.merge_deltas(deltas, method="task_arithmetic", weights=weights, scale=scale)
    loss(merged, against).backward()
    wanted = products(deltas, against)
    assert weights.grad is not None and scale.grad is not None
    torch.testing.assert_close(weights.grad.double(), 0.7 * wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scale.grad.double(), (weights.detach().double() * wanted).sum(), rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_weights_of_a_mean(folders: list[Path], against: State) -> None:
    """Of a normalised mean: (<G, delta_i> - mean) / sum of weights."""
    deltas = deltas_of(folders)
    weights = torch.tensor([1.0, 2.0, 1.0], requires_grad=True)
    loss(merging.merge_deltas(deltas, method="linear", weights=weights), against).backward()
    each = products(deltas, against)
    mean = (each * weights.detach().double()).sum() / 4
    assert weights.grad is not None
    torch.testing.assert_close(weights.grad.double(), (each - mean) / 4, rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_depth_of_lines(folders: list[Path], against: State) -> None:
    """d/dbeta is the depth of each target's block times <G, sum of deltas>."""
    deltas = deltas_of(folders)
    beta = torch.tensor(0.5, requires_grad=True)
    loss(merging.merge_deltas(deltas, method="lines", beta=beta), against).backward()
    deep = {name: value * int(name.split(".")[2]) / (LAYERS - 1) for name, value in against.items()}
    assert beta.grad is not None
    torch.testing.assert_close(beta.grad.double(), products(deltas, deep).sum(), rtol=1e-4, atol=1e-4)


def test_gradient_reaches_the_factors(folders: list[Path]) -> None:
    """Through peft_deltas, merge and back: d/dA of <G, w s B A> is w s B^T G."""
    base, adapter = folders[0], folders[1]
    state, config = state_of(base, adapter)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    down = state[f"{name}.lora_A.weight"].detach().requires_grad_()
    up = state[f"{name}.lora_B.weight"].detach()
    deltas = merging.peft_deltas({**state, f"{name}.lora_A.weight": down}, config)
    merged = merging.merge_deltas([deltas, *deltas_of(folders)[1:]], method="task_arithmetic", weights=(0.5, 1.0, 1.0))
    direction = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    (merged["model.layers.0.self_attn.q_proj.weight"].dense() * direction).sum().backward()
    assert down.grad is not None
    torch.testing.assert_close(down.grad, 0.5 * (6 / 4**0.5) * up.T @ direction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, r"weight: DoRA gives every output.*with its base"),
        ({"init_lora_weights": "pissa"}, r"weight: pissa took a part.*with its base"),
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight: it is saved in full.*with its base"),
    ],
)
def test_variants_that_need_the_base_are_refused(
    folders: list[Path], tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    adapter = train(tmp_path / "a", folders[0], 1, ["q_proj"], **config)
    with pytest.raises(InputError, match=reason):
        merging.peft_deltas(*state_of(folders[0], adapter))


@pytest.mark.parametrize(
    ("kind", "reason"), [("IA3", "by its config, and holds nothing of one"), ("PROMPT_TUNING", "changes no weight")]
)
def test_config_without_a_change_is_refused(kind: str, reason: str) -> None:
    with pytest.raises(FormatError, match=f"the state dict: is a PEFT adapter of type {kind}.*{reason}"):
        merging.peft_deltas({}, {"peft_type": kind})


def test_methods_on_weights_are_refused(folders: list[Path]) -> None:
    with pytest.raises(OptionError, match="slerp merges weights, and these are changes"):
        merging.merge_deltas(deltas_of(folders)[:2], method="slerp")


@pytest.mark.parametrize(
    "delta",
    [Dense(torch.ones(4, 4)), LowRank(torch.ones(4, 2), torch.ones(2, 9), (4, 1, 3, 3))],
    ids=["dense", "convolution"],
)
def test_what_no_linear_lora_holds_is_refused(delta: Delta) -> None:
    good = LowRank(torch.ones(4, 2), torch.ones(2, 4), (4, 4))
    with pytest.raises(InputError, match=r"odd\.weight: PEFT's linear LoRA holds only (low-rank |)changes"):
        merging.peft_state_dict({"good.weight": good, "odd.weight": delta})
    if isinstance(delta, Dense):
        with pytest.raises(InputError, match="this one is full: choose a rank with rank="):
            merging.peft_state_dict({"odd.weight": delta})
    with pytest.raises(InputError, match="nothing"):
        merging.peft_state_dict({})
