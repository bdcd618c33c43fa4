"""Vocabularies of any architecture are merged by token: every table and every vector with an entry for each token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

import merging
from support.tokenized import tokenizer_of, tokens_of_file

pytestmark = pytest.mark.exhaustive

IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
SEQUENCES = {
    **{f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")},
    "d_model": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
ARCHITECTURES = {
    "BartForConditionalGeneration": ("BartConfig", SEQUENCES | {"max_position_embeddings": 32}),
    "BertForMaskedLM": ("BertConfig", BERT),
    "CLIPTextModel": ("CLIPTextConfig", BERT),
    "GPT2LMHeadModel": ("GPT2Config", GPT),
    "GPTJForCausalLM": ("GPTJConfig", GPT | {"rotary_dim": 4}),
    "Gemma2ForCausalLM": ("Gemma2Config", BERT | {"num_key_value_heads": 1, "head_dim": 8}),
    "RobertaForMaskedLM": ("RobertaConfig", BERT),
    "T5ForConditionalGeneration": ("T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        SEQUENCES | {"decoder_start_token_id": 0, "suppress_tokens": [], "begin_suppress_tokens": []},
    ),
}


def save(architecture: str, folder: Path, name: str) -> None:
    tokenizer = tokenizer_of("bytes", name, [f"<|{name}|>"])
    config, sizes = ARCHITECTURES[architecture]
    torch.manual_seed(ord(name))
    made = getattr(transformers, config)(vocab_size=len(tokenizer), **sizes, **IDS)
    model: PreTrainedModel = getattr(transformers, architecture)(made)
    for values in model.parameters():
        torch.nn.init.normal_(values)  # biases too
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_table_is_merged_by_token(architecture: str, tmp_path: Path) -> None:
    for name in "ab":
        save(architecture, tmp_path / name, name)
    out = tmp_path / "out"
    merging.merge([tmp_path / "a", tmp_path / "b"], method="linear", tokenizer="union", output=out)
    model, loading = getattr(transformers, architecture).from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    rows = [tokens_of_file(folder) for folder in (tmp_path / "a", tmp_path / "b", out)]
    a, b, got = (load_file(folder / "model.safetensors") for folder in (tmp_path / "a", tmp_path / "b", out))
    tables = [name for name, values in got.items() if len(rows[2]) in values.shape]
    assert tables
    for name in tables:
        one, two, merged = (tensors[name].squeeze() for tensors in (a, b, got))
        for token, row in rows[2].items():
            found = [values[own[token]] for values, own in ((one, rows[0]), (two, rows[1])) if token in own]
            torch.testing.assert_close(merged[row], sum(found) / len(found))
    assert model.config.vocab_size == len(rows[2])
