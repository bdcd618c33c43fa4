"""LoRA of experts that lie side by side in one parameter, on bases with them together on the disk or one by one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging.errors import FormatError, InputError
from merging.maths.delta import LowRank
from merging.plan import make_plan
from merging.plan.recipe_values import make_recipe
from merging.sources.changes import Change
from support.adapters import (
    QUIRKS,
    State,
    assert_close,
    baked,
    base_state,
    change_of,
    edit_config,
    edit_tensors,
    quiet,
    reload,
    train,
)
from support.architectures import ARCHITECTURES, DECODER, HEAD, tiny

UNMATCHED = "The following (rank|alpha)_pattern keys did not match any targeted module"
"""PEFT 0.21 follows patterns for parameters, and says that it did not."""

pytestmark = [*QUIRKS, pytest.mark.filterwarnings(f"ignore:{UNMATCHED}:RuntimeWarning")]

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SQUARE = {**DECODER, "intermediate_size": 32}
GPT_OSS = {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "mixtral": (ARCHITECTURES["mixtral"], BOTH),
    "qwen3-moe": (ARCHITECTURES["qwen3-moe"], BOTH),
    "gpt-oss": (ARCHITECTURES["gpt-oss"], BOTH),
    "llama4": (
        tiny(
            "Llama4TextConfig",
            "Llama4ForCausalLM",
            DECODER,
            HEAD,
            intermediate_size_mlp=48,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=16,
        ),
        ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    ),
    "qwen3-vl-moe": (
        tiny(
            "Qwen3VLMoeConfig",
            "Qwen3VLMoeForConditionalGeneration",
            text_config={
                **DECODER,
                **HEAD,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        ),
        BOTH,
    ),
    "square mixtral": (tiny("MixtralConfig", "MixtralForCausalLM", SQUARE, num_local_experts=4), BOTH[1:]),
    "square gpt-oss": (tiny("GptOssConfig", "GptOssForCausalLM", SQUARE, GPT_OSS), BOTH[1:]),
}
"""A builder, and the parameters of its experts. Of the square ones inputs and outputs are told by no shape."""


def save(folder: Path, name: str) -> Path:
    torch.manual_seed(3)
    MODELS[name][0]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral, whose experts are one by one on the disk, and adapters of it. None is changed by a test."""
    root = tmp_path_factory.mktemp("mixtral")
    with quiet():
        warnings.filterwarnings("ignore", message=UNMATCHED)
        base = save(root / "base", "mixtral")
        train(root / "both", base, 1, ["q_proj"], target_parameters=BOTH, rank_pattern={"experts.down_proj": 3})
        train(root / "up", base, 2, ["v_proj"], target_parameters=BOTH[:1], use_rslora=True)
        train(
            root / "down", base, 3, [], target_parameters=BOTH[1:], alpha_pattern={"layers.1.mlp.experts.down_proj": 2}
        )
    return root


@pytest.mark.parametrize("name", MODELS)
def test_baked_experts_equal_peft(tmp_path: Path, name: str) -> None:
    """In memory, in the layouts ``[E, out, in]`` and ``[E, in, out]``; one by one or together on the disk."""
    base = save(tmp_path / "base", name)
    adapter = train(tmp_path / "a", base, 1, ["q_proj"], target_parameters=MODELS[name][1])
    out = tmp_path / "out"
    merging.merge([adapter], method="task_arithmetic", base=base, kind="model", output=out)
    assert_close(base_state(out), baked(base, adapter))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "square mixtral", "square gpt-oss"])
@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
def test_merged_experts_load_in_peft(tmp_path: Path, name: str, with_base: bool) -> None:
    """As parameters, by the names that the config of the inputs has; the rank is the sum of the ranks."""
    base, targets = save(tmp_path / "base", name), MODELS[name][1]
    one = train(tmp_path / "one", base, 1, ["q_proj"], target_parameters=targets)
    two = train(tmp_path / "two", base, 2, ["k_proj"], r=3, target_parameters=targets)
    out = tmp_path / "out"
    base_given = {"base": base} if with_base else {}
    done = merging.merge([one, two], method="task_arithmetic", weights=(2.0, -1.0), output=out, **base_given)
    assert done.rank == 8
    config = json.loads((out / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(targets)
    assert_close(change_of(base, out), added(base, {one: 2.0, two: -1.0}))


def added(base: Path, weights: dict[Path, float]) -> State:
    """The weighted sum of what PEFT makes of adapters."""
    changes = [(change_of(base, path), weight) for path, weight in weights.items()]
    return {name: sum(weight * change[name] for change, weight in changes) for name in changes[0][0]}  # type: ignore[misc]


def test_adapters_of_different_parameters_add_up(mixtral: Path, tmp_path: Path) -> None:
    """One has both parameters of a module, the others one each, and they wrap each other in other ways."""
    base, parts = mixtral / "base", [mixtral / "both", mixtral / "up", mixtral / "down"]
    merging.merge(parts, method="task_arithmetic", base=base, output=tmp_path / "out")
    merging.merge(parts, method="task_arithmetic", base=base, kind="model", output=tmp_path / "model")
    wanted = added(base, dict.fromkeys(parts, 1.0))
    assert_close(change_of(base, tmp_path / "out"), wanted)
    before = base_state(base)
    assert_close(base_state(tmp_path / "model"), {name: before[name].double() + wanted[name] for name in wanted})


def test_lower_rank_and_other_methods(mixtral: Path, tmp_path: Path) -> None:
    """Truncated expert by expert as an SVD in float64 would; what is not low rank is compressed expert by expert."""
    base, parts = mixtral / "base", [mixtral / "both", mixtral / "up"]
    merging.merge(parts, method="task_arithmetic", base=base, rank=2, output=tmp_path / "two")
    whole, cut = added(base, dict.fromkeys(parts, 1.0)), change_of(base, tmp_path / "two")
    merging.merge(parts, method="ties", density=1, base=base, rank=32, output=tmp_path / "ties")
    merging.merge(parts, method="ties", density=1, base=base, kind="model", output=tmp_path / "model")
    before, dense = base_state(base), base_state(tmp_path / "model")
    full = change_of(base, tmp_path / "ties")
    for name in [each for each in whole if "experts" in each]:
        u, s, vh = torch.linalg.svd(whole[name], full_matrices=False)
        best = u[..., :2] * s[..., None, :2] @ vh[..., :2, :]
        torch.testing.assert_close(cut[name], best, rtol=0, atol=1e-5)
        torch.testing.assert_close(full[name], dense[name].double() - before[name].double(), rtol=0, atol=1e-5)


METHODS: dict[str, dict[str, Any]] = {
    "ties": {"density": 1},
    "lines": {},
    "magmax": {},
    "tsv": {},
    "iso_c": {},
    "opcm": {},
    "dop": {},
    "svc+task_arithmetic": {},
    "pico+task_arithmetic": {},
    "ctm+ties": {"density": 1, "max_rank": 2},
    "model_stock": {},
    "knots+ties": {"density": 1},
    "core+task_arithmetic": {},
    "orthogonalize+task_arithmetic": {},
    "svd": {},
    "wudi": {},
    "actmat": {},
    "ace": {},
    "star": {},
    "dc_merge": {},
    "geometric_median": {},
    "slerp": {"t": 0.3},
    "varm": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_merge_experts_as_they_merge_checkpoints(twins: Path, tmp_path: Path, method: str) -> None:
    """What PEFT bakes of the same adapters, merged as checkpoints, is the same model: factors are only another form."""
    base, adapters = twins / "base", [twins / "a", twins / "b"]
    made = tmp_path / "of adapters", tmp_path / "of checkpoints"
    options = METHODS[method]
    merging.merge(adapters, method=method, base=base, kind="model", output=made[0], **options)
    if method.startswith("orthogonalize"):
        return  # it turns factors, which checkpoints do not have
    checkpoints = [folder.with_name(folder.name + "-baked") for folder in adapters]
    merging.merge(checkpoints, method=method, base=base, output=made[1], **options)
    assert_close(base_state(made[0]), base_state(made[1]), 5e-5)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of experts of a model, and what PEFT bakes of them."""
    root = tmp_path_factory.mktemp("twins")
    with quiet():
        base = save(root / "base", "gpt-oss")
        for seed, label in enumerate("ab"):
            folder = train(root / label, base, seed, ["q_proj"], target_parameters=BOTH)
            model = reload(base)
            model.load_state_dict(baked(base, folder))
            model.save_pretrained(folder.with_name(f"{label}-baked"))
    return root


def test_factors_stay_factors(mixtral: Path, tmp_path: Path) -> None:
    """On the disk's tensors one by one, and on the whole parameter: no matrix is written out to be read."""
    base = mixtral / "base"
    for kind in ("model", "adapter"):
        recipe = make_recipe(
            {"models": [mixtral / "both"], "method": "task_arithmetic", "base": base, "as": kind}, "test"
        )
        plan = make_plan(recipe)
        experts = [item for item in plan.items if "experts" in item.site.name and item.form != "copy"]
        assert len(experts) == (2 * 3 * 4 if kind == "model" else 2 * 2)
        for item in experts:
            (change,) = item.inputs
            assert isinstance(change, Change)
            assert item.cut.way == "factors"
            delta = change.read(item.site.shape, pytest.fail, torch.float32)
            assert isinstance(delta, LowRank)
            assert delta.rank == (3 if "w2" in item.site.name or "down" in item.site.name else 4)


def older(folder: Path, base: Path) -> Path:
    """The same adapter as PEFT before 0.19 wrote it: it took the first axis of a matrix for its inputs."""
    config = json.loads((folder / "adapter_config.json").read_text())

    def edit(tensors: State) -> State:
        edited = dict(tensors)
        for name in [each for each in tensors if "experts" in each and "lora_A" in each]:
            other = name.replace("lora_A", "lora_B")
            down = tensors[name].reshape(4, config["r"], -1)
            up = tensors[other].reshape(len(tensors[other]), config["r"], 4).permute(2, 0, 1)
            edited[name] = up.mT.reshape(4 * config["r"], -1)
            edited[other] = down.permute(2, 1, 0).reshape(down.shape[2], -1)
        return edited

    edit_tensors(folder, edit)
    return edit_config(folder, peft_version=None)


@pytest.mark.parametrize("name", ["mixtral", "square mixtral"])
def test_adapters_of_older_releases_of_peft(tmp_path: Path, name: str) -> None:
    """The base tells which way round they are, and the merge with one of today's has today's layout."""
    base, targets = save(tmp_path / "base", name), MODELS[name][1]
    new, other = (train(tmp_path / f"{seed}", base, seed, ["q_proj"], target_parameters=targets) for seed in (1, 2))
    wanted = added(base, {new: 1.0, other: 1.0})
    old = older(new, base)
    for order in ([old, other], [other, old]):
        out = tmp_path / order[0].name.replace("1", "old first").replace("2", "new first")
        merging.merge(order, method="task_arithmetic", base=base, output=out)
        assert_close(change_of(base, out), wanted)
    with pytest.raises(InputError, match=r"PEFT before 0\.19.*give the base with base="):
        merging.merge([old, other], method="task_arithmetic", output=tmp_path / "none")


def per_expert(folder: Path, seed: int, targets: tuple[str, ...] = ("w1", "w2", "w3"), **config: Any) -> Path:
    """An adapter of a Mixtral as transformers 4 had it: every expert is three linear layers."""
    sizes = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for leaf in targets:
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
                out, inputs = sizes[leaf]
                tensors[f"{path}.lora_A.weight"] = torch.randn(3, inputs, generator=generator) * 0.1
                tensors[f"{path}.lora_B.weight"] = torch.randn(out, 3, generator=generator) * 0.1
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(targets), **config}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def stacked(base: Path, folder: Path) -> Path:
    """The same model with its tensors on the disk as they are in memory, which transformers loads too."""
    model = reload(base)
    model.config.save_pretrained(folder)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


@pytest.mark.parametrize("on_disk", ["one by one", "stacked"])
def test_adapters_of_single_experts(mixtral: Path, tmp_path: Path, on_disk: str) -> None:
    """Those of transformers 4 land where PEFT puts them when it loads them today, whichever way the base lies."""
    base = mixtral / "base" if on_disk == "one by one" else stacked(mixtral / "base", tmp_path / "base")
    adapter = per_expert(tmp_path / "a", 5)
    options = {"method": "task_arithmetic", "base": base, "kind": "model"}
    (line,) = merging.preview([adapter], **options).matched
    assert "24 of 24 targets" in line
    merging.merge([adapter], output=tmp_path / "out", **options)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == load_file(base / "model.safetensors").keys()
    assert_close(base_state(tmp_path / "out"), converted_by_peft(base, adapter))


def converted_by_peft(base: Path, adapter: Path) -> State:
    """PEFT stacks such adapters while it loads them, so that other names come out."""
    from peft import PeftModel

    return {
        name: value.clone()
        for name, value in PeftModel.from_pretrained(reload(base), adapter).merge_and_unload().state_dict().items()
    }


@pytest.mark.parametrize("leaf", ["w1", "w2", "w3"])
def test_part_of_the_single_experts(mixtral: Path, tmp_path: Path, leaf: str) -> None:
    """An adapter of ``w1`` alone changes half of what w1 and w3 become; PEFT refuses it, so W + s B A tells."""
    base, adapter = stacked(mixtral / "base", tmp_path / "base"), per_expert(tmp_path / "a", 6, (leaf,))
    merging.merge([adapter], method="task_arithmetic", base=base, kind="model", output=tmp_path / "out")
    wanted, tensors = base_state(base), load_file(adapter / "adapter_model.safetensors")
    for name, down in tensors.items():
        if "lora_A" in name:
            _, layer, expert = name.partition("layers.")[0], name.split(".")[4], int(name.split(".")[7])
            parameter = "down_proj" if leaf == "w2" else "gate_up_proj"
            target = wanted[f"model.layers.{layer}.mlp.experts.{parameter}"][expert]
            rows = {"w1": slice(0, 48), "w3": slice(48, 96), "w2": slice(0, 32)}[leaf]
            target[rows] += 2 * tensors[name.replace("lora_A", "lora_B")] @ down
    assert_close(base_state(tmp_path / "out"), wanted)


def test_single_and_stacked_experts_merge(mixtral: Path, tmp_path: Path) -> None:
    """Adapters of both releases of transformers, into a model and into an adapter of today's."""
    base, one, two = mixtral / "base", mixtral / "both", per_expert(tmp_path / "a", 7)
    before = base_state(base)
    wanted = {
        name: before[name].double() + change + converted_by_peft(base, two)[name].double() - before[name].double()
        for name, change in change_of(base, one).items()
    }
    for order in ([one, two], [two, one]):
        out = tmp_path / f"{order[0].name} first"
        out.mkdir()
        merging.merge(order, method="task_arithmetic", base=base, kind="model", output=out / "model")
        assert_close(base_state(out / "model"), wanted)
        merging.merge(order, method="task_arithmetic", base=base, output=out / "adapter")
        assert_close(baked(base, out / "adapter"), wanted)
    with pytest.raises(InputError, match="is in several tensors"):
        merging.merge([one, two], method="slerp", base=base, output=tmp_path / "none")


def test_merged_single_experts_stay_single(mixtral: Path, tmp_path: Path) -> None:
    """Adapters of single experts make one of single experts, which is what vLLM reads, with a base and without."""
    parts = [per_expert(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    for name, base in (("base", {"base": mixtral / "base"}), ("none", {})):
        merging.merge(parts, method="linear", output=tmp_path / name, **base)
        assert all(
            ".experts.0" in each or ".experts." in each
            for each in load_file(tmp_path / name / "adapter_model.safetensors")
        )
        got = converted_by_peft(mixtral / "base", tmp_path / name)
        both = [converted_by_peft(mixtral / "base", part) for part in parts]
        assert_close(got, {key: (both[0][key] + both[1][key]) / 2 for key in got})


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "names": (lambda a: edit_config(a, target_parameters=["mlp.experts.gate_up_proj"]), "it is not clear for which"),
    "more names": (
        lambda a: edit_config(a, target_parameters=[*BOTH, "experts.bias"]),
        "factors for 2 parameters, and target_parameters .* name bias, down_proj, gate_up_proj",
    ),
    "no list": (lambda a: edit_config(a, target_parameters="experts.down_proj"), "should be a list of names"),
    "rank": (lambda a: edit_config(a, rank_pattern={"gate_up_proj": 5}), "not experts of the rank 5"),
    "wrong rank": (lambda a: edit_config(a, rank_pattern={"gate_up_proj": 2}), r"has the shape \(8, 96, 32\)"),
    "cut": (
        lambda a: edit_tensors(a, lambda t: {k: v[:, :-1] if "experts.lora_B" in k else v for k, v in t.items()}),
        "its parts do not belong together|do not multiply",
    ),
    "half": (
        lambda a: edit_tensors(a, lambda t: {k: v for k, v in t.items() if "base_layer" not in k}),
        "factors for 1 parameters",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_experts_that_cannot_be_told_are_refused(mixtral: Path, tmp_path: Path, case: str) -> None:
    adapter = train(tmp_path / "a", mixtral / "base", 1, ["q_proj"], target_parameters=BOTH)
    breaks, reason = BROKEN[case]
    breaks(adapter)
    with pytest.raises((FormatError, InputError), match=reason):
        merging.merge([adapter], method="linear", base=mixtral / "base", kind="model", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_of_gpt_oss_that_were_made_layers(tmp_path: Path) -> None:
    """Unsloth trains ``gate_up_projs.N``, linear layers that are the experts' matrices the other way round."""
    base, generator = save(tmp_path / "base", "gpt-oss"), torch.Generator().manual_seed(4)
    state, wanted, tensors = base_state(base), base_state(base), {}
    for name in state:
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        for expert, matrix in enumerate(state[name]):
            down = torch.randn(3, matrix.shape[0], generator=generator) * 0.1
            up = torch.randn(matrix.shape[1], 3, generator=generator) * 0.1
            path = f"base_model.model.{name}s.{expert}"
            tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
            wanted[name][expert] += 2 * (up @ down).T
    (tmp_path / "a").mkdir()
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["gate_up_projs", "down_projs"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    merging.merge([tmp_path / "a"], method="linear", base=base, kind="model", output=tmp_path / "out")
    assert_close(base_state(tmp_path / "out"), wanted)
    merging.merge([tmp_path / "a"], method="linear", base=base, output=tmp_path / "adapter")
    assert_close(change_of(base, tmp_path / "adapter"), {name: wanted[name] - state[name] for name in wanted})
