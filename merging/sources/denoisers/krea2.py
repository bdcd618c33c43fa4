"""Krea 2, with an encoder of the text in the denoiser. Nothing is fused."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark, NameRule, block_rules

__all__ = ["KREA2"]

KREA2 = Family(
    name="Krea 2",
    marks=(
        NameMark(names=r"^(?:blocks|txtfusion_\w+_blocks)_\d+_attn_(?:w[qkvo]|gate)\."),
        NameMark(names=r"^blocks_\d+_mlp_(?:gate|up|down)\."),
        NameMark(names=r"^transformer_blocks_\d+_(?:attn_to_gate|ff_(?:gate|up|down))\."),
        NameMark(names=r"^(?:txtfusion|text_fusion)_"),
    ),
    rules=(
        *(
            rule
            for published, diffusers in (
                ("blocks.{}", "transformer_blocks.{}"),
                ("txtfusion.layerwise_blocks.{}", "text_fusion.layerwise_blocks.{}"),
                ("txtfusion.refiner_blocks.{}", "text_fusion.refiner_blocks.{}"),
            )
            for rule in block_rules(
                published,
                diffusers,
                {
                    "attn.wq": "attn.to_q",
                    "attn.wk": "attn.to_k",
                    "attn.wv": "attn.to_v",
                    "attn.wo": "attn.to_out.0",
                    "attn.gate": "attn.to_gate",
                    "attn.qknorm.qnorm.scale": "attn.norm_q.weight",
                    "attn.qknorm.knorm.scale": "attn.norm_k.weight",
                    "mlp.gate": "ff.gate",
                    "mlp.up": "ff.up",
                    "mlp.down": "ff.down",
                    "prenorm.scale": "norm1.weight",
                    "postnorm.scale": "norm2.weight",
                },
            )
        ),
        *(
            NameRule(published=theirs, diffusers=(ours,))
            for theirs, ours in (
                ("first", "img_in"),
                ("tmlp.0", "time_embed.linear_1"),
                ("tmlp.2", "time_embed.linear_2"),
                ("tproj.1", "time_mod_proj"),
                ("txtmlp.0.scale", "txt_in.norm.weight"),
                ("txtmlp.1", "txt_in.linear_1"),
                ("txtmlp.3", "txt_in.linear_2"),
                ("txtfusion.projector", "text_fusion.projector"),
                ("last.linear", "final_layer.linear"),
                ("last.norm.scale", "final_layer.norm.weight"),
            )
        ),
    ),
)
