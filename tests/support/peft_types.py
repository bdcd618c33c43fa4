"""Adapters of every type of PEFT that changes weights, as it saves them, and what its own merge makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from transformers import PreTrainedModel

from merging.hub.open_model import open_model
from merging.sources import Adapter
from support.adapters import QUIRKS, State, peft
from support.architectures import build

__all__ = ["CASES", "TYPES", "changes_by_peft", "changes_by_us", "make", "opened"]

peft.tuners.boft.layer.get_fbd_cuda = lambda: None  # it would try to compile a CUDA kernel

TYPES = [
    *QUIRKS,
    # PEFT says what it makes of settings that a type does not know
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),
    # and that its own layers are sparse, odd or none of the usual ones
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    # and takes the names of AdaLoRA's masks for patterns
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys"),
]
"""Warnings of PEFT's about its own types that call for nothing."""

LLAMA = ["q_proj", "k_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj"]
T5 = ["q", "v", "wi", "wo"]
VISION = ["q_proj", "fc1"]
SQUARE = ["q_proj", "o_proj"]

CASES: dict[str, tuple[str, str, list[str], dict[str, Any]]] = {
    # name: architecture, PEFT's config, targets, settings
    "AdaLoRA": ("llama", "AdaLoraConfig", LLAMA, {"init_r": 6, "lora_alpha": 9, "total_step": 10}),
    "AdaLoRA t5": ("t5", "AdaLoraConfig", T5, {"init_r": 3, "total_step": 10}),
    "AdaLoRA Conv1D": ("gpt2", "AdaLoraConfig", GPT2, {"init_r": 3, "total_step": 10, "fan_in_fan_out": True}),
    "AdaLoRA conv2d": ("vit", "AdaLoraConfig", ["projection", "q_proj"], {"init_r": 3, "total_step": 10}),
    "LoHa": ("llama", "LoHaConfig", LLAMA, {"r": 3, "alpha": 6}),
    "LoHa patterns": (
        "llama",
        "LoHaConfig",
        LLAMA,
        {"r": 3, "rank_pattern": {r"layers\.0\..*q_proj": 5}, "alpha_pattern": {"^model.layers.1.mlp.up_proj": 1}},
    ),
    "LoHa conv2d": ("resnet", "LoHaConfig", ["convolution"], {"r": 3}),
    "LoHa conv2d cp": ("resnet", "LoHaConfig", ["convolution"], {"r": 3, "use_effective_conv2d": True}),
    "LoHa conv1d": ("whisper", "LoHaConfig", ["conv1", "conv2", "fc1"], {"r": 3}),
    "LoHa conv1d cp": ("whisper", "LoHaConfig", ["conv1"], {"r": 3, "alpha": 30, "use_effective_conv2d": True}),
    "LoHa grouped": ("convnext", "LoHaConfig", ["dwconv"], {"r": 3}),
    "LoKr": ("llama", "LoKrConfig", LLAMA, {"r": 2, "alpha": 6}),
    "LoKr full": ("llama", "LoKrConfig", LLAMA, {"r": 32, "alpha": 6}),
    "LoKr both": ("clip", "LoKrConfig", VISION, {"r": 1, "decompose_both": True, "decompose_factor": 8}),
    "LoKr conv2d": ("resnet", "LoKrConfig", ["convolution"], {"r": 1, "decompose_factor": 2}),
    "LoKr conv2d cp": ("resnet", "LoKrConfig", ["convolution"], {"r": 1, "use_effective_conv2d": True}),
    "LoKr conv2d full": ("vit", "LoKrConfig", ["projection"], {"r": 32, "alpha": 64}),
    "LoKr conv1d": ("whisper", "LoKrConfig", ["conv1", "conv2"], {"r": 1}),
    "LoKr conv1d full": ("whisper", "LoKrConfig", ["conv1", "conv2"], {"r": 32}),
    "VeRA": ("llama", "VeraConfig", LLAMA, {"r": 5}),
    "VeRA Conv1D": ("gpt2", "VeraConfig", GPT2, {"r": 5, "fan_in_fan_out": True}),
    "RandLoRA": ("llama", "RandLoraConfig", LLAMA, {"r": 5, "randlora_alpha": 7}),
    "RandLoRA sparse": ("t5", "RandLoraConfig", T5, {"r": 4, "sparse": True, "randlora_alpha": 7}),
    "RandLoRA Conv1D": ("gpt2", "RandLoraConfig", GPT2, {"r": 5, "fan_in_fan_out": True}),
    "MiSS": ("llama", "MissConfig", LLAMA, {"r": 5}),
    "MiSS even": ("clip", "MissConfig", VISION, {"r": 4}),
    "MiSS mini": ("llama", "MissConfig", LLAMA, {"r": 8, "mini_r": 4, "init_weights": "mini"}),
    "MiSS bat": ("llama", "MissConfig", LLAMA, {"r": 4, "init_weights": "bat"}),
    "OFT": ("llama", "OFTConfig", LLAMA, {"oft_block_size": 4}),
    "OFT by number": ("t5", "OFTConfig", T5, {"r": 4, "oft_block_size": 0}),
    "OFT exact": ("llama", "OFTConfig", LLAMA, {"oft_block_size": 4, "use_cayley_neumann": False}),
    "OFT three terms": ("llama", "OFTConfig", LLAMA, {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "OFT two terms": ("llama", "OFTConfig", LLAMA, {"oft_block_size": 4, "num_cayley_neumann_terms": 2}),
    "OFT shared": ("clip", "OFTConfig", VISION, {"oft_block_size": 8, "block_share": True}),
    "OFT constrained": ("llama", "OFTConfig", LLAMA, {"oft_block_size": 4, "coft": True, "eps": 0.2}),
    "OFT conv2d": ("vit", "OFTConfig", ["projection"], {"oft_block_size": 4}),
    "OFT embedding": ("bert", "OFTConfig", ["word_embeddings", "query"], {"oft_block_size": 8}),
    "BOFT": ("llama", "BOFTConfig", LLAMA, {"boft_block_size": 4}),
    "BOFT by number": ("t5", "BOFTConfig", T5, {"boft_block_num": 4, "boft_block_size": 0}),
    "BOFT conv2d": ("vit", "BOFTConfig", ["projection"], {"boft_block_size": 4}),
    "HRA": ("llama", "HRAConfig", LLAMA, {"r": 3}),
    "HRA orthogonal": ("llama", "HRAConfig", LLAMA, {"r": 4, "apply_GS": True}),
    "HRA conv2d": ("vit", "HRAConfig", ["projection", "q_proj"], {"r": 4}),
    "IA3": ("llama", "IA3Config", LLAMA, {"feedforward_modules": ["down_proj"]}),
    "IA3 biases": ("whisper", "IA3Config", ["k_proj", "v_proj", "fc2"], {"feedforward_modules": ["fc2"]}),
    "IA3 Conv1D": ("gpt2", "IA3Config", GPT2, {"feedforward_modules": ["c_proj"], "fan_in_fan_out": True}),
    "IA3 conv2d": ("resnet", "IA3Config", ["convolution"], {"feedforward_modules": r".*layers\.0.*"}),
    "IA3 grouped": ("convnext", "IA3Config", ["dwconv"], {"feedforward_modules": ["dwconv"]}),
    "HiRA": ("llama", "HiraConfig", LLAMA, {"r": 3, "rank_pattern": {"q_proj": 5}}),
    "HiRA Conv1D": ("gpt2", "HiraConfig", GPT2, {"r": 3, "fan_in_fan_out": True}),
    "HiRA conv2d": ("resnet", "HiraConfig", ["convolution"], {"r": 3}),
    "HiRA conv1d": ("whisper", "HiraConfig", ["conv1", "conv2"], {"r": 3}),
    "HiRA embedding": ("bert", "HiraConfig", ["word_embeddings", "query"], {"r": 3}),
    "FourierFT": ("llama", "FourierFTConfig", LLAMA, {"n_frequency": 50, "n_frequency_pattern": {"q_proj": 20}}),
    "FourierFT Conv1D": ("gpt2", "FourierFTConfig", GPT2, {"n_frequency": 50, "fan_in_fan_out": True}),
    "WaveFT": ("llama", "WaveFTConfig", LLAMA, {"n_frequency": 300}),
    "WaveFT odd": ("opt", "WaveFTConfig", ["q_proj", "project_in"], {"n_frequency": 100, "random_loc_seed": 3}),
    "WaveFT direct": ("t5", "WaveFTConfig", T5, {"n_frequency": 50, "use_idwt": False}),
    "VB-LoRA": ("llama", "VBLoRAConfig", LLAMA, {"r": 3, "num_vectors": 20, "vector_length": 8, "topk": 3}),
    "VB-LoRA best": (
        "llama",
        "VBLoRAConfig",
        LLAMA,
        {"r": 3, "num_vectors": 20, "vector_length": 8, "save_only_topk_weights": True},
    ),
    "VB-LoRA Conv1D": (
        "gpt2",
        "VBLoRAConfig",
        GPT2,
        {"r": 3, "num_vectors": 300, "vector_length": 8, "fan_in_fan_out": True},
    ),
    "C3A": ("llama", "C3AConfig", LLAMA, {"block_size": 8, "block_size_pattern": {"q_proj": 16}}),
    "DeLoRA": ("llama", "DeloraConfig", LLAMA, {"r": 3, "rank_pattern": {"q_proj": 5}}),
    "SHiRA": ("llama", "ShiraConfig", LLAMA, {"r": 3, "random_seed": 1}),
    "LayerNorm": ("llama", "LNTuningConfig", ["input_layernorm", "norm"], {}),
    "LayerNorm biases": ("bert", "LNTuningConfig", ["LayerNorm"], {}),
    "RoAD 1": ("llama", "RoadConfig", LLAMA, {"group_size": 8}),
    "RoAD 2": ("whisper", "RoadConfig", ["q_proj", "k_proj", "fc1"], {"group_size": 4, "variant": "road_2"}),
    "RoAD 4": ("llama-biases", "RoadConfig", LLAMA, {"group_size": 16, "variant": "road_4"}),
    "GraLoRA": ("llama", "GraloraConfig", LLAMA, {"r": 8, "gralora_k": 4, "alpha": 9}),
    "GraLoRA hybrid": ("llama", "GraloraConfig", LLAMA, {"r": 4, "hybrid_r": 3}),
    "GraLoRA Conv1D": ("gpt2", "GraloraConfig", GPT2, {"r": 4, "hybrid_r": 2, "fan_in_fan_out": True}),
    "OSF": ("llama", "OSFConfig", LLAMA, {"effective_rank": 20, "rank_pattern": {"q_proj": 0.5}}),
    "trainable tokens": ("llama", "TrainableTokensConfig", ["embed_tokens"], {"token_indices": [3, 90, 7]}),
    "KaSA": ("llama", "LoraConfig", LLAMA, {"r": 4, "kasa_config": peft.KasaConfig()}),
    "KaSA rslora": ("t5", "LoraConfig", T5, {"r": 4, "kasa_config": peft.KasaConfig(), "use_rslora": True}),
    "BD-LoRA": (
        "llama",
        "LoraConfig",
        LLAMA,
        {
            "r": 4,
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["down_proj"],
                target_modules_bd_b=["q_proj", "up_proj"],
                nblocks=2,
                match_strict=False,
            ),
        },
    ),
    "VeLoRA": ("llama", "LoraConfig", LLAMA, {"r": 4, "velora_config": {"num_groups": 2}}),
    "MonteCLoRA": ("llama", "LoraConfig", LLAMA, {"r": 4, "monteclora_config": peft.MontecloraConfig()}),
}


def make(folder: Path, case: str, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter of a case as PEFT saves it, every trained number random."""
    architecture, config, targets, settings = CASES[case]
    chosen = getattr(peft, config)(target_modules=targets, **settings)
    model = peft.get_peft_model(build(architecture, 0, dtype), chosen)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.2 * torch.randn(value.shape, generator=random))
    model.save_pretrained(folder)
    return folder


def opened(path: Path) -> Adapter:
    adapter = open_model(path)
    assert isinstance(adapter, Adapter)
    return adapter


def changes_by_peft(folder: Path, base: PreTrainedModel) -> State:
    """What PEFT's merge changes, for every tensor of the model."""
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    return {name: merged[name].double() - before[name].double() for name in before}


def changes_by_us(adapter: Adapter, base: PreTrainedModel, dtype: torch.dtype = torch.float32) -> State:
    """What we read of an adapter, written out, for every tensor of the model."""
    tensors = base.state_dict()
    found = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in tensors.items()}
    for target, change in adapter.changes.items():
        if getattr(change, "optional", False) and target not in tensors:
            continue
        weight = tensors[target]
        assert change.fits(tuple(weight.shape)), target
        delta = change.read(tuple(weight.shape), lambda weight=weight: weight.to(dtype), dtype)
        assert (type(delta).__name__ == "LowRank") == change.low_rank
        for name, value in tensors.items():
            if value.data_ptr() == weight.data_ptr():  # tied to it
                found[name] = delta.dense().double()
    return found
