"""Adapters of MLX are read as mlx-lm fuses them: W + scale * (lora_a @ lora_b)^T, written out in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.errors import FormatError, command_line_words
from merging.hub.open_model import open_model
from merging.serving import verify
from merging.sources import Adapter
from support.adapters import State
from support.tiny import save

Q, EMBED = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
EXPERTS = "model.layers.0.mlp.switch_mlp.up_proj"
EXPERT = "model.layers.0.mlp.experts.{}.up_proj.weight"
SIZES = {f"{Q}.weight": (24, 16), f"{EMBED}.weight": (40, 16)} | {EXPERT.format(n): (12, 16) for n in range(3)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def write(folder: Path, tensors: State, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def baked(tmp_path: Path, adapter: Path) -> tuple[State, State]:
    """The base, and the adapter baked into it."""
    base = {name: random(*shape) + 0.3 for name, shape in SIZES.items()}
    save_file(base, tmp_path / "base.safetensors")
    merging.bake([adapter], base=tmp_path / "base.safetensors", output=tmp_path / "out.safetensors")
    return base, load_file(tmp_path / "out.safetensors")


LORA = {"rank": 4, "scale": 20.0, "dropout": 0.0}
FACTORS = {f"{Q}.lora_a": random(16, 4), f"{Q}.lora_b": random(4, 24)}
CHANGE = 20.0 * (FACTORS[f"{Q}.lora_a"].double() @ FACTORS[f"{Q}.lora_b"].double()).T


def check_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=0)


def test_linear_layers(tmp_path: Path) -> None:
    base, got = baked(tmp_path, write(tmp_path / "a", FACTORS, lora_parameters=LORA, fine_tune_type="lora"))
    check_close(got[f"{Q}.weight"], base[f"{Q}.weight"].double() + CHANGE)
    assert all(torch.equal(got[name], base[name]) for name in base if name != f"{Q}.weight")


@pytest.mark.parametrize("config", [{"fine_tune_type": "dora"}, {"use_dora": True}])
def test_dora(tmp_path: Path, config: dict[str, Any]) -> None:
    magnitude = random(24).abs() + 1
    base, got = baked(tmp_path, write(tmp_path / "a", {**FACTORS, f"{Q}.m": magnitude}, lora_parameters=LORA, **config))
    total = base[f"{Q}.weight"].double() + CHANGE
    check_close(got[f"{Q}.weight"], magnitude.double()[:, None] / total.norm(dim=1, keepdim=True) * total)


def test_embeddings(tmp_path: Path) -> None:
    a, b = random(40, 4), random(4, 16)
    base, got = baked(
        tmp_path, write(tmp_path / "a", {f"{EMBED}.lora_a": a, f"{EMBED}.lora_b": b}, lora_parameters=LORA)
    )
    check_close(got[f"{EMBED}.weight"], base[f"{EMBED}.weight"].double() + 20.0 * a.double() @ b.double())


@pytest.mark.parametrize("flat", [False, True])
def test_experts(tmp_path: Path, flat: bool) -> None:
    """Old versions keep the lower factors of all experts under one another."""
    a, b = random(3, 4, 16), random(3, 12, 4)
    tensors = {f"{EXPERTS}.lora_a": a.flatten(0, 1) if flat else a, f"{EXPERTS}.lora_b": b}
    base, got = baked(tmp_path, write(tmp_path / "a", tensors, lora_parameters=LORA))
    for number in range(3):
        name = EXPERT.format(number)
        check_close(got[name], base[name].double() + 20.0 * b[number].double() @ a[number].double())


def test_layers_trained_in_full(tmp_path: Path) -> None:
    _, got = baked(tmp_path, write(tmp_path / "a", {f"{Q}.weight": random(24, 16)}, fine_tune_type="full"))
    check_close(got[f"{Q}.weight"], random(24, 16).double())


def test_merged_they_are_a_lora_of_peft(tmp_path: Path) -> None:
    one = write(tmp_path / "a", FACTORS, lora_parameters=LORA, model="org/base")
    merging.merge([one, one], method="linear", output=tmp_path / "out")
    made = open_model(tmp_path / "out")
    assert isinstance(made, Adapter)
    assert made.dialect == "PEFT LORA"
    assert made.base == "org/base"
    (change,) = made.changes.values()
    check_close(change.read(change.shape, lambda: torch.zeros(()), torch.float64).dense(), CHANGE)


def test_alpha_replaces_the_scale(tmp_path: Path) -> None:
    save_file(FACTORS, tmp_path / "0000100_adapters.safetensors")
    with pytest.raises(FormatError, match=r"MLX without its adapter_config\.json, which states its scale"):
        open_model(tmp_path / "0000100_adapters.safetensors")
    opened = open_model(tmp_path / "0000100_adapters.safetensors", alpha=8)
    assert [change.scale for change in opened.changes.values()] == [2]  # type: ignore[union-attr,attr-defined]


BAD: dict[str, tuple[State, dict[str, Any], str]] = {
    "a scale that is no number": (FACTORS, {"lora_parameters": {"scale": "high"}}, "scale is 'high', and should be a"),
    "parameters that are no object": (FACTORS, {"lora_parameters": 3}, "without its adapter_config.json"),
    "a factor alone": ({**FACTORS, "x.lora_a": random(2, 2)}, {"lora_parameters": LORA}, "x has no lora_b"),
    "another tensor": ({**FACTORS, "x.weight": random(2, 2)}, {"lora_parameters": LORA}, "x.weight is not a tensor"),
    "shapes that do not fit": (
        {f"{Q}.lora_a": random(16, 4), f"{Q}.lora_b": random(5, 24)},
        {"lora_parameters": LORA},
        "do not belong together",
    ),
    "magnitudes of an embedding": (
        {f"{EMBED}.lora_a": random(40, 4), f"{EMBED}.lora_b": random(4, 16), f"{EMBED}.m": random(40)},
        {"lora_parameters": LORA, "fine_tune_type": "dora"},
        "its 40 magnitudes are not read",
    ),
    "magnitudes of experts": (
        {f"{EXPERTS}.lora_a": random(3, 4, 16), f"{EXPERTS}.lora_b": random(3, 12, 4), f"{EXPERTS}.m": random(3, 12)},
        {"lora_parameters": LORA, "fine_tune_type": "dora"},
        r"up_proj\.m has no place next to",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(tmp_path: Path, case: str) -> None:
    tensors, config, reason = BAD[case]
    with pytest.raises(FormatError, match=reason):
        open_model(write(tmp_path / "a", tensors, **config))


FOREIGN = {
    "torchtune": ("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"),
    "litgpt": ("transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B"),
    "NeMo": ("model.decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",),
    "mlx-vlm": ("language_model.model.layers.0.self_attn.q_proj.A", "language_model.model.layers.0.self_attn.q_proj.B"),
}


@pytest.mark.parametrize("program", FOREIGN)
def test_other_programs_are_refused_by_name(tmp_path: Path, program: str) -> None:
    save_file({name: random(4, 4) for name in FOREIGN[program]}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=rf"is an adapter of {program} \("):
        open_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("lora", "convert it with merge resize ADAPTER -o OUT"),
        ("dora", "convert it with merge resize ADAPTER --base BASE -o OUT"),
        ("full", "merge it into its base with --as model, and serve that"),
    ],
)
def test_other_programs_load_it_once_it_is_converted(tmp_path: Path, kind: str, way: str) -> None:
    base = save(tmp_path / "base", {f"{Q}.weight": random(24, 16)})
    tensors = {
        "lora": FACTORS,
        "dora": {**FACTORS, f"{Q}.m": random(24).abs()},
        "full": {f"{Q}.weight": random(24, 16)},
    }
    adapter = write(tmp_path / "a", tensors[kind], lora_parameters=LORA, fine_tune_type=kind)
    with command_line_words():
        (said,) = [each for each in verify(str(adapter), ["peft"]).findings if each.program == "peft"]
    assert (said.severity, said.what, said.todo) == ("refuses", "peft loads no adapters of MLX", way)
    if kind == "full":
        assert (
            merging.merge([adapter], method="linear", base=base, kind="model", output=tmp_path / "out").kind == "model"
        )
        return
    merging.resize(adapter, output=tmp_path / "out", **({"base": base} if kind == "dora" else {}))
    assert verify(str(tmp_path / "out"), ["peft", "vllm"]).served
