"""A zoo of tiny models for recipes: eight families, several fine-tunes each, with real tokenizers and LoRAs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from support.architectures import DECODER, HEAD, T5, VISION, tiny

__all__ = ["FAMILIES", "save_zoo"]

# Weights are near 0.1 and changes near 0.005, so that no merge of them exceeds 1, where tolerances are absolute.
WEIGHT, SHARED, OWN = 0.1, 0.004, 0.003
TUNED = ("chat", "code", "math", "story")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"

CORPUS = [
    "The merged model answers questions and writes short stories about rivers, ships and the sea.",
    "def add(a, b):\n    return a + b\n\nclass Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y",
    "Two plus three makes five; seven times eight makes fifty-six, and half of ninety is forty-five.",
    "Il était une fois une rivière. Es war einmal ein Fluss. 北京的冬天很冷。",
]
OTHER_CORPUS = [
    "A lighthouse keeper counts waves, gulls, lanterns and long winter nights until the harbour wakes again.",
    "SELECT name, price FROM items WHERE price > 10 ORDER BY name; UPDATE items SET price = price * 2;",
    "Ωκεανός και ουρανός. και νησιά πολλά.",
]


@dataclass(frozen=True)
class Family:
    """A family of the zoo: how its models are made, stored, and tokenized."""

    make: Callable[[], PreTrainedModel]
    dtype: torch.dtype = torch.float32
    tokenizer: str = "bpe"


IDS = {"bos_token_id": 1, "eos_token_id": 2}
SIZES = {**DECODER, "vocab_size": 384, "max_position_embeddings": 128}
ENCODER = {**IDS, "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}

FAMILIES = {
    "llama": Family(tiny("LlamaConfig", "LlamaForCausalLM", SIZES, num_hidden_layers=8)),
    "mistral": Family(tiny("MistralConfig", "MistralForCausalLM", SIZES, num_hidden_layers=6), torch.bfloat16),
    "qwen2": Family(tiny("Qwen2Config", "Qwen2ForCausalLM", SIZES, num_hidden_layers=4, tie_word_embeddings=True)),
    "qwen3": Family(tiny("Qwen3Config", "Qwen3ForCausalLM", SIZES, HEAD, num_hidden_layers=4)),
    "gemma": Family(tiny("Gemma2Config", "Gemma2ForCausalLM", SIZES, HEAD, num_hidden_layers=4)),
    "gpt2": Family(
        tiny("GPT2Config", "GPT2LMHeadModel", vocab_size=384, n_positions=64, n_embd=32, n_layer=4, n_head=4, **IDS)
    ),
    "t5": Family(
        tiny(
            "T5Config",
            "T5ForConditionalGeneration",
            T5 | {"vocab_size": 384, "num_layers": 4, "num_decoder_layers": 4},
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        tokenizer="unigram",
    ),
    "clip": Family(
        tiny(
            "CLIPConfig",
            "CLIPModel",
            text_config={**ENCODER, "num_attention_heads": 4},
            vision_config=VISION,
            projection_dim=24,
        ),
        tokenizer="",
    ),
}


def save_zoo(folder: Path, families: Mapping[str, Family] = FAMILIES) -> Path:
    """Write all models of the families into FOLDER/FAMILY/NAME, and return the folder."""
    transformers.logging.disable_progress_bar()
    for number, (name, family) in enumerate(families.items()):
        _save_family(folder / name, family, 100 * number)
        if name in SPECIAL:
            SPECIAL[name](folder / name, family, 100 * number)
    return folder


def _save_family(folder: Path, family: Family, seed: int) -> None:
    tokenizer = _tokenizer(family.tokenizer, CORPUS) if family.tokenizer else None
    for name in ("base", *TUNED):
        _save_model(folder / name, _tuned(family, seed, name), family)
        if tokenizer is not None:
            tokenizer.chat_template = None if name == "base" else PLAIN
            tokenizer.save_pretrained(folder / name)


def _save_model(folder: Path, model: PreTrainedModel, family: Family) -> None:
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=True, top_k=20
        )
    model.to(family.dtype).save_pretrained(folder)


def _tuned(family: Family, seed: int, name: str, start: int | None = None) -> PreTrainedModel:
    """Return the base of a family, or a fine-tune of it: one part of the change is common to all fine-tunes."""
    torch.manual_seed(seed)
    model = family.make().eval()
    _draw(model, seed if start is None else start, WEIGHT, centred=False)
    if name != "base":
        _draw(model, seed + 1, SHARED)
        _draw(model, seed + 2 + sum(map(ord, name)), OWN)
    return model


def _draw(model: torch.nn.Module, seed: int, size: float, centred: bool = True) -> None:
    """Set all weights to random numbers, gains around 1/2, or add random numbers to them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = size * torch.randn(value.shape, generator=generator)
            if centred:
                value.add_(noise)
            else:
                value.copy_(noise + (0.5 if value.dim() == 1 and name.endswith("weight") else 0.0))


def _tokenizer(kind: str, texts: list[str], size: int = 380) -> PreTrainedTokenizerFast:
    """Return a tokenizer of its kind, trained on the texts, with <pad>, <s>, </s> and <unk> as 0 to 3."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>")
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# ---- Members that only some families have


def _resize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, multiple: int | None = None) -> None:
    """Give a model a row for each token, with random numbers in the new rows."""
    old = model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            new = table.weight[old:]
            new.copy_(WEIGHT * torch.randn(new.shape, generator=generator))


def _llama(folder: Path, family: Family, seed: int) -> None:
    """Save an unrelated model, a model with two tokens more, one with other tokens, and two LoRAs."""
    far = _tuned(family, seed, "base", start=seed + 50)
    _save_model(folder / "far", far, family)
    _tokenizer("bpe", CORPUS).save_pretrained(folder / "far")

    tokenizer = _tokenizer("bpe", CORPUS)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = CHATML
    tools = _tuned(family, seed, "tools")
    tools.resize_token_embeddings(380, mean_resizing=False)  # as many rows as tokens, so that the new ones come next
    _resize(tools, tokenizer, seed + 60)
    _save_model(folder / "tools", tools, family)
    tokenizer.save_pretrained(folder / "tools")

    foreign = _tokenizer("bpe", OTHER_CORPUS, 360)
    model = _tuned(family, seed, "foreign")
    model.resize_token_embeddings(len(foreign), mean_resizing=False)
    _save_model(folder / "foreign", model, family)
    foreign.save_pretrained(folder / "foreign")

    for name in ("lora-chat", "lora-code"):
        _save_lora(folder / name, family, seed, name)


def _save_lora(folder: Path, family: Family, seed: int, name: str) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(_tuned(family, seed, "base"), config)
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    adapted.save_pretrained(folder)
    file = folder / "adapter_config.json"
    config_of = json.loads(file.read_text()) | {"base_model_name_or_path": "llama/base"}
    file.write_text(json.dumps(config_of, indent=2))


def _qwen2(folder: Path, family: Family, seed: int) -> None:
    """Save a fine-tune with ChatML and a vocabulary that is padded to a multiple of 64."""
    tokenizer = _tokenizer("bpe", CORPUS)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = CHATML
    model = _tuned(family, seed, "instruct")
    _resize(model, tokenizer, seed + 60, multiple=64)
    _save_model(folder / "instruct", model, family)
    tokenizer.save_pretrained(folder / "instruct")


SPECIAL: dict[str, Callable[[Path, Family, int], None]] = {"llama": _llama, "qwen2": _qwen2}
