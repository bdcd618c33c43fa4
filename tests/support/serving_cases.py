"""What is wrong with adapters and models, by what was done to sound ones, and what programs make of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from support.adapters import peft, quiet, save_base, train
from support.pipelines import diffusion_pipeline
from support.serving_edits import (
    SERVED,
    Edit,
    again,
    alone,
    base_says,
    both,
    holds,
    named,
    of_type,
    removed,
    renamed,
    saved_plainly,
    says,
    settings,
    sharded,
    unindexed,
    with_nan,
    without,
    written,
)
from support.serving_loras import LORAS, Expected, kohya

__all__ = ["ADAPTERS", "ALL", "MODELS", "OPTIONS", "OTHERS", "PIPELINES", "WRONG", "laid", "stocked"]


def stocked(root: Path) -> Path:
    """Adapters and models as PEFT, transformers and diffusers save them: there is nothing wrong with any."""
    with quiet():
        for name in ("llama", "llama-tied", "llama-biases", "gpt2", "mixtral", "whisper"):
            (save_base(root / name, name) / "tokenizer.json").write_text("{}")
        train(root / "adapter", root / "llama", 1, SERVED)
        diffusion_pipeline(root / "pipeline", 0)
    return root


SERVERS = ("vllm", "sglang", "llama.cpp")


LIBRARIES = ("peft", "transformers")


BARE = dict.fromkeys(
    ("vllm", "sglang", "llama.cpp", "peft", "transformers"),
    ("refuses", "adapters are folders with adapter_config.json"),
)


NAMES = {"vllm": ("refuses", "not named as LoRA's factors"), "llama.cpp": ("refuses", "not named as LoRA's factors")}


DROPPED = {"sglang": ("refuses", "tensors in the blocks that are not LoRA factors")}


START = {
    "vllm": ("refuses", "the start took something off the base"),
    **dict.fromkeys(("sglang", "llama.cpp"), ("ignores", "the start took something off the base")),
}


TABLES = dict.fromkeys(SERVERS, ("warns", "the embedding that was saved too"))


NO_START = dict.fromkeys(LIBRARIES, ("refuses", "the start cannot be repeated"))


OTHER_START = dict.fromkeys(LIBRARIES, ("ignores", "the start of the training"))


UNTARGETED = dict.fromkeys(LIBRARIES, ("ignores", "modules that the config does not target"))


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj"]}


LOST = {"files": ("refuses", "factors are missing or do not fit")}


TIED = {"llama.cpp": ("refuses", "embedding and head are one in the base")}


ADAPTERS: dict[str, tuple[Edit, Expected]] = {
    "bare file": (
        alone,
        BARE | {"diffusers": ("ignores", "base_model.model."), "comfyui": ("refuses", "of language models")},
    ),
    "without its prefix": (
        named(lambda name: name.removeprefix("base_model.model.")),
        {"peft": ("ignores", "without the prefix"), "diffusers": ("refuses", "no adapters of language models")},
    ),
    "with the adapter's name": (
        named(lambda name: name.replace(".weight", ".default.weight")),
        NAMES | {"transformers": ("ignores", "hold the name of an adapter")},
    ),
    "r missing": (
        says(r=None),
        {
            "vllm": ("refuses", "what vLLM asks for"),
            "sglang": ("refuses", "what SGLang asks for"),
            "files": ("refuses", "differ in rank"),
        },
    ),
    "alpha missing": (
        says(lora_alpha=None),
        {
            "vllm": ("refuses", "what vLLM asks for"),
            "sglang": ("refuses", "what SGLang asks for"),
            "llama.cpp": ("refuses", "what the converter asks for"),
            "peft": ("warns", "there is no lora_alpha"),
            "transformers": ("warns", "there is no lora_alpha"),
        },
    ),
    "targets missing": (
        says(target_modules=None),
        {
            "vllm": ("refuses", "what vLLM asks for"),
            "peft": ("warns", "there are no target_modules"),
            "transformers": ("warns", "there are no target_modules"),
        },
    ),
    "base unnamed": (says(base_model_name_or_path=None), {"llama.cpp": ("warns", "the base is not named")}),
    "base by a path": (
        says(base_model_name_or_path="./llama"),
        {"llama.cpp": ("warns", "the base is named by a path")},
    ),
    "modules in full": (
        again(modules_to_save=["lm_head"]),
        NAMES
        | {
            "vllm": ("refuses", "modules saved in full"),
            "sglang": ("ignores", "outside of the blocks that are not LoRA"),
        },
    ),
    "norms in full": (
        again(modules_to_save=["input_layernorm"]),
        {"llama.cpp": ("ignores", "norms saved in full"), **DROPPED},
    ),
    "two heads in full": (
        both(
            says(modules_to_save=["score", "classifier"]),
            holds(lambda s: s | {f"base_model.model.{n}.weight": torch.ones(2, 2) for n in ("score", "classifier")}),
        ),
        {"vllm": ("refuses", "modules saved in full")},
    ),
    "modules not in the file": (
        says(modules_to_save=["lm_head"]),
        {
            "peft": ("refuses", "modules should be saved in full"),
            "transformers": ("ignores", "modules should be saved in full"),
        },
    ),
    "DoRA": (
        again(use_dora=True),
        NAMES | {"vllm": ("refuses", "this variant"), "sglang": ("refuses", "this variant")},
    ),
    "magnitudes": (
        both(again(use_dora=True), says(use_dora=False)),
        dict.fromkeys(LIBRARIES, ("ignores", "DoRA's magnitudes")),
    ),
    "KaSA": (again(kasa_config=peft.KasaConfig()), {"vllm": ("refuses", "this variant")}),
    "biases": (again(base="llama-biases", bias="lora_only"), NAMES | DROPPED | {"vllm": ("refuses", "trained biases")}),
    "LoRA's biases": (
        again(base="llama-biases", lora_bias=True),
        NAMES | DROPPED | {"vllm": ("refuses", "trained biases")},
    ),
    "LoRA's biases on layers without": (
        again(lora_bias=True),
        {"files": ("warns", "factors have biases on layers without")},
    ),
    "tokens": (
        again(trainable_token_indices={"embed_tokens": [1, 2]}),
        NAMES | {"vllm": ("refuses", "trained tokens"), "sglang": ("ignores", "outside of the blocks")},
    ),
    "added tokens": (
        written("added_tokens.json", {"<old>": 1, "<new>": 1_000_000}),
        {"sglang": ("refuses", "adapters that add tokens")},
    ),
    "tokens not in the file": (
        says(trainable_token_indices={"embed_tokens": [1, 2]}),
        {
            "peft": ("refuses", "tokens should be trained"),
            "transformers": ("ignores", "tokens should be trained"),
            "files": ("warns", "merge itself does not read this"),
        },
    ),
    "rank of 17": (again(r=17), {"vllm": ("refuses", "the rank is above"), "sglang": ("refuses", "the rank is above")}),
    "larger vocabulary": (
        both(again(["q_proj", "embed_tokens"]), base_says(vocab_size=99)),
        {"vllm": ("refuses", "the vocabulary is not the base's")},
    ),
    "saved embedding": (again(["q_proj", "embed_tokens"]), TABLES),
    "head": (
        both(again(["q_proj", "lm_head"]), says(base_model_name_or_path="org/gone")),
        {"llama.cpp": ("warns", "are refused if they are one")},
    ),
    "tied head": (again(["q_proj", "lm_head"], "llama-tied"), TIED),
    "tied embedding": (again(["q_proj", "v_proj", "embed_tokens"], "llama-tied"), TIED),
    "queries alone": (again(["q_proj"]), {"sglang": ("refuses", "without the partners")}),
    "queries and keys": (again(["q_proj", "k_proj"]), {"sglang": ("refuses", "without the partners")}),
    "values alone": (again(["v_proj"]), {"sglang": ("refuses", "without the partners")}),
    "no queries": (again(["k_proj", "v_proj"]), {"sglang": ("refuses", "without the partners")}),
    "no gate": (again(["up_proj"]), {"sglang": ("refuses", "without the partners")}),
    "router": (
        named(lambda name: name.replace("self_attn.q_proj", "mlp.gate")),
        {"sglang": ("refuses", "factors of stacked experts and of routers")},
    ),
    "square layers of GPT-2": (
        again(["attn.c_proj"], "gpt2", fan_in_fan_out=True),
        {"llama.cpp": ("ignores", "factors of GPT-2's square layers")},
    ),
    "other layers of GPT-2": (
        again(["attn.c_attn"], "gpt2", fan_in_fan_out=True),
        {"llama.cpp": ("refuses", "factors of GPT-2's layers")},
    ),
    "ranks by module": (
        again(rank_pattern={"q_proj": 2}),
        {"sglang": ("refuses", "ranks by module")},
    ),
    "alphas by module": (
        again(alpha_pattern={"q_proj": 2}),
        dict.fromkeys(("sglang", "llama.cpp"), ("ignores", "alphas by module")),
    ),
    "rsLoRA": (
        again(use_rslora=True),
        dict.fromkeys(("sglang", "llama.cpp"), ("ignores", "rank-stabilized scales")),
    ),
    "rsLoRA of single experts": (
        both(again(use_rslora=True), named(lambda name: name.replace("mlp.up_proj", "mlp.experts.0.up_proj"))),
        {"vllm": ("warns", "before September 2026 experts")},
    ),
    "vision tower": (
        named(lambda name: name.replace("model.layers", "visual.layers")),
        {"vllm": ("warns", "modules that read images")},
    ),
    "PiSSA": (again(init_lora_weights="pissa"), START),
    "CorDA": (says(init_lora_weights="corda"), START | NO_START),
    "LoftQ": (says(init_lora_weights="loftq"), START | NO_START),
    "LoRA-GA": (
        says(init_lora_weights="lora_ga"),
        OTHER_START | dict.fromkeys(SERVERS, ("warns", "LoRA-GA took something off the base")),
    ),
    "fast PiSSA": (says(init_lora_weights="pissa_niter_4"), START | OTHER_START),
    "repeated blocks": (
        again(layer_replication=[[0, 2], [0, 2]]),
        dict.fromkeys(SERVERS, ("refuses", "repeated blocks")),
    ),
    "QA-LoRA": (says(use_qalora=True), {"llama.cpp": ("ignores", "factors of this form")}),
    "aLoRA": (
        says(alora_invocation_tokens=[1, 2]),
        {"vllm": ("refuses", "only behind certain tokens"), "sglang": ("ignores", "only behind certain tokens")},
    ),
    "stacked experts": (
        again(["q_proj"], "mixtral", **EXPERTS),
        {
            "vllm": ("refuses", "factors of stacked experts"),
            "sglang": ("refuses", "factors of stacked experts"),
            "llama.cpp": ("refuses", "factors of stacked experts"),
        },
    ),
    "stacked experts of an unknown base": (
        both(again(["q_proj"], "mixtral", **EXPERTS), says(base_model_name_or_path="org/gone")),
        {"vllm": ("warns", "factors of stacked experts")},
    ),
    "convolution": (
        again(["q_proj", "conv1"], "whisper"),
        {
            **dict.fromkeys(SERVERS, ("refuses", "factors of convolutions")),
        },
    ),
    "odd modules": (
        again(["q_proj", "fc1"], "whisper"),
        {"sglang": ("warns", "for some architectures only")},
    ),
    "regular expression": (again(r".*q_proj"), {"sglang": ("refuses", "target_modules is a regular expression")}),
    "quantised base": (
        base_says(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        {"llama.cpp": ("refuses", "the base's quantization")},
    ),
    "unknown type": (
        says(peft_type="LORAX"),
        {
            "peft": ("refuses", "there is no such type"),
            "transformers": ("refuses", "there is no such type"),
            "sglang": ("refuses", "only LoRA"),
            "files": ("warns", "merge itself does not read this"),
        },
    ),
    "Bone": (says(peft_type="BONE"), dict.fromkeys(LIBRARIES, ("refuses", "Bone is called MISS"))),
    "rank of 0": (
        says(r=0),
        dict.fromkeys(LIBRARIES, ("refuses", "should be a whole number above 0")),
    ),
    "broken expression": (
        says(target_modules="q_proj("),
        dict.fromkeys(LIBRARIES, ("refuses", "modules cannot be looked for")),
    ),
    "fewer targets": (says(target_modules=["q_proj"]), UNTARGETED),
    "fewer blocks": (says(layers_to_transform=[0]), UNTARGETED),
    "excluded": (says(exclude_modules=["k_proj"]), UNTARGETED),
    "IA3": (
        of_type(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        NAMES | DROPPED | {"sglang": ("refuses", "only LoRA")},
    ),
    "VeRA": (
        of_type(peft.VeraConfig(target_modules=["q_proj"])),
        {"transformers": ("refuses", "tensors that modules share")},
    ),
    "SHiRA": (
        of_type(peft.ShiraConfig(r=2, target_modules=["q_proj"])),
        {"transformers": ("ignores", "positions of the adapted entries")},
    ),
    "prompt": (
        of_type(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        {
            "transformers": ("refuses", "only PEFT loads prompts"),
            "files": ("warns", "merge itself does not read this"),
        },
    ),
    "empty": (holds(lambda _: {}), {"files": ("refuses", "it is empty")}),
    "deeper than the base": (
        named(lambda name: name.replace("layers.1", "layers.7")),
        {"files": ("ignores", "blocks are adapted that the base does not have")},
    ),
    "of another base": (
        named(lambda name: name.replace("self_attn", "attention")),
        {"files": ("refuses", "does not fit its base")},
    ),
    "no down factor": (without("layers.0.self_attn.q_proj.lora_A"), LOST),
    "no magnitudes": (both(again(use_dora=True), without("layers.0.self_attn.q_proj.lora_magn")), LOST),
    "factors apart": (holds(lambda s: {n: v[:, :3] if "lora_B" in n else v for n, v in s.items()}), LOST),
    "another rank": (says(r=5), {"files": ("refuses", "differ in rank")}),
    "NaN": (holds(with_nan), {"files": ("refuses", "NaN")}),
}


FOLDERS = dict.fromkeys(
    ("vllm", "sglang", "llama.cpp", "transformers", "diffusers"), ("refuses", "models are folders with config.json")
)


MODELS: dict[str, tuple[Edit, Expected]] = {
    "any": (lambda folder: folder, {"comfyui": ("warns", "do not check whether it loads a model")}),
    "bare file": (alone, FOLDERS),
    "no config": (removed("config.json"), FOLDERS),
    "empty": (holds(lambda _: {}), {"files": ("refuses", "it is empty")}),
    "no class": (
        settings(architectures=None),
        dict.fromkeys(SERVERS, ("refuses", "does not name the architecture"))
        | {"transformers": ("warns", "does not name the class"), "diffusers": ("refuses", "a class of diffusers")},
    ),
    "code": (
        settings(model_type="smile_llama", auto_map={"AutoModelForCausalLM": "modeling_smile.SmileLlamaForCausalLM"}),
        dict.fromkeys(SERVERS, ("refuses", "experts of low rank"))
        | {"transformers": ("warns", "code that the config names")},
    ),
    "no type": (settings(model_type=None), {"transformers": ("refuses", "what model it is")}),
    "no tokenizer": (removed("tokenizer.json"), dict.fromkeys(SERVERS, ("refuses", "there is no tokenizer"))),
    "another type": (
        settings(dtype="bfloat16"),
        {
            "transformers": ("warns", "cast to the type"),
            "vllm": ("warns", "in the type that the config states"),
            "sglang": ("warns", "in the type that the config states"),
        },
    ),
    "another name": (
        renamed("model.safetensors", "merged.safetensors"),
        {"transformers": ("refuses", "weights of this name")},
    ),
    "index": (sharded, {"transformers": ("refuses", "the index has no metadata")}),
    "no index": (unindexed, {"transformers": ("refuses", "found by their index, which is missing")}),
    "plain header": (saved_plainly, {"transformers": ("warns", "without format = pt")}),
    "no last block": (without("layers.1."), {"files": ("refuses", "blocks are missing")}),
    "one block more": (settings(num_hidden_layers=1), {"files": ("ignores", "more blocks than the config says")}),
    "vocabulary": (settings(vocab_size=99), {"files": ("refuses", "the size of the vocabulary")}),
    "width": (settings(hidden_size=40), {"files": ("refuses", "differ in width")}),
    "no head": (without("lm_head"), {"files": ("refuses", "no output head")}),
    "head of its own": (settings(tie_word_embeddings=True), {"files": ("ignores", "a head of its own")}),
    "copied head": (
        settings(tie_word_embeddings=True),
        {"files": ("warns", "a tied model stores its head")},
    ),
    "not quantised": (
        settings(quantization_config={"quant_method": "fp8"}),
        {"files": ("refuses", "the config says quantised, and")},
    ),
    "quantised": (
        both(
            settings(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            holds(lambda s: s | {"model.layers.0.mlp.up_proj.SCB": torch.ones(48)}),
        ),
        {"llama.cpp": ("refuses", "cannot undo this quantization")},
    ),
    "said nowhere": (
        holds(lambda s: s | {"model.layers.0.mlp.up_proj.SCB": torch.ones(48)}),
        {"files": ("refuses", "the config does not say so")},
    ),
    "two sets": (
        written("model.safetensors.index.json", {}),
        {"files": ("ignores", "two sets of weights")},
    ),
    "NaN": (holds(with_nan), {"files": ("refuses", "NaN")}),
}


PIPELINES: dict[str, tuple[Edit, Expected]] = {
    "no class": (settings(_class_name=None), {"diffusers": ("refuses", "does not name the pipeline")}),
    "no component": (removed("scheduler"), {"files": ("refuses", "components are not whole")}),
    "no weights": (removed("unet/diffusion_pytorch_model.safetensors"), {"files": ("refuses", "not whole")}),
    "NaN": (
        lambda folder: (holds(with_nan)(folder / "text_encoder"), folder)[1],
        {"files": ("refuses", "NaN")},
    ),
}


OPTIONS: dict[str, dict[str, Any]] = {
    "model: copied head": {"values": False},
    "LoRA file: of another model": {"base": "pipeline"},
}


OTHERS = {(kind, program) for kind in ("llama", "adapter") for program in ("diffusers", "comfyui")}
"""What a program does not take, however sound."""


ALL = {"adapter: base by a path"}
"""What is so of the sound ones too."""


WRONG = {
    **{f"adapter: {name}": ("adapter", *case) for name, case in ADAPTERS.items()},
    **{f"model: {name}": ("llama", *case) for name, case in MODELS.items()},
    **{f"pipeline: {name}": ("pipeline", *case) for name, case in PIPELINES.items()},
    **{f"LoRA file: {name}": ("lora", *case) for name, case in LORAS.items()},
}


def laid(shelf: Path, folder: Path, kind: str) -> Path:
    """One of the sound things, to be changed."""
    return kohya(folder) if kind == "lora" else Path(shutil.copytree(shelf / kind, folder))
