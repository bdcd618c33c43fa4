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


Base = Literal["no", "some", "sizes", "yes"]
"""Whether the base is needed to tell the change: never, by some variants, for the sizes of its tensors, always."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of adapter.

    ``leaves`` are the names of its tensors behind the path of their module, without ``.weight``; those of them that are
    ``shared`` may stand once for all modules. ``changes`` makes of a module what it changes, ``check`` refuses configs
    that cannot be followed. ``kept`` says how changes are held: as factors or in full; ``alpha`` is the config's field
    for the number that ``--lora-alpha`` replaces.
    """

    summary: str
    kept: Literal["factors", "full"]
    base: Base
    changes: Callable[[Module], Sequence[Change]]
    leaves: tuple[str, ...]
    shared: tuple[str, ...] = ()
    check: Callable[[Config], None] = _nothing
    alpha: str = ""

    @property
    def leaf(self) -> re.Pattern[str]:
        """What a tensor's name ends in: a leaf, and behind it ``.weight``, ``.bias`` or nothing."""
        return re.compile(rf"(?:^|\.)({'|'.join(map(re.escape, self.leaves))})(\.weight|\.bias)?$")


def _leaves(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}" for name in names)


_VERA = _leaves("vera_", "A", "B")
_BANK = ("vblora_vector_bank",)
_BASES = _leaves("randlora_", "A", "B")
_MIXTURES = _leaves(
    "vblora_logits_", *(f"{side}{rest}" for side in "AB" for rest in ("", "_topk_indices", "_topk_weights"))
)

KINDS: dict[str, Kind] = {
    "LORA": Kind(
        "low-rank factors, also of experts and with tokens; rsLoRA, DoRA, PiSSA, OLoRA, KaSA, BD-LoRA",
        "factors",
        "some",
        lora_changes,
        LORA_LEAVES,
        check=check_lora,
        alpha="lora_alpha",
    ),
    "ADALORA": Kind(
        "low-rank factors, pruned to a rank of their own in every module",
        "factors",
        "no",
        adalora,
        _leaves("lora_", "A", "B", "E"),
        alpha="lora_alpha",
    ),
    "BOFT": Kind("inputs turned in blocks, outputs scaled", "full", "yes", boft, _leaves("boft_", "R", "s")),
    "C3A": Kind("circulant blocks", "full", "no", c3a, ("c3a_kernel",)),
    "DELORA": Kind(
        "low-rank factors of normed rows and columns",
        "factors",
        "no",
        delora,
        _leaves("delora_", "A", "B", "lambda", "w_norm"),
    ),
    "FOURIERFT": Kind("a few entries of a spectrum", "full", "sizes", fourierft, ("fourierft_spectrum",)),
    "GRALORA": Kind(
        "low-rank factors of every block of the matrix",
        "factors",
        "no",
        gralora,
        _leaves("gralora_", "A", "B", "A_general", "B_general"),
        alpha="alpha",
    ),
    "HIRA": Kind(
        "the weight times a low-rank matrix, entry by entry",
        "full",
        "yes",
        hira,
        _leaves("hira_", "A", "B", "embedding_A", "embedding_B"),
    ),
    "HRA": Kind("the weight reflected at a few hyperplanes", "factors", "yes", hra, ("hra_u",)),
    "IA3": Kind("outputs or inputs scaled", "full", "yes", ia3, ("ia3_l",)),
    "LN_TUNING": Kind("norms, saved in full", "full", "yes", ln_tuning, ("ln_tuning_layers",)),
    "LOHA": Kind(
        "the product of two low-rank matrices, entry by entry",
        "full",
        "no",
        loha,
        _leaves("hada_", "w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
        alpha="alpha",
    ),
    "LOKR": Kind(
        "the Kronecker product of two small matrices",
        "full",
        "no",
        lokr,
        _leaves("lokr_", "w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
        alpha="alpha",
    ),
    "MISS": Kind(
        "one block added all along the inputs; Bone, its older name",
        "factors",
        "sizes",
        miss,
        ("miss_block", "bone_block"),
    ),
    "OFT": Kind("inputs turned in blocks", "full", "yes", oft, _leaves("oft_", "R", "embedding_R")),
    "OSF": Kind(
        "the smallest singular directions, trained",
        "full",
        "yes",
        osf,
        _leaves("osf_svd_params.", "U_low", "S_low", "V_low"),
    ),
    "RANDLORA": Kind(
        "a sum of random bases, scaled",
        "full",
        "sizes",
        randlora,
        (*_leaves("randlora_", "lambda", "gamma"), *_BASES),
        shared=_BASES,
        alpha="randlora_alpha",
    ),
    "ROAD": Kind("pairs of outputs turned and scaled", "full", "yes", road, _leaves("road_", "theta", "alpha")),
    "SHIRA": Kind("single entries of the weight", "full", "sizes", shira, _leaves("shira_", "weight", "indices")),
    "TRAINABLE_TOKENS": Kind("rows of embeddings", "full", "yes", trainable_tokens, ("trainable_tokens_delta",)),
    "VBLORA": Kind(
        "low-rank factors mixed from a bank of vectors", "factors", "no", vblora, (*_MIXTURES, *_BANK), shared=_BANK
    ),
    "VERA": Kind(
        "shared random factors, scaled",
        "factors",
        "sizes",
        vera,
        (*_leaves("vera_lambda_", "b", "d"), *_VERA),
        shared=_VERA,
    ),
    "WAVEFT": Kind("a few wavelet coefficients (Haar)", "full", "sizes", waveft, ("waveft_spectrum",)),
}
"""By PEFT's name of the type."""

KINDS["BONE"] = KINDS["MISS"]
