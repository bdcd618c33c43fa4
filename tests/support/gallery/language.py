"""Layouts of adapters of language models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from support.gallery.kinds import adalora, dora, experts, ia3, loha, lokr, lora, lora_b, replaced, vera
from support.gallery.layout import Draw, Formula, Kind, Layout, Part, State

__all__ = ["LANGUAGE"]

P = "base_model.model."
Q, UP, HEAD, EMBED = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
    "model.embed_tokens",
)
SHAPES = {Q: (8, 6), UP: (12, 6), HEAD: (20, 6), EMBED: (20, 6)}
LLAMA = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
VERSIONS = "0.18.0"


def parts(*modules: str, prefix: str = P, **kinds: Kind) -> dict[str, Part]:
    return {f"{prefix}{module}": Part(f"{module}.weight", SHAPES[module], kind=kinds.get(module)) for module in modules}


def peft(version: str, model: str = "Llama", trainer: str = "PEFT", **facts: Any) -> Layout:
    """An adapter of PEFT with a config; ``stated`` are more fields of it."""
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": "org/Llama-3-8B"}
    config = {**stated, **facts.pop("stated", {})}
    shown = f"PEFT {config['peft_version']}" if "peft_version" in config else "PEFT"
    defaults: dict[str, Any] = {
        "family": "Llama 3",
        "shown": shown,
        "modules": parts(Q, UP),
        "kind": lora(scale=1.5),
        "weights": "adapter_model.safetensors",
        "dialect": f"PEFT {config['peft_type']}",
    }
    return Layout(trainer=trainer, model=model, version=version, config=config, **{**defaults, **facts})


NEW = {"peft_version": "0.21.2", "auto_mapping": LLAMA}
OLD = {"bias": "none", "fan_in_fan_out": False, "enable_lora": None, "merge_weights": False, "inference_mode": True}


def _rows(leaf: str, indices: list[int]) -> Kind:
    """Rows of a table, trained by themselves."""

    def kind(draw: Draw, shape: tuple[int, ...]) -> tuple[State, Formula]:
        rows = draw(len(indices), shape[1])

        def formula(table: Tensor) -> Tensor:
            table[indices] = rows.double()
            return table

        return {leaf: rows}, formula

    return kind


SHARED = {"vera_A": torch.linspace(-1, 1, 12).reshape(2, 6), "vera_B": torch.linspace(-1, 2, 24).reshape(12, 2)}


def _variants() -> Iterator[Layout]:
    """Yield the types and variants of PEFT, as its versions wrote them."""
    yield peft("0.3", stated=OLD, weights="adapter_model.bin")
    yield peft(
        "0.6, patterns",
        stated={"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"layers.1.mlp.up_proj": 8}},
        modules=parts(Q, UP, **{UP: lora(scale=2, rank=4)}),
    )
    yield peft("0.7, rsLoRA", stated={"use_rslora": True}, kind=lora(scale=3 / 2**0.5))
    magnitude = "lora_magnitude_vector"
    for version, leaf in (("0.9, DoRA", magnitude), ("0.12, DoRA", f"{magnitude}.weight")):
        kind = dora(("lora_A.weight", "lora_B.weight"), leaf, scale=1.5)
        yield peft(version, stated={"use_dora": True}, kind=kind, needs_base=True)
    yield peft("0.10, PiSSA made a LoRA", stated={"r": 4, "lora_alpha": 6, "init_lora_weights": True},
               kind=lora(scale=1.5, rank=4))  # fmt: skip
    yield peft(
        "0.14, lora_bias",
        stated={"lora_bias": True},
        modules={**parts(Q), f"{P}{Q}.lora_B": Part(f"{Q}.bias", (8,), kind=lora_b("bias", 1.5))},
    )
    yield peft(
        "0.14, all biases",
        stated={"bias": "all"},
        modules={**parts(Q), f"{P}{UP}": Part(f"{UP}.bias", (12,), kind=replaced("bias"))},
        needs_base=True,
    )
    yield peft("0.15, head saved in full", stated={"modules_to_save": ["lm_head"]}, needs_base=True,
               modules=parts(Q, HEAD, **{HEAD: replaced()}))  # fmt: skip
    yield peft(
        "0.15, rows of tokens",
        stated={"trainable_token_indices": [3, 11]},
        modules=parts(Q, EMBED, **{EMBED: _rows("token_adapter.trainable_tokens_delta", [3, 11])}),
        needs_base=True,
    )
    embedding = ("lora_embedding_A", "lora_embedding_B")
    yield peft("0.18, embedding", stated={"peft_version": VERSIONS}, shown="PEFT 0.18.0",
               modules=parts(EMBED, **{EMBED: lora(embedding, scale=1.5, turned=True)}))  # fmt: skip
    yield peft(
        "0.18, Conv1D", "GPT-2", stated={"fan_in_fan_out": True, "peft_version": VERSIONS}, family="GPT-2",
        modules={f"{P}transformer.h.0.attn.c_attn": Part("transformer.h.0.attn.c_attn.weight", (6, 18))},
        kind=lora(scale=1.5, turned=True),
    )  # fmt: skip
    yield peft("0.21, trained with FSDP", stated=NEW, family="Llama",
               modules=parts(Q, UP, prefix=f"_fsdp_wrapped_module.{P}"))  # fmt: skip


def _types() -> Iterator[Layout]:
    """Yield other types of PEFT."""
    facts: dict[str, dict[str, Any]] = {
        "ADALORA": {"kind": adalora(3), "stated": {"init_r": 2, "target_r": 2}},
        "LOHA": {"kind": loha(None, 1.5), "stated": {"alpha": 3}},
        "LOKR": {"kind": lokr(None, factored=True, scale=1.5), "stated": {"alpha": 3}},
        "IA3": {"kind": ia3("ia3_l", added=False), "stated": {"feedforward_modules": []}, "needs_base": True},
        "VERA": {
            "kind": vera(SHARED),
            "needs_base": True,
            "stated": {"save_projection": True, "projection_prng_key": 0},
            "shared": {f"base_model.{name}": value for name, value in SHARED.items()},
        },
    }
    for kind, fact in facts.items():
        stated = {**NEW, "peft_type": kind, **fact.pop("stated")}
        yield peft(f"0.21, {kind}", stated=stated, family="Llama", **fact)


def _stacked(stem: str, name: str, shape: tuple[int, ...], kind: Kind) -> dict[str, Part]:
    return {f"{P}{stem}": Part(name, shape, kind=kind)}


EXPERTS = "model.layers.0.mlp.experts"


def _fused() -> Iterator[Layout]:
    """Yield fused and stacked layers."""
    both = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    yield peft(
        "0.17, experts in a stack", "Qwen3-MoE", stated={**both, "target_parameters": ["mlp.experts.gate_up_proj"]},
        modules=_stacked(EXPERTS, f"{EXPERTS}.gate_up_proj", (3, 8, 6), experts(1.5, swapped=True)), needs_base=True,
    )  # fmt: skip
    yield peft(
        "0.21, experts in a stack", "Qwen3-MoE", stated={**both, "peft_version": "0.21.2"},
        modules={
            **_stacked(EXPERTS, f"{EXPERTS}.down_proj", (3, 6, 4), experts(1.5)),
            **_stacked(f"{EXPERTS}.base_layer", f"{EXPERTS}.gate_up_proj", (3, 8, 6), experts(1.5)),
        },
    )  # fmt: skip
    linear = "model.layers.0.linear_attn"
    for model, names in (("Qwen3-Next", ("qkvz", "ba")), ("Qwen3.5", ("qkv", "z", "a"))):
        modules = {f"{P}{linear}.in_proj_{name}": Part(f"{linear}.in_proj_{name}.weight", (10, 6)) for name in names}
        yield peft("0.21, linear attention", model, stated={"peft_version": "0.21.2"}, modules=modules, family=model)


def _programs() -> Iterator[Layout]:
    """Yield trainers that save with PEFT, and leave traces."""
    fixed = {"auto_mapping": {**LLAMA, "unsloth_fixed": True}, "peft_version": VERSIONS}
    bnb = {"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"}
    yield peft("2025", trainer="Unsloth", stated={**fixed, **bnb}, shown="Unsloth", family="Llama")
    doubled = parts(Q, UP, prefix=f"{P}model.")
    yield peft("doubled prefix", trainer="Unsloth", stated=bnb, tags=("unsloth", "trl"), shown="Unsloth",
               modules=doubled)  # fmt: skip
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    single = {f"{P}model.layers.0.mlp.experts.gate_up_projs.{n}": Part(stack, (1, 6, 8), n, kind=_expert_of_gpt_oss)
              for n in range(3)}  # fmt: skip
    yield peft("experts as layers", "gpt-oss", "Unsloth", stated=fixed, shown="Unsloth", family="gpt-oss",
               modules=single, sizes={stack: (3, 6, 8)})  # fmt: skip
    axolotl = {"trainer": "Axolotl", "shown": "Axolotl", "tags": ("axolotl", "generated_from_trainer")}
    yield peft("names with default", kind=lora(("lora_A.default.weight", "lora_B.default.weight"), scale=1.5),
               **axolotl)  # fmt: skip
    yield peft("compiled", modules=parts(Q, UP, prefix=f"{P}_orig_mod."), **axolotl)
    checkpointed = {f"{P}model.layers.0._checkpoint_wrapped_module.self_attn.q_proj": Part(f"{Q}.weight", (8, 6))}
    yield peft("FSDP with checkpointing", modules=checkpointed, **axolotl)
    yield peft("0.9", trainer="LLaMA-Factory", shown="LLaMA-Factory", tags=("llama-factory", "lora"),
               stated={"modules_to_save": ["lm_head", "embed_tokens"]}, needs_base=True,
               modules=parts(Q, HEAD, EMBED, **{HEAD: replaced(), EMBED: replaced()}))  # fmt: skip
    yield peft("3", trainer="ms-swift", shown="ms-swift", files=("additional_config.json", "args.json"))
    seeing = {
        f"{P}model.layers.0.self_attn.q_proj": Part("model.language_model.layers.0.self_attn.q_proj.weight", (8, 6)),
        f"{P}visual.blocks.0.attn.qkv": Part("model.visual.blocks.0.attn.qkv.weight", (18, 6)),
    }
    vl = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}
    yield peft("names before transformers 4.52", "Qwen2.5-VL", "ms-swift", stated=vl, family="Qwen2.5",
               shown="ms-swift", files=("additional_config.json",), modules=seeing)  # fmt: skip
    yield peft("0.6, for PEFT", trainer="torchtune", stated={"target_modules": ["q_proj", "up_proj"]},
               shown="torchtune", tags=("torchtune",))  # fmt: skip
    yield peft("0.17", trainer="TRL", stated={"peft_version": VERSIONS}, shown="TRL", tags=("trl", "sft"))
    yield peft("DeepSpeed", trainer="Transformers", modules=parts(Q, UP, prefix=f"module.{P}"))
    yield Layout(trainer="PEFT", model="Llama", version="a file without a config", dialect="PEFT LORA",
                 family="unknown", shown="PEFT", modules=parts(Q, UP), kind=lora())  # fmt: skip


def _expert_of_gpt_oss(draw: Draw, shape: tuple[int, ...]) -> tuple[State, Formula]:
    """A linear layer for one expert of ``[E, in, out]``."""
    tensors, formula = lora(scale=1.5, turned=True)(draw, shape[1:])
    return tensors, lambda weight: formula(weight[0])[None]


def mlx(version: str, config: Mapping[str, Any], kind: Kind, **facts: Any) -> Layout:
    stated = {"model": "mlx-community/Llama-3.2-1B-4bit", "num_layers": 2, **config}
    return Layout(trainer="mlx-lm", model="Llama", version=version, dialect="MLX", family="Llama 3", shown="mlx-lm",
                  modules=parts(Q, UP, prefix=""), kind=kind, weights="adapters.safetensors", config=stated,
                  **facts)  # fmt: skip


def _mlx_lora(scale: float) -> Kind:
    def kind(draw: Draw, shape: tuple[int, ...]) -> tuple[State, Formula]:
        a, b = draw(shape[1], 2), draw(2, shape[0])
        return {"lora_a": a, "lora_b": b}, lambda weight: weight + scale * (a.double() @ b.double()).T

    return kind


def _mlx_dora(scale: float) -> Kind:
    def kind(draw: Draw, shape: tuple[int, ...]) -> tuple[State, Formula]:
        tensors, lora_of = _mlx_lora(scale)(draw, shape)
        lengths = draw(shape[0]).abs() + 1

        def formula(weight: Tensor) -> Tensor:
            total = lora_of(weight)
            return lengths.double()[:, None] / total.norm(dim=1, keepdim=True) * total

        return {**tensors, "m": lengths}, formula

    return kind


def _mlx() -> Iterator[Layout]:
    parameters = {"rank": 2, "scale": 10.0, "dropout": 0.0}
    yield mlx("0.20", {"fine_tune_type": "lora", "lora_parameters": parameters}, _mlx_lora(10.0))
    yield mlx("0.10, with an alpha", {"lora_parameters": {**parameters, "alpha": 16}}, _mlx_lora(10.0))
    yield mlx("0.20, DoRA", {"fine_tune_type": "dora", "lora_parameters": parameters}, _mlx_dora(10.0),
              needs_base=True)  # fmt: skip


LANGUAGE: tuple[Layout, ...] = (*_variants(), *_types(), *_fused(), *_programs(), *_mlx())
