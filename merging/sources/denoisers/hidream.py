"""HiDream, with the same names everywhere."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark

__all__ = ["HIDREAM"]

_ATTENTION = tuple(
    f"attn1.{part}{stream}"
    for stream in ("", "_t")
    for part in ("to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm")
)
_EXPERTS = tuple(
    f"{part}.w{number}" for part in ("ff_i.shared_experts", "ff_i.experts.{}", "ff_t") for number in (1, 2, 3)
)

HIDREAM = Family(
    name="HiDream",
    marks=(NameMark(names=r"^(?:double|single)_stream_blocks_\d+_block_"),),
    modules=(
        *(
            f"{stack}_stream_blocks.{{}}.block.{part}"
            for stack in ("double", "single")
            for part in (*_ATTENTION, *_EXPERTS, "ff_i.gate", "adaLN_modulation.1")
        ),
        *(f"t_embedder.timestep_embedder.linear_{number}" for number in (1, 2)),
        *(f"p_embedder.pooled_embedder.linear_{number}" for number in (1, 2)),
        "x_embedder.proj",
        "caption_projection.{}.linear",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ),
)
