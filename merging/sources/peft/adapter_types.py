"""The types of PEFT adapters that are read: how each is recognised, and the changes of its modules.

A new type is a function from a :class:`~merging.sources.peft.module.Module` to changes, and an entry in ``PEFT_TYPES``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from merging.sources.changes import Change
from merging.sources.peft.config import Config
from merging.sources.peft.dense import c3a, fourierft, osf, randlora, shira, waveft
from merging.sources.peft.factored import adalora, delora, gralora, hra, miss, vblora, vera
from merging.sources.peft.lora import LORA_LEAVES, check_lora, lora_changes
from merging.sources.peft.lycoris import loha, lokr
from merging.sources.peft.module import Module
from merging.sources.peft.norms import ln_tuning
from merging.sources.peft.rotations import boft, oft, road
from merging.sources.peft.scalings import hira, ia3
from merging.sources.peft.trainable_tokens import trainable_tokens

__all__ = ["PEFT_TYPES", "PeftType"]


def _nothing(config: Config) -> None:
    pass


BaseNeed = Literal["no", "some", "sizes", "yes"]
"""Whether the base is needed to compute the change: never, for some variants, for its tensors' sizes, always."""


@dataclass(frozen=True, slots=True)
class PeftType:
    """One type of adapter.

    Attributes:
        summary: The type in a few words.
        kept: How changes are held: as factors or in full.
        base: Whether the base is needed to compute the change.
        changes: The function from a module to its changes.
        leaves: The names of its tensors after the path of their module, without ``.weight``.
        shared: The names of ``leaves`` that may occur once for all modules.
        check: A function that refuses configs that cannot be followed.
        alpha: The config's field for the number that ``--lora-alpha`` replaces.
    """

    summary: str
    kept: Literal["factors", "full"]
    base: BaseNeed
    changes: Callable[[Module], Sequence[Change]]
    leaves: tuple[str, ...]
    shared: tuple[str, ...] = ()
    check: Callable[[Config], None] = _nothing
    alpha: str = ""

    @property
    def leaf(self) -> re.Pattern[str]:
        """The end of a tensor's name: a leaf, followed by ``.weight``, ``.bias`` or nothing."""
        return re.compile(rf"(?:^|\.)({'|'.join(map(re.escape, self.leaves))})(\.weight|\.bias)?$")


def _leaves(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}" for name in names)


_VERA = _leaves("vera_", "A", "B")
_BANK = ("vblora_vector_bank",)
_BASES = _leaves("randlora_", "A", "B")
_MIXTURES = _leaves(
    "vblora_logits_", *(f"{side}{rest}" for side in "AB" for rest in ("", "_topk_indices", "_topk_weights"))
)

PEFT_TYPES: dict[str, PeftType] = {
    "LORA": PeftType(
        "low-rank factors, also of experts and with tokens; rsLoRA, DoRA, PiSSA, OLoRA, KaSA, BD-LoRA",
        "factors",
        "some",
        lora_changes,
        LORA_LEAVES,
        check=check_lora,
        alpha="lora_alpha",
    ),
    "ADALORA": PeftType(
        "low-rank factors, pruned to a rank of their own in every module",
        "factors",
        "no",
        adalora,
        _leaves("lora_", "A", "B", "E"),
        alpha="lora_alpha",
    ),
    "BOFT": PeftType("inputs turned in blocks, outputs scaled", "full", "yes", boft, _leaves("boft_", "R", "s")),
    "C3A": PeftType("circulant blocks", "full", "no", c3a, ("c3a_kernel",)),
    "DELORA": PeftType(
        "low-rank factors of normed rows and columns",
        "factors",
        "no",
        delora,
        _leaves("delora_", "A", "B", "lambda", "w_norm"),
    ),
    "FOURIERFT": PeftType("a few entries of a spectrum", "full", "sizes", fourierft, ("fourierft_spectrum",)),
    "GRALORA": PeftType(
        "low-rank factors of every block of the matrix",
        "factors",
        "no",
        gralora,
        _leaves("gralora_", "A", "B", "A_general", "B_general"),
        alpha="alpha",
    ),
    "HIRA": PeftType(
        "the weight times a low-rank matrix, entry by entry",
        "full",
        "yes",
        hira,
        _leaves("hira_", "A", "B", "embedding_A", "embedding_B"),
    ),
    "HRA": PeftType("the weight reflected at a few hyperplanes", "factors", "yes", hra, ("hra_u",)),
    "IA3": PeftType("outputs or inputs scaled", "full", "yes", ia3, ("ia3_l",)),
    "LN_TUNING": PeftType("norms, saved in full", "full", "yes", ln_tuning, ("ln_tuning_layers",)),
    "LOHA": PeftType(
        "the product of two low-rank matrices, entry by entry",
        "full",
        "no",
        loha,
        _leaves("hada_", "w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
        alpha="alpha",
    ),
    "LOKR": PeftType(
        "the Kronecker product of two small matrices",
        "full",
        "no",
        lokr,
        _leaves("lokr_", "w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
        alpha="alpha",
    ),
    "MISS": PeftType(
        "one block added all along the inputs; Bone, its older name",
        "factors",
        "sizes",
        miss,
        ("miss_block", "bone_block"),
    ),
    "OFT": PeftType("inputs turned in blocks", "full", "yes", oft, _leaves("oft_", "R", "embedding_R")),
    "OSF": PeftType(
        "the smallest singular directions, trained",
        "full",
        "yes",
        osf,
        _leaves("osf_svd_params.", "U_low", "S_low", "V_low"),
    ),
    "RANDLORA": PeftType(
        "a sum of random bases, scaled",
        "full",
        "sizes",
        randlora,
        (*_leaves("randlora_", "lambda", "gamma"), *_BASES),
        shared=_BASES,
        alpha="randlora_alpha",
    ),
    "ROAD": PeftType("pairs of outputs turned and scaled", "full", "yes", road, _leaves("road_", "theta", "alpha")),
    "SHIRA": PeftType("single entries of the weight", "full", "sizes", shira, _leaves("shira_", "weight", "indices")),
    "TRAINABLE_TOKENS": PeftType("rows of embeddings", "full", "yes", trainable_tokens, ("trainable_tokens_delta",)),
    "VBLORA": PeftType(
        "low-rank factors mixed from a bank of vectors", "factors", "no", vblora, (*_MIXTURES, *_BANK), shared=_BANK
    ),
    "VERA": PeftType(
        "shared random factors, scaled",
        "factors",
        "sizes",
        vera,
        (*_leaves("vera_lambda_", "b", "d"), *_VERA),
        shared=_VERA,
    ),
    "WAVEFT": PeftType("a few wavelet coefficients (Haar)", "full", "sizes", waveft, ("waveft_spectrum",)),
}
"""The types, by PEFT's names."""

PEFT_TYPES["BONE"] = PEFT_TYPES["MISS"]
