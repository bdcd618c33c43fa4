"""What is wrong with adapters and models, by what was done to sound ones, and what programs make of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.adapters import State, edit_config, edit_tensors, peft, quiet, reload, save_base, train
from support.diffusion_models import factors
from support.pipelines import diffusion_pipeline

__all__ = [
    "ADAPTERS",
    "ALL",
    "LORAS",
    "MODELS",
    "OPTIONS",
    "OTHERS",
    "PIPELINES",
    "SERVED",
    "SERVERS",
    "WRONG",
    "laid",
    "lora",
    "stocked",
]

Edit = Callable[[Path], Path]
Expected = Mapping[str, tuple[str, str]]
"""What programs say: the severity, and what they do."""

UNET = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
FLUX = "lora_unet_double_blocks_0_img_mlp_0"


SERVED = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
"""Targets that every program takes."""


def stocked(root: Path) -> Path:
    """Adapters and models as PEFT, transformers and diffusers save them: there is nothing wrong with any."""
    with quiet():
        for name in ("llama", "llama-tied", "llama-biases", "gpt2", "mixtral", "whisper"):
            (save_base(root / name, name) / "tokenizer.json").write_text("{}")
        train(root / "adapter", root / "llama", 1, SERVED)
        diffusion_pipeline(root / "pipeline", 0)
    return root


# ---- what is done to a file


def again(targets: Any = SERVED, base: str = "llama", **config: Any) -> Edit:
    """Another adapter in the place of the plain one, as PEFT trains and saves it."""

    def edit(folder: Path) -> Path:
        settings = json.loads((folder / "adapter_config.json").read_text())
        shutil.rmtree(folder)
        return train(folder, Path(settings["base_model_name_or_path"]).with_name(base), 3, targets, **config)

    return edit


def of_type(config: Any) -> Edit:
    """An adapter of another type."""

    def edit(folder: Path) -> Path:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        shutil.rmtree(folder)
        peft.get_peft_model(reload(Path(base)), deepcopy(config)).save_pretrained(folder)  # PEFT notes the base in it
        return folder

    return edit


def says(**fields: Any) -> Edit:
    return lambda folder: edit_config(folder, **fields)


def holds(change: Callable[[State], State]) -> Edit:
    """Other tensors in an adapter's file, or in a model's."""

    def edit(folder: Path) -> Path:
        if (folder / "adapter_model.safetensors").exists():
            return edit_tensors(folder, change)
        file = folder / "model.safetensors"
        save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file, {"format": "pt"})
        return folder

    return edit


def named(change: Callable[[str], str]) -> Edit:
    return holds(lambda state: {change(name): value for name, value in state.items()})


def without(part: str) -> Edit:
    return holds(lambda state: {name: value for name, value in state.items() if part not in name})


def both(one: Edit, other: Edit) -> Edit:
    return lambda path: other(one(path))


def alone(path: Path) -> Path:
    """The file out of its folder."""
    file = next(path.glob("*model.safetensors"))
    return file.rename(path.with_name(f"{path.name}.safetensors"))


def with_nan(state: State) -> State:
    first = min(state)
    return state | {first: state[first].index_fill(0, torch.tensor([0]), torch.nan)}


def settings(**fields: Any) -> Edit:
    """Other fields in a model's config; None removes one."""

    def edit(folder: Path) -> Path:
        file = next(folder / name for name in ("model_index.json", "config.json") if (folder / name).exists())
        config = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return folder

    return edit


def base_says(**fields: Any) -> Edit:
    """Other fields in the config of an adapter's base, which is a copy."""

    def edit(folder: Path) -> Path:
        path = folder / "adapter_config.json"
        base = json.loads(path.read_text())["base_model_name_or_path"]
        copy = shutil.copytree(base, folder.with_name(f"{folder.name}-base"))
        settings(**fields)(copy)
        return edit_config(folder, base_model_name_or_path=str(copy))

    return edit


def renamed(old: str, new: str) -> Edit:
    def edit(folder: Path) -> Path:
        (folder / old).rename(folder / new)
        return folder

    return edit


def removed(name: str) -> Edit:
    def edit(folder: Path) -> Path:
        (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name)
        return folder

    return edit


def written(name: str, content: Any) -> Edit:
    def edit(folder: Path) -> Path:
        (folder / name).write_text(json.dumps(content))
        return folder

    return edit


def sharded(folder: Path) -> Path:
    """An index without metadata, of one shard."""
    shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(shard), shard.name)}
    return written("model.safetensors.index.json", index)(folder)


def unindexed(folder: Path) -> Path:
    """All shards of a model, without their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number in (0, 1):
        part = {name: tensors[name] for name in sorted(tensors)[number::2]}
        save_file(part, folder / f"model-0000{number + 1}-of-00002.safetensors", {"format": "pt"})
    return folder


def saved_plainly(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file(load_file(file), file)
    return folder


# ---- what programs make of it

SERVERS = ("vllm", "sglang", "llama.cpp")
LIBRARIES = ("peft", "transformers")

BARE = dict.fromkeys(
    ("vllm", "sglang", "llama.cpp", "peft", "transformers"),
    ("refuses", "adapters are folders with adapter_config.json"),
)
NAMES = {"vllm": ("refuses", "not those of LoRA's factors"), "llama.cpp": ("refuses", "not those of LoRA's factors")}
DROPPED = {"sglang": ("refuses", "tensors in the blocks that are no LoRA factors")}
START = {
    "vllm": ("refuses", "the start took something off the base"),
    **dict.fromkeys(("sglang", "llama.cpp"), ("ignores", "what the start took off the base")),
}
TABLES = dict.fromkeys(SERVERS, ("warns", "the embedding that was saved along"))
NO_START = dict.fromkeys(LIBRARIES, ("refuses", "the start cannot be repeated"))
OTHER_START = dict.fromkeys(LIBRARIES, ("ignores", "the start that was trained on"))
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
            "sglang": ("ignores", "outside of the blocks that are no LoRA"),
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
    "queries alone": (again(["q_proj"]), {"sglang": ("refuses", "without the one that is looked for")}),
    "queries and keys": (again(["q_proj", "k_proj"]), {"sglang": ("refuses", "without the one that is looked for")}),
    "values alone": (again(["v_proj"]), {"sglang": ("refuses", "without the one that is looked for")}),
    "no queries": (again(["k_proj", "v_proj"]), {"sglang": ("refuses", "without the one that is looked for")}),
    "no gate": (again(["up_proj"]), {"sglang": ("refuses", "without the one that is looked for")}),
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
        dict.fromkeys(("sglang", "llama.cpp"), ("ignores", "rank-stabilised scales")),
    ),
    "rsLoRA of single experts": (
        both(again(use_rslora=True), named(lambda name: name.replace("mlp.up_proj", "mlp.experts.0.up_proj"))),
        {"vllm": ("warns", "before September 2026 experts")},
    ),
    "vision tower": (
        named(lambda name: name.replace("model.layers", "visual.layers")),
        {"vllm": ("warns", "modules that see")},
    ),
    "PiSSA": (again(init_lora_weights="pissa"), START),
    "CorDA": (says(init_lora_weights="corda"), START | NO_START),
    "LoftQ": (says(init_lora_weights="loftq"), START | NO_START),
    "LoRA-GA": (
        says(init_lora_weights="lora_ga"),
        OTHER_START | dict.fromkeys(SERVERS, ("warns", "what LoRA-GA took off the base")),
    ),
    "fast PiSSA": (says(init_lora_weights="pissa_niter_4"), START | OTHER_START),
    "repeated blocks": (
        again(layer_replication=[[0, 2], [0, 2]]),
        dict.fromkeys(SERVERS, ("refuses", "repeated blocks")),
    ),
    "QA-LoRA": (says(use_qalora=True), {"llama.cpp": ("ignores", "factors of this form")}),
    "aLoRA": (
        says(alora_invocation_tokens=[1, 2]),
        {"vllm": ("refuses", "behind certain tokens only"), "sglang": ("ignores", "behind certain tokens only")},
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
        {"llama.cpp": ("refuses", "the base's quantisation")},
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
        {"transformers": ("refuses", "what its modules share")},
    ),
    "SHiRA": (
        of_type(peft.ShiraConfig(r=2, target_modules=["q_proj"])),
        {"transformers": ("ignores", "which entries are adapted")},
    ),
    "prompt": (
        of_type(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        {
            "transformers": ("refuses", "prompts are loaded by PEFT alone"),
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
    "any": (lambda folder: folder, {"comfyui": ("warns", "which models it loads is not looked at")}),
    "bare file": (alone, FOLDERS),
    "no config": (removed("config.json"), FOLDERS),
    "empty": (holds(lambda _: {}), {"files": ("refuses", "it is empty")}),
    "no class": (
        settings(architectures=None),
        dict.fromkeys(SERVERS, ("refuses", "does not name the architecture"))
        | {"transformers": ("warns", "does not name the class"), "diffusers": ("refuses", "a class of diffusers")},
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
    "no index": (unindexed, {"transformers": ("refuses", "looked for by their index, which is missing")}),
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
        {"llama.cpp": ("refuses", "cannot undo this quantisation")},
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


def kohya(folder: Path, change: Callable[[State], State] = dict, **metadata: str) -> Path:
    """A LoRA of a U-Net as sd-scripts saves it, and what is done to it."""
    folder.mkdir(exist_ok=True)
    path = factors(folder / "lora.safetensors", {UNET: ((8, 8), 1.0)})
    save_file(change(load_file(path)), path, metadata)
    return path


def lora(change: Callable[[State], State] = dict, **metadata: str) -> Edit:
    return lambda folder: kohya(folder, change, **metadata)


def dotted(state: State) -> State:
    """Factors by diffusers' names, of two ranks."""
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    return {
        f"{module}.{to}.lora_{side}.weight": torch.ones(*((rank, 8) if side == "A" else (8, rank)))
        for to, rank in (("to_q", 2), ("to_k", 3))
        for side in "AB"
    }


def under(module: str) -> Edit:
    """Factors of one module."""
    return lora(lambda _: {f"{module}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"})


LORAS: dict[str, tuple[Edit, Expected]] = {
    "LoHa": (
        lora(lambda _: {f"{UNET}.hada_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}),
        {"diffusers": ("refuses", "only LoRA is loaded")},
    ),
    "LoKr": (
        lora(lambda _: {f"{UNET}.lokr_w1": torch.ones(2, 2), f"{UNET}.lokr_w2": torch.ones(4, 4)}),
        {"diffusers": ("refuses", "only LoRA is loaded")},
    ),
    "LoKr of Flux": (
        lora(lambda _: {f"{FLUX}.lokr_w1": torch.ones(2, 2), f"{FLUX}.lokr_w2": torch.ones(4, 4)}),
        {"diffusers": ("warns", "LoKr and full differences")},
    ),
    "DoRA": (
        lora(lambda s: s | {f"{UNET}.dora_scale": torch.ones(8, 1)}),
        {"diffusers": ("ignores", "DoRA's magnitudes")},
    ),
    "two alphas": (
        lora(lora_adapter_metadata='{"unet.r": 2}'),
        {"diffusers": ("refuses", "alphas stand in the header")},
    ),
    "ranks": (lora(dotted), {"diffusers": ("warns", "before August 2026")}),
    "ComfyUI": (under("diffusion_model.odd.0.to_q"), {"diffusers": ("warns", "names of ComfyUI")}),
    "of Flux or of Flux.2": (
        under("diffusion_model.double_blocks.0.img_mlp.0"),
        {"diffusers": ("warns", "loads for some of the models")},
    ),
    "of Wan, by diffusers": (
        under("transformer.blocks.0.attn1.to_q"),
        {"comfyui": ("ignores", "modules under names that are not in its map")},
    ),
    "of Flux or of HunyuanVideo": (
        under("transformer.transformer_blocks.0.ff.net.0.proj"),
        {"comfyui": ("warns", "in its map for some of the models")},
    ),
    "of Anima, flat": (
        under("lora_unet_blocks_0_mlp_layer1"),
        {"diffusers": ("ignores", "modules under names that it does not load")},
    ),
    "attention of a U-Net": (lora(dotted), {"comfyui": ("ignores", "attention of a U-Net")}),
    "newer text encoder": (
        under("text_encoder.encoder.layers.0.self_attn.q_proj"),
        {"comfyui": ("ignores", "modules of text encoders")},
    ),
    "magnitudes of diffusers": (
        lora(lambda s: s | {f"{UNET}.lora_magnitude_vector": torch.ones(8)}),
        {"comfyui": ("ignores", "tensors of a kind that it does not know")},
    ),
    "alphas in the header": (
        lora(
            lambda s: {name: value for name, value in dotted(s).items() if ".to_q." in name},
            lora_adapter_metadata='{"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q"]}',
        ),
        {"comfyui": ("ignores", "alphas that stand in a config")},
    ),
    "of another model": (
        lora(lambda s: {n.replace("down_blocks_1", "down_blocks_7"): v for n, v in s.items()}),
        {"files": ("refuses", "does not fit its base")},
    ),
    "NaN": (lora(with_nan), {"files": ("refuses", "NaN")}),
    "no up factor": (
        lora(lambda s: {n: v for n, v in s.items() if "lora_up" not in n}),
        {"files": ("refuses", "factors are missing")},
    ),
    "unknown part": (
        lora(lambda s: s | {f"{UNET}.odd": torch.ones(2)}),
        {"files": ("warns", "merge itself does not read this"), "diffusers": ("refuses", "only LoRA is loaded")},
    ),
    "LoRA of convolutions with a core": (
        lora(lambda s: s | {f"{UNET}.lora_mid.weight": torch.ones(2, 2)}),
        {"diffusers": ("refuses", "only LoRA is loaded")},
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
