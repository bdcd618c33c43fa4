"""Prototypes for routing: singular vectors of dense changes, PEFT's own, and a file that says what it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from merging.api.prototypes import export_prototypes, prototype
from merging.cli.main import cli
from merging.errors import InputError, OptionError, OutputError
from merging.maths.delta import LowRank
from support.adapters import QUIRKS, edit_tensors, peft, reload, save_base, train

pytestmark = QUIRKS

QV = ["q_proj", "v_proj"]


def golden(i: int) -> LowRank:
    """D_i of the specification's golden vectors: up [6, 2], down [2, 5]."""
    down = [[1 + 0.7 * i + 0.3 * a + 0.11 * b * (a + 1) for b in range(5)] for a in range(2)]
    up = [[0.5 + 0.4 * i + 0.23 * p * (q + 1) - 0.2 * q for q in range(2)] for p in range(6)]
    return LowRank(torch.tensor(up, dtype=torch.float64).cos(), torch.tensor(down, dtype=torch.float64).sin(), (6, 5))


def test_golden_vector() -> None:
    wanted = torch.tensor([[0.435122, 0.456039, 0.461906, 0.452777, 0.429340]])
    torch.testing.assert_close(prototype(golden(0), "arrow"), wanted, rtol=0, atol=1e-6)


def test_spectr_scores_what_the_change_does() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(3):
        delta = golden(i)
        wanted = (x @ delta.dense().mT).norm(dim=1)
        torch.testing.assert_close((x.float() @ prototype(delta, "spectr").mT).norm(dim=1), wanted.float())
        normed = prototype(delta, "spectr", normalize=True)
        torch.testing.assert_close(float(normed.norm()), 1.0)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("routed")
    base = save_base(folder / "base", "llama")
    return [
        train(folder / "wide", base, 1, QV, r=4),
        train(folder / "narrow", base, 2, ["q_proj"], r=2, use_rslora=True),
    ]


@pytest.mark.parametrize("kind", ["arrow", "spectr"])
def test_file_holds_the_singular_vectors_of_the_dense_changes(adapters: list[Path], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "p.safetensors"
    done = CliRunner().invoke(cli, ["route", *map(str, adapters), "-o", str(out), "--kind", kind])
    assert done.exit_code == 0, done.output
    with safe_open(out, "pt") as file:
        told = file.metadata()
    assert json.loads(told["adapters"]) == [str(path) for path in adapters]
    assert told["kind"] == kind and json.loads(told["ranks"]) == [4, 2]
    found = load_file(out)
    assert len(found) == 4
    for name, values in found.items():
        assert values.shape[:2] == (2, 1 if kind == "arrow" else 4)
        for row, path in enumerate(adapters):
            stored = load_file(path / "adapter_model.safetensors")
            key = f"base_model.model.{name.removesuffix('.prototypes')}"
            if f"{key}.lora_A.weight" not in stored:
                assert not values[row].any()
                continue
            config = json.loads((path / "adapter_config.json").read_text())
            scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
            dense = scale * stored[f"{key}.lora_B.weight"].double() @ stored[f"{key}.lora_A.weight"].double()
            _, singular, right = torch.linalg.svd(dense)
            mine = values[row].double()
            if kind == "arrow":
                torch.testing.assert_close(mine.mT @ mine, right[:1].mT @ right[:1], rtol=0, atol=1e-5)
            else:
                torch.testing.assert_close(
                    mine.mT @ mine, dense.mT @ dense, rtol=0, atol=1e-5 * float(singular[0]) ** 2
                )


def test_transposed_layers(tmp_path: Path) -> None:
    """GPT-2's Conv1D: the prototypes have the width of what goes in."""
    base = save_base(tmp_path / "base", "gpt2")
    made = [train(tmp_path / str(i), base, i, ["c_fc"], fan_in_fan_out=True) for i in range(2)]
    export_prototypes(made, tmp_path / "p.safetensors")
    width = reload(base).config.n_embd
    assert {tuple(value.shape) for value in load_file(tmp_path / "p.safetensors").values()} == {(2, 1, width)}


def test_what_cannot_be_routed(adapters: list[Path], tmp_path: Path) -> None:
    base, out = adapters[0].parent / "base", tmp_path / "p.safetensors"
    with pytest.raises(OptionError, match="nothing to choose among"):
        export_prototypes(adapters[:1], out)
    with pytest.raises(InputError, match="is a full model"):
        export_prototypes([adapters[0], base], out)
    with pytest.raises(OptionError, match=r"name it \.safetensors"):
        export_prototypes(adapters, tmp_path / "p")
    with pytest.raises(OptionError, match="leave normalize=True out"):
        export_prototypes(adapters, out, normalize=True)
    model = peft.get_peft_model(reload(base), peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(InputError, match=r'merge\(\[".*ia3"\], method="passthrough", base=BASE'):
        export_prototypes([tmp_path / "ia3", tmp_path / "ia3"], out)
    other = train(tmp_path / "other", base, 4, QV)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "another/model"}))
    with pytest.raises(InputError, match="different bases"):
        export_prototypes([adapters[0], other], out)
    assert export_prototypes([adapters[0], other], tmp_path / "q.safetensors", allow_different_bases=True).modules == 4
    broken = train(tmp_path / "nan", base, 3, QV)
    edit_tensors(broken, lambda t: {name: value * float("nan") for name, value in t.items()})
    with pytest.raises(InputError, match="NaN"):
        export_prototypes([adapters[0], broken], out)
    assert not out.exists()
    out.write_bytes(b"kept")
    with pytest.raises(OutputError, match="exists"):
        export_prototypes(adapters, out)
    assert out.read_bytes() == b"kept"
