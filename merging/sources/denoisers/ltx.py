"""LTX-Video and LTX-2: the names of most modules are the same as published and in diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["LTX2", "LTX_VIDEO"]

_NORMS = {"q_norm": "norm_q", "k_norm": "norm_k"}
_PARTS = ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")
_TIMESTEPS = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")


def _block(attentions: tuple[str, ...], others: Mapping[str, str]) -> Iterator[NameRule]:
    names = {
        **{
            f"{attention}.{ours}": f"{attention}.{theirs}"
            for attention in attentions
            for ours, theirs in _NORMS.items()
        },
        **{f"{attention}.{part}": f"{attention}.{part}" for attention in attentions for part in _PARTS},
        **others,
    }
    yield from block_rules("transformer_blocks.{}", "transformer_blocks.{}", names)


def _alike(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _around(names: Mapping[str, str], modulations: Mapping[str, str]) -> Iterator[NameRule]:
    """Yield the rules outside the blocks; ``modulations`` are the embeddings of the time that shift and scale."""
    within = {
        f"{published}.{layer}": f"{diffusers}.{layer}"
        for published, diffusers in modulations.items()
        for layer in _TIMESTEPS
    }
    for published, diffusers in {**names, **within}.items():
        yield NameRule(published=published, diffusers=(diffusers,))


_VIDEO_BLOCK = _alike("ff.net.0.proj", "ff.net.2", "scale_shift_table")
_VIDEO = {
    "patchify_proj": "proj_in",
    **_alike("proj_out", "scale_shift_table", "caption_projection.linear_1", "caption_projection.linear_2"),
}

LTX_VIDEO = Family(
    name="LTX-Video",
    marks=(
        NameMark(names=r"^(?:patchify_proj|adaln_single|time_embed_(?:emb|linear)|caption_projection_linear)"),
        NameMark(names=r"^transformer_blocks_\d+_(?:attn[12]_(?:to_|[qk]_norm)|ff_net_)"),
    ),
    rules=(*_block(("attn1", "attn2"), _VIDEO_BLOCK), *_around(_VIDEO, {"adaln_single": "time_embed"})),
)
"""Before it come all families of such blocks with marks of their own."""

LTX2 = Family(
    name="LTX-2",
    marks=(
        NameMark(names=r"^(?:audio_(?:patchify_proj|proj_|adaln|time_embed|caption)|av_c(?:a|ross_attn)_)"),
        NameMark(names=r"^transformer_blocks_\d+_(?:audio_|video_to_audio_)"),
        NameMark(names=r"^(?:text_embedding_projection_|connectors_)"),
    ),
    rules=(
        *_block(
            ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
            {
                **_VIDEO_BLOCK,
                **_alike("audio_ff.net.0.proj", "audio_ff.net.2", "audio_scale_shift_table"),
                **_alike("prompt_scale_shift_table", "audio_prompt_scale_shift_table"),
                "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
                "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
            },
        ),
        *_around(
            {
                **_VIDEO,
                "audio_patchify_proj": "audio_proj_in",
                **_alike("audio_proj_out", "audio_scale_shift_table"),
                **_alike("audio_caption_projection.linear_1", "audio_caption_projection.linear_2"),
            },
            {
                "adaln_single": "time_embed",
                "audio_adaln_single": "audio_time_embed",
                "prompt_adaln_single": "prompt_adaln",
                "audio_prompt_adaln_single": "audio_prompt_adaln",
                "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
                "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
                "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
                "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
            },
        ),
    ),
)
