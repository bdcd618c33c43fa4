"""Names with dots for the flat names in Kohya's files, by the tables of the families."""

from __future__ import annotations

from merging.maths.shapes import Shapes
from merging.sources.denoisers import dotted_name, family_of
from merging.sources.denoisers.family import name_pattern
from merging.sources.lora_names import normal_name

__all__ = ["dotted_targets"]

_CLIP = tuple(
    f"encoder.layers.{{}}.{part}"
    for part in (
        *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
        *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
    )
)
_T5 = tuple(
    f"encoder.block.{{}}.layer.{{}}.{part}"
    for part in (
        *(f"SelfAttention.{part}" for part in "qkvo"),
        *(f"DenseReluDense.{part}" for part in ("wi", "wi_0", "wi_1", "wo")),
    )
)
_TEXT = (*((name_pattern(name.replace(".", "_")), f"text_model.{name}") for name in _CLIP),
         *((name_pattern(name.replace(".", "_")), name) for name in _T5))  # fmt: skip
"""Flat names of text encoders' modules, and the names with dots in diffusers' pipelines."""

_FOUR_ENCODERS = ("Stable Diffusion 3", "HiDream")
"""Families with a T5 behind two CLIPs; it is the second encoder of all others."""


def dotted_targets(shapes: Shapes) -> dict[str, str]:
    """Return names with dots, behind diffusers' components, for targets of LoRA files of diffusion models.

    Names that have dots already are kept, and unknown names are left out. ``shapes`` are the shapes of all targets,
    which show the family.
    """
    names = {target: normal_name(target) for target in shapes}
    two_clips = any(component == "text_encoder_2" for component, _ in names.values())
    family = family_of({flat: shapes[target] for target, (part, flat) in names.items() if part.startswith("denoiser")})
    found: dict[str, str] = {}
    for target, (component, flat) in names.items():
        if "." in target.rpartition(".")[0]:
            found[target] = target
        elif component.startswith("text_encoder"):
            if (text := _text_name(flat)) is not None:
                four = two_clips or (family is not None and family.name in _FOUR_ENCODERS)
                second = component == "text_encoder_3" and not four
                found[target] = f"{'text_encoder_2' if second else component}.{text}"
        elif family is not None and (dotted := dotted_name(family, flat)) is not None:
            unet = family.name.startswith("Stable Diffusion") and not family.rules
            found[target] = f"{'unet' if unet else component.replace('denoiser', 'transformer')}.{dotted}"
    return found


def _text_name(flat: str) -> str | None:
    module, dot, leaf = flat.partition(".")
    matches = ((pattern.fullmatch(module), name) for pattern, name in _TEXT)
    return next((name.format(*found.groups()) + dot + leaf for found, name in matches if found), None)
