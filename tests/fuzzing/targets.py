"""What is attacked: for each reader a way to make an input, and what is done with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch

from fuzzing.corpus import Adapted, Corpus
from fuzzing.mutation import STRANGE, bytes_harmed, dumped, json_harmed, text_harmed, value
from fuzzing.pickles import make_pickle
from fuzzing.sample import Sample
from fuzzing.texts import make_address, make_query, make_recipe_text, read_address, read_query, read_recipe
from fuzzing.weights import BITS, Weights, harmed, joined
from merging.api.inspect import inspect
from merging.api.merge_files import check_output, merge_plan, plan_for
from merging.errors import MergingError
from merging.hub.open_model import open_model
from merging.plan.recipe_values import make_recipe
from merging.sources.header import read_header
from support.tiny import fine_tune, model

__all__ = ["TARGETS", "Target", "read_valid"]


@dataclass(frozen=True, slots=True)
class Target:
    """One reader: its share of the inputs, how one is made, and how it is read."""

    share: int
    make: Callable[[Random, Corpus], Sample]
    read: Callable[[Path, dict[str, Any], Corpus], object]


# --- safetensors headers


def _make_header(random: Random, corpus: Corpus) -> Sample:
    weights = random.choice(corpus.files)
    kind = random.randrange(10)
    if kind < 3:
        content = bytes_harmed(random, weights.file())
    elif kind < 7:
        tree = json_harmed(random, weights.header(), ("__metadata__", "dtype", "shape", "data_offsets", *BITS))
        content = joined(dumped(random, tree), weights.data())
    elif kind < 8:
        header = json.dumps(weights.header())
        text = text_harmed(
            random, header, ('"', "{", "}", "[", ",", ":", "null", "1e5", "0", "-", "\\ud800", "\ufeff", "NaN")
        )
        encoding = random.choice(("utf-8", "utf-8", "utf-16", "utf-32", "latin-1"))
        content = joined(text.encode(encoding, "replace"), weights.data())
    elif kind < 9:
        content = harmed(random, weights).file()
    else:
        content = joined(dumped(random, _random_header(random)), random.randbytes(random.choice((0, 8, 64))))
    return Sample({"a.safetensors": content})


def _random_header(random: Random) -> dict[str, Any]:
    header, end = {}, 0
    for number in range(random.randrange(6)):
        shape = [random.choice((0, 1, 2, 3, 2**31, 2**62)) for _ in range(random.randrange(4))]
        size = random.choice((0, 1, 4, 8, 64))
        name = random.choice((f"t{number}", *STRANGE))
        header[name] = {"dtype": random.choice(list(BITS)), "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header


def _read_header(folder: Path, words: dict[str, Any], corpus: Corpus) -> None:
    header = read_header(folder / "a.safetensors")
    with safetensors.safe_open(folder / "a.safetensors", "pt") as reference:  # what we take, it must take too
        assert set(reference.keys()) == header.entries.keys()
        for name, entry in header.entries.items():
            if entry.dtype not in ("F4", "F6_E2M3", "F6_E3M2"):
                assert tuple(reference.get_slice(name).get_shape()) == entry.shape
    open_model(folder / "a.safetensors")


# --- shards


def _make_index(random: Random, corpus: Corpus) -> Sample:
    state = model(layers=1, width=4, vocab=6)
    names = list(state)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    held = {shard: {name: state[name] for name in names[number::2]} for number, shard in enumerate(shards)}
    files = {f"m/{shard}": safetensors.torch.save(tensors) for shard, tensors in held.items()}
    index = {
        "metadata": {"total_size": 100, "total_parameters": 25},
        "weight_map": {name: shard for shard, tensors in held.items() for name in tensors},
    }
    links: dict[str, str] = {}
    kind = random.randrange(10)
    words = [*shards, *names, "../m/" + shards[0], "/etc/passwd", "model.safetensors.index.json", "config.json"]
    text = dumped(random, json_harmed(random, index, words) if kind < 7 else index)
    if kind in (7, 9):
        text = bytes_harmed(random, text)
    if kind == 8:
        shard = random.choice(list(files))
        files[shard] = bytes_harmed(random, files[shard])
    if random.random() < 0.1:
        shard = random.choice(list(files))
        del files[shard]
        links[shard] = random.choice(
            (Path(shard).name, "..", "/dev/zero", "nowhere", "/etc/passwd", shards[0], "/dev/full")
        )
    if random.random() < 0.1:
        links["m/" + random.choice(("adapter_config.json", "model.safetensors", "config.json"))] = random.choice(
            ("loop", ".", "/dev/null")
        )
    files["m/model.safetensors.index.json"] = text
    if "m/config.json" not in links:
        files["m/config.json"] = json.dumps(corpus.configs["tiny"]).encode()
    where = random.choice(("m", "m", "m/model.safetensors.index.json"))
    return Sample(files, links, {"models": [where], "do": random.choice(("plan", "merge", "inspect"))})


# --- adapters


_ADAPTER_WORDS = (
    "peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save",
    "bias", "use_rslora", "use_dora", "fan_in_fan_out", "init_lora_weights", "layer_replication",
    "trainable_token_indices", "target_parameters", "lora_bias", "use_bdlora", "kasa_config",
    "base_model_name_or_path", "revision", "LOKR", "VERA", "feedforward_modules", "token_indices",
    "ensure_weight_tying", "nblocks", "block_size_pattern", "n_frequency", "LORA", "LOHA", "BOFT", "OFT", "IA3",
    "MISS", "BONE", "HRA", "OSF", "ROAD", "C3A", "SHIRA", "WAVEFT", "FOURIERFT", "RANDLORA", "VBLORA", "ADALORA",
    "GRALORA", "DELORA", "HIRA", "LN_TUNING", "TRAINABLE_TOKENS", "PROMPT_TUNING",
)  # fmt: skip


_METHODS = (
    "task_arithmetic", "ties", "pcb", "magmax", "tsv", "iso_c", "svd", "opcm", "do", "dare+ties", "knots+ties",
    "core+tsv", "lines+ties", "breadcrumbs+linear", "orthogonalize+linear", "decouple+linear", "karcher", "varm", "sce",
)  # fmt: skip


def _adapter(random: Random, adapted: Adapted, config: bytes | None, weights: bytes) -> Sample:
    """An adapter to be read with or without its base, and merged, planned, looked at or verified."""
    files = {"a/adapter_model.safetensors": weights}
    if config is not None:
        files["a/adapter_config.json"] = config
    words: dict[str, Any] = {
        "models": ["a"],
        "do": random.choice(("merge", "merge", "merge", "plan", "inspect", "verify")),
    }
    if random.random() < 0.85:
        words["base"] = adapted.base
        words["as"] = random.choice(("model", "adapter"))
    if random.random() < 0.1:
        words["lora_alpha"] = random.choice((1, 0.5, 1e6))
    if random.random() < 0.15:
        words["method"] = random.choice(_METHODS)
    return Sample(files, {}, words)


def _make_config(random: Random, corpus: Corpus) -> Sample:
    adapted = random.choice(corpus.peft)
    words = (*_ADAPTER_WORDS, *adapted.config)
    text = dumped(random, json_harmed(random, adapted.config, words))
    if random.random() < 0.1:
        text = bytes_harmed(random, text)
    return _adapter(random, adapted, text, adapted.weights.file())


def _make_factors(random: Random, corpus: Corpus) -> Sample:
    adapted = random.choice(corpus.peft)
    config: dict[str, Any] = adapted.config
    if random.random() < 0.1:
        config = random.choice(corpus.peft).config
    names = [name for other in random.sample(corpus.peft, min(3, len(corpus.peft))) for name in other.weights.tensors]
    weights = harmed(random, adapted.weights, names)
    return _adapter(random, adapted, dumped(random, config), weights.file())


def _make_metadata(random: Random, corpus: Corpus) -> Sample:
    """Adapters whose config is in the header of their only file."""
    adapted = random.choice([*corpus.peft, *corpus.diffusion])
    metadata = dict(adapted.weights.metadata)
    if adapted.config:
        tree = json_harmed(random, adapted.config, _ADAPTER_WORDS)
        metadata["adapter_config"] = dumped(random, tree).decode("utf-8", "replace")
    elif "lora_adapter_metadata" in metadata:
        tree = json_harmed(
            random, json.loads(metadata["lora_adapter_metadata"]), ("unet.r", "transformer.rank_pattern", "r")
        )
        metadata["lora_adapter_metadata"] = dumped(random, tree).decode("utf-8", "replace")
    else:
        key = random.choice(
            ("ss_base_model_version", "ss_network_args", "ss_v2", "adapter_config", "lora_adapter_metadata")
        )
        metadata[key] = random.choice((text_harmed(random, metadata.get(key, "{}")), json.dumps(value(random))))
    weights = Weights(adapted.weights.tensors, {k: v.encode("utf-8", "replace").decode() for k, v in metadata.items()})
    return _single(random, adapted, weights.file())


def _single(random: Random, adapted: Adapted, content: bytes) -> Sample:
    words: dict[str, Any] = {
        "models": ["a.safetensors"],
        "do": random.choice(("merge", "merge", "merge", "plan", "inspect", "verify")),
    }
    if random.random() < 0.8:
        words["base"] = adapted.base
        words["as"] = random.choice(("model", "adapter"))
    if random.random() < 0.05:
        words["lora_alpha"] = 3
    if random.random() < 0.15:
        words["method"] = random.choice(_METHODS)
    if words.get("as") != "model" and random.random() < 0.2:
        words["format"] = random.choice(("peft", "kohya", "diffusers"))
    return Sample({"a.safetensors": content}, {}, words)


def _make_lycoris(random: Random, corpus: Corpus) -> Sample:
    """Files of LyCORIS with tensors of odd shapes, and parts of one method beside another's."""
    adapted = random.choice(corpus.diffusion)
    names = [name for other in random.sample(corpus.diffusion, 2) for name in other.weights.tensors]
    leaves = (
        "lora_down.weight", "lora_mid.weight", "alpha", "dora_scale", "diff", "diff_b", "w_norm", "set_weight",
        "on_input", "oft_blocks", "rescale", "a1.weight", "b2.weight", "lokr_t2", "hada_t1", "scalar",
    )  # fmt: skip
    stem = next(iter(adapted.weights.tensors)).partition(".")[0]
    weights = harmed(random, adapted.weights, [*names, *(f"{stem}.{leaf}" for leaf in leaves)])
    return _single(random, adapted, weights.file())


def _make_names(random: Random, corpus: Corpus) -> Sample:
    """LoRA of diffusion models: module names that are nearly those of the base, in the styles of all programs."""
    adapted = random.choice(corpus.diffusion)
    other = random.choice(corpus.diffusion)
    swaps = (
        ("lora_unet_", "lora_te_"), ("lora_unet_", "lycoris_"), ("lora_unet_", "lora_transformer_"),
        ("unet.", "transformer."), ("lora_te1_", "lora_te2_"), (".lora_down.", ".lora_A."),
        (".lora_up.", ".lora_B."), ("diffusion_model.", "unet."), ("attn1", "attn2"), ("_0_", "_1_"),
        (".0.", ".00."), ("down_blocks", "input_blocks"), ("mid_block", "middle_block"), ("to_q", "to_k"),
        ("to_q", "qkv"), (".weight", ""), ("lora_A", "lora_A.default"),
        (".lora_down.weight", ".processor.to_q_lora.down.weight"), ("single_transformer_blocks", "single_blocks"),
        ("transformer_blocks", "double_blocks"), (".alpha", ".alpha.alpha"),
    )  # fmt: skip
    tensors = dict(adapted.weights.tensors)
    for old, new in random.sample(swaps, random.choice((1, 2, 4))):
        chosen = set(random.sample(list(tensors), random.choice((1, len(tensors))))) if tensors else set()
        tensors = {name.replace(old, new) if name in chosen else name: held for name, held in tensors.items()}
    if random.random() < 0.3:
        tensors |= other.weights.tensors
    weights = Weights(tensors, adapted.weights.metadata)
    if random.random() < 0.4:
        weights = harmed(random, weights, list(other.weights.tensors))
    return _single(random, random.choice((adapted, other)), weights.file())


def _make_pack(random: Random, corpus: Corpus) -> Sample:
    """Packs: what their header says is harmed, or the bytes that it is said of."""
    adapted = random.choice(corpus.packs)
    weights = Weights(dict(adapted.weights.tensors), dict(adapted.weights.metadata))
    kind = random.randrange(6)
    if kind < 3:
        tree = json_harmed(
            random, json.loads(weights.metadata["merging_pack"]), ("k", "bits", "coding", "shape", "kind")
        )
        weights.metadata["merging_pack"] = dumped(random, tree).decode("utf-8", "replace")
    elif kind < 5:
        name = random.choice(list(weights.tensors))
        data = bytes_harmed(random, weights.tensors[name][2])
        weights.tensors[name] = "U8", (len(data),), data
    else:
        weights = harmed(random, weights)
    return _single(random, adapted, weights.file())


# --- configs, tokenizers, pipelines


_CONFIG_WORDS = (
    "architectures", "model_type", "tie_word_embeddings", "text_config", "quantization_config", "num_hidden_layers",
    "vocab_size", "hidden_size", "dtype", "torch_dtype", "auto_map", "num_attention_heads", "quant_method",
    "num_layers", "LlamaForCausalLM", "_name_or_path", "head_dim", "layer_types", "rope_scaling", "rope_parameters",
    "encoder", "decoder", "weight_block_size",
)  # fmt: skip


def _folder(random: Random, state: dict[str, Any], name: str, config: bytes) -> dict[str, bytes]:
    return {f"{name}/model.safetensors": safetensors.torch.save(state), f"{name}/config.json": config}


def _make_model_config(random: Random, corpus: Corpus) -> Sample:
    state = model(layers=2, width=4, vocab=6)
    if random.random() < 0.3:
        del state["lm_head.weight"]
    good = corpus.configs["tiny"]
    bad = dumped(random, json_harmed(random, good, _CONFIG_WORDS))
    if random.random() < 0.1:
        bad = bytes_harmed(random, bad)
    files = _folder(random, fine_tune(state, 1), "a", bad) | _folder(
        random, fine_tune(state, 2), "b", dumped(random, good)
    )
    words: dict[str, Any] = {"models": ["a", "b"], "do": random.choice(("plan", "merge", "merge", "inspect", "verify"))}
    if random.random() < 0.2:
        words["method"] = "lines+linear"
    if random.random() < 0.2:
        words["dequantise"] = True
    return Sample(files, {}, words)


_TOKENIZER = {
    "version": "1.0",
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3}, "merges": ["a b"]},
    "added_tokens": [{"id": 4, "content": "<s>", "special": True}, {"id": 5, "content": "</s>"}],
}


def _make_tokenizer(random: Random, corpus: Corpus) -> Sample:
    """Models of different vocabularies, matched by row or by token."""
    config = dumped(random, corpus.configs["tiny"])
    files: dict[str, bytes] = {}
    for name, rows in (("a", 6), ("b", 8)):
        files |= _folder(random, model(layers=1, width=4, vocab=rows), name, config)
    kinds: dict[str, tuple[str, Any]] = {
        "tokenizer.json": ("tree", _TOKENIZER),
        "vocab.json": ("tree", {"a": 0, "b": 1, "c": 2}),
        "added_tokens.json": ("tree", {"<s>": 3, "</s>": 4}),
        "tokenizer_config.json": (
            "tree",
            {"model_max_length": 10**30, "added_tokens_decoder": {"4": {"content": "<s>"}}},
        ),
        "vocab.txt": ("text", "a\nb\nc\n"),
    }
    unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}
    for name in random.choice(
        (["tokenizer.json"], ["vocab.json", "added_tokens.json"], ["vocab.txt", "added_tokens.json"], list(kinds))
    ):
        kind, content = kinds[name]
        if name == "tokenizer.json" and random.random() < 0.3:
            content = unigram
        if kind == "tree":
            text = dumped(
                random, json_harmed(random, content, ("vocab", "model", "added_tokens", "id", "content", "merges"))
            )
        else:
            text = bytes_harmed(random, text_harmed(random, content).encode("utf-8", "surrogatepass"))
        for folder in random.choice((["a"], ["b"], ["a", "b"])):
            files[f"{folder}/{name}"] = text
    words: dict[str, Any] = {"models": ["a", "b"], "do": random.choice(("plan", "merge"))}
    if random.random() < 0.5:
        words["vocabulary"] = random.choice(("base", "largest"))
    else:
        named = {"source": "union", "tokens": {"c": {"source": {"kind": "zero"}}}, "pad_to_multiple_of": 8}
        words["tokenizer"] = random.choice(("union", "base", named))
    return Sample(files, {}, words)


def _make_pipeline(random: Random, corpus: Corpus) -> Sample:
    """A folder of diffusers, or of sentence-transformers, whose list of components is harmed."""
    files: dict[str, bytes] = {}
    parts = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
    listed: Any = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30", "vae": [None, None]}
    listed |= {name: ["diffusers", cls] for name, cls in parts.items()} | {"scheduler": ["diffusers", "DDIMScheduler"]}
    modules: Any = [
        {"idx": 0, "name": "0", "path": "", "type": "x"},
        {"idx": 1, "name": "1", "path": "unet", "type": "y"},
    ]
    tensors = {"conv_in.weight": torch.ones(2, 2, 1, 1), "conv_in.bias": torch.ones(2)}
    for name, cls in parts.items():
        files[f"p/{name}/config.json"] = json.dumps({"_class_name": cls}).encode()
        stem = "diffusion_pytorch_model" if name == "unet" else "model"
        files[f"p/{name}/{stem}.safetensors"] = safetensors.torch.save(tensors)
    files["p/scheduler/scheduler_config.json"] = b"{}"
    pipeline = random.random() < 0.7
    name, tree = ("p/model_index.json", listed) if pipeline else ("p/modules.json", modules)
    if not pipeline:
        files["p/model.safetensors"] = safetensors.torch.save({"w.weight": torch.ones(2, 2)})
        files["p/config.json"] = b'{"model_type": "bert"}'
    words = (*parts, "../p", "..", ".", "/", "p", "unet/../unet", "unet/", "path", "", "scheduler")
    text = dumped(random, json_harmed(random, tree, words))
    files[name] = bytes_harmed(random, text) if random.random() < 0.1 else text
    links: dict[str, str] = {}
    if random.random() < 0.1:
        links["p/" + random.choice(("vae", "safety_checker", "tokenizer"))] = random.choice(
            ("unet", "..", "/etc", "vae")
        )
    told = {"models": ["p"], "do": random.choice(("plan", "merge", "merge", "inspect", "verify"))}
    if random.random() < 0.2:
        told["components"] = [random.choice(("unet", "vae", "", "..", "scheduler"))]
    return Sample(files, links, told)


def _make_loading(random: Random, corpus: Corpus) -> Sample:
    """A base whose config says nonsense, and an adapter whose names transformers has to explain."""
    adapted = random.choice([each for each in corpus.peft if each.base == "llama"])
    config = json_harmed(random, corpus.configs["llama"], _CONFIG_WORDS)
    weights = Weights({k.replace("layers.", "blocks."): v for k, v in adapted.weights.tensors.items()})
    if random.random() < 0.5:
        weights = harmed(random, adapted.weights)
    files = {
        "a/adapter_model.safetensors": weights.file(),
        "a/adapter_config.json": json.dumps(adapted.config).encode(),
        "base/config.json": dumped(random, config),
        "base/model.safetensors": (corpus.folder / "llama" / "model.safetensors").read_bytes(),
    }
    return Sample(files, {}, {"models": ["a"], "own_base": "base", "as": "model", "do": "plan"})


# --- what is done with models


def _read_models(folder: Path, words: dict[str, Any], corpus: Corpus) -> None:
    """Plan, merge, look at or verify what lies in the folder."""
    paths = [folder / name for name in words["models"]]
    if words["do"] == "inspect":
        inspect(str(paths[0]), values=True)
        return
    if words["do"] == "verify":
        from merging.serving import verify

        verify(str(paths[0]), values=True)
        return
    chosen = {
        key: words[key]
        for key in ("as", "lora_alpha", "format", "vocabulary", "tokenizer", "components", "dequantise")
        if key in words
    }
    if "base" in words:
        chosen["base"] = str(corpus.folder / words["base"])
    if "own_base" in words:
        chosen["base"] = str(folder / words["own_base"])
    method = words.get("method", "linear")
    recipe = make_recipe({"models": [str(path) for path in paths], "method": method, **chosen})
    single = words["models"][0].endswith(".safetensors") and chosen.get("as") != "model"
    destination = folder / "out" / ("merged.safetensors" if single else "merged")
    plan = plan_for(recipe, destination)
    (folder / "out").mkdir()
    check_output(plan, destination, False)
    if words["do"] == "merge":
        try:
            merge_plan(plan, destination, threads=1)
        except MergingError:
            assert not list((folder / "out").iterdir()), "a merge that failed left something behind"
            raise
        open_model(destination)  # what we write, we read


def read_valid(corpus: Corpus) -> None:
    """Read what the inputs are made of, unharmed; also so that everything is imported before processes are forked.

    All of it must be taken, or the harm would be done to what is refused anyway.
    """
    for adapted in (*corpus.peft, *corpus.diffusion, *corpus.packs):
        with TemporaryDirectory() as scratch:
            name = "a" if adapted.config else "a.safetensors"
            config = json.dumps(adapted.config).encode() if adapted.config else None
            sample = _adapter(Random(0), adapted, config, adapted.weights.file())
            if config is None:
                sample.files = {name: adapted.weights.file()}
            sample.write(Path(scratch))
            words = {"models": [name], "do": "merge", "base": adapted.base, "as": "model"}
            _read_models(Path(scratch), words, corpus)


TARGETS = {
    "header": Target(26, _make_header, _read_header),
    "index": Target(8, _make_index, _read_models),
    "adapter config": Target(12, _make_config, _read_models),
    "adapter tensors": Target(12, _make_factors, _read_models),
    "metadata": Target(4, _make_metadata, _read_models),
    "LyCORIS": Target(7, _make_lycoris, _read_models),
    "names": Target(5, _make_names, _read_models),
    "pack": Target(4, _make_pack, _read_models),
    "pickle": Target(5, make_pickle, _read_models),
    "address": Target(5, make_address, read_address),
    "query": Target(3, make_query, read_query),
    "recipe": Target(5, make_recipe_text, read_recipe),
    "model config": Target(4, _make_model_config, _read_models),
    "tokenizer": Target(3, _make_tokenizer, _read_models),
    "pipeline": Target(3, _make_pipeline, _read_models),
    "loading": Target(1, _make_loading, _read_models),
}
"""By name; shares are parts of the sum of all."""
