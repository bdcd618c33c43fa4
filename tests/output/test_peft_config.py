"""PEFT's config, which one function writes for every output."""

from __future__ import annotations

import peft

from merging.output.peft_config import NO_VARIANTS, SAVED, lora_config


def test_fields_come_in_the_order_of_files_whatever_the_order_they_are_given_in() -> None:
    config = lora_config(rank=4, target_modules=["v", "q"], **SAVED, revision=None, lora_bias=True, **NO_VARIANTS)
    assert list(config) == [
        "peft_type", "auto_mapping", "revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias",
        "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern", "target_modules",
        "modules_to_save", "lora_bias",
    ]  # fmt: skip
    assert config["r"] == config["lora_alpha"] == 4
    assert config["target_modules"] == ["q", "v"]


def test_peft_reads_it_as_a_plain_lora() -> None:
    fields = lora_config(rank=4, target_modules=["q"], **NO_VARIANTS, **SAVED)
    read = peft.LoraConfig(**{name: value for name, value in fields.items() if name != "peft_type"})
    for name, value in NO_VARIANTS.items():
        assert getattr(read, name) == value
