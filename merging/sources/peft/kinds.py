"""The types of PEFT adapters that are read: how each is told, and what its modules change.

A new type is a function from a :class:`~merging.sources.peft.module.Module` to changes, and an entry in ``KINDS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from merging.sources.adapter import Change
from merging.sources.peft.config import Config
from merging.sources.peft.dense import c3a, fourierft, osf, randlora, shira, waveft
from merging.sources.peft.factored import adalora, delora, gralora, hra, miss, vblora, vera
from merging.sources.peft.lora import LORA_LEAVES, check_lora, lora_changes
from merging.sources.peft.lycoris import loha, lokr
from merging.sources.peft.module import Module
from merging.sources.peft.replaced import ln_tuning
from merging.sources.peft.rotations import boft, oft, road
from merging.sources.peft.scalings import hira, ia3
from merging.sources.peft.tokens import trainable_tokens

__all__ = ["KINDS", "Kind"]


def _nothing(config: Config) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of adapter.

    ``leaves`` are the names of its tensors behind the path of their module, without ``.weight``; those of them that are
    ``shared`` may stand once for all modules. ``changes`` makes of a module what it changes, ``check`` refuses configs
    that cannot be followed. ``kept``: as factors or in full; ``base``: whether the base is needed to tell the change.
    """

    summary: str
    kept: Literal["factors", "full"]
    base: str
    leaves: tuple[str, ...]
    changes: Callable[[Module], Sequence[Change]]
    check: Callable[[Config], None] = _nothing
    shared: tuple[str, ...] = ()

    @property
    def leaf(self) -> re.Pattern[str]:
        """What a tensor's name ends in: a leaf, and behind it ``.weight``, ``.bias`` or nothing."""
        return re.compile(rf"(?:^|\.)({'|'.join(map(re.escape, self.leaves))})(\.weight|\.bias)?$")


_LOHA = tuple(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
_LOKR = tuple(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
_VERA = ("vera_A", "vera_B")
_BANK = ("vblora_vector_bank",)
_BASES = ("randlora_A", "randlora_B")
_LOGITS = tuple(f"vblora_logits_{side}{rest}" for side in "AB" for rest in ("", "_topk_indices", "_topk_weights"))
_GRALORA = ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general")
_DELORA = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_HIRA = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
_OSF = tuple(f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low"))
_FACTORS = "low-rank factors, with rsLoRA, lora_bias, DoRA, PiSSA, OLoRA, KaSA and BD-LoRA"

KINDS: dict[str, Kind] = {
    "LORA": Kind(_FACTORS, "factors", "DoRA, PiSSA, OLoRA, KaSA", LORA_LEAVES, lora_changes, check_lora),
    "ADALORA": Kind(
        "LoRA with a rank of its own in every module", "factors", "no", ("lora_A", "lora_B", "lora_E"), adalora
    ),
    "BOFT": Kind("inputs turned in blocks, outputs scaled", "full", "yes", ("boft_R", "boft_s"), boft),
    "C3A": Kind("circulant blocks", "full", "no", ("c3a_kernel",), c3a),
    "DELORA": Kind("LoRA of normed rows and columns", "factors", "no", _DELORA, delora),
    "FOURIERFT": Kind("few entries of a spectrum", "full", "yes", ("fourierft_spectrum",), fourierft),
    "GRALORA": Kind("a LoRA for every block of the matrix", "factors", "no", _GRALORA, gralora),
    "HIRA": Kind("the weight times a low-rank matrix, entry by entry", "full", "yes", _HIRA, hira),
    "HRA": Kind("the weight reflected at few hyperplanes", "factors", "yes", ("hra_u",), hra),
    "IA3": Kind("outputs or inputs scaled", "full", "yes", ("ia3_l",), ia3),
    "LN_TUNING": Kind("norms, saved in full", "full", "yes", ("ln_tuning_layers",), ln_tuning),
    "LOHA": Kind("the entrywise product of two low-rank matrices", "full", "no", _LOHA, loha),
    "LOKR": Kind("a Kronecker product", "full", "no", _LOKR, lokr),
    "MISS": Kind(
        "one block added all along the inputs (Bone before)", "factors", "yes", ("miss_block", "bone_block"), miss
    ),
    "OFT": Kind("inputs turned in blocks", "full", "yes", ("oft_R", "oft_embedding_R"), oft),
    "OSF": Kind("the smallest singular directions, trained", "full", "yes", _OSF, osf),
    "RANDLORA": Kind(
        "random bases, scaled", "full", "yes", ("randlora_lambda", "randlora_gamma", *_BASES), randlora, shared=_BASES
    ),
    "ROAD": Kind("pairs of outputs turned and scaled", "full", "yes", ("road_theta", "road_alpha"), road),
    "SHIRA": Kind("single entries of the weight", "full", "yes", ("shira_weight", "shira_indices"), shira),
    "TRAINABLE_TOKENS": Kind("rows of embeddings", "factors", "yes", ("trainable_tokens_delta",), trainable_tokens),
    "VBLORA": Kind("LoRA mixed from a bank of vectors", "factors", "no", (*_LOGITS, *_BANK), vblora, shared=_BANK),
    "VERA": Kind(
        "shared random projections, scaled",
        "factors",
        "yes",
        ("vera_lambda_b", "vera_lambda_d", *_VERA),
        vera,
        shared=_VERA,
    ),
    "WAVEFT": Kind("few wavelet coefficients (Haar)", "full", "yes", ("waveft_spectrum",), waveft),
}
"""By PEFT's name of the type."""

KINDS["BONE"] = KINDS["MISS"]
