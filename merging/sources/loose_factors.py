"""Parts of adapters in files that no format recognizes. They never make a full model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from merging.errors import FormatError
from merging.sources.lycoris import leaf_of
from merging.sources.peft.adapter_types import PEFT_TYPES

__all__ = ["FOREIGN", "refuse_factors", "refuse_foreign"]

_LEAVES = "|".join(sorted({re.escape(leaf) for kind in PEFT_TYPES.values() for leaf in kind.leaves}))
_FACTOR = re.compile(
    r"(?:^|[._])(?:lora[._](?:[abAB]|down|up|mid)|lora_linear_layer|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?"
    rf"|oft_blocks|dora_scale|set_weight|on_input|lora_controlnet|{_LEAVES})(?=\.|$)"
)
"""Names that only parts of an adapter have. Names such as ``alpha`` or ``b1`` prove nothing, as many parameters have
them."""

FOREIGN = {
    "torchtune": "its own names have queries and keys in another order: merge the adapter_model.safetensors that it "
    "writes with an adapter_config.json",
    "litgpt": "its factors are of fused projections, and their scale is in another file: bake it with `litgpt "
    "merge_lora`, then convert the model with `litgpt convert_from_litgpt`",
    "NeMo": "its factors are of fused projections: export it with NeMo's own converter to Hugging Face's format",
    "mlx-vlm": "its factors are called A and B, as other parameters may be: fuse it with mlx-vlm",
}
"""Programs whose adapters are refused by name, and the way to a file that is read."""

_FOREIGN_NAMES = {
    "torchtune": re.compile(r"\.lora_[ab]\.weight$"),
    "litgpt": re.compile(r"transformer\.h\.\d+\.(?:attn|mlp)\.\w+\.lora_[AB]$"),
    "NeMo": re.compile(r"\.(?:adapter|lora_\w+_adapter)\.linear_(?:in|out)\.weight$"),
    "mlx-vlm": re.compile(r"\w_proj\.[AB]$"),
}

_INDEX = re.compile(r"\.\d+(?=\.)")
"""A part of a name that is a number: names that differ in such parts alone are looked at once."""

_NUMBER = re.compile(r"\.\d+$")
"""The number at the end of a factor's name where a module has several."""

_KNOWN = (
    "its layout is not known: read are factors called lora_down and lora_up, lora_A and lora_B, lora.down and lora.up, "
    "with alphas or a config in the header, LyCORIS's types in the files of Kohya, ComfyUI and diffusers, and the "
    "types of PEFT and MLX next to their adapter_config.json"
)


def refuse_foreign(where: Path | str, names: Iterable[str]) -> None:
    """Refuse the files of a program whose adapters are not read. Raises :class:`~merging.errors.FormatError`."""
    listed = list(names)
    for program, pattern in _FOREIGN_NAMES.items():
        name = next((each for each in listed if pattern.search(each)), None)
        if name is not None:
            raise FormatError(f"{where}: is an adapter of {program} ({name}): {FOREIGN[program]}")


def refuse_factors(where: Path | str, names: Iterable[str], *, stated: bool, remedy: str = _KNOWN) -> None:
    """Refuse tensors that are parts of adapters: a merge as a full model would average them one by one.

    Some architectures have such parameters of their own, next to the weights of the same module. They pass if the
    config states the architecture (``stated``). Raises :class:`~merging.errors.FormatError`.
    """
    listed = list(names)
    factors = dict(_factors(listed))
    if factors and ".default." in f"{''.join(factors)}." and any(".base_layer." in name for name in listed):
        raise FormatError(
            f"{where}: holds a model together with an adapter that is not merged into it ({next(iter(factors))}): save "
            f"the model again after merge_and_unload(), or the adapter by itself with save_pretrained"
        )
    if not factors or (stated and _own(factors, listed)):
        return
    raise FormatError(
        f"{where}: {next(iter(factors))} is a part of an adapter, and no full model is made of such parts: {remedy}"
    )


def _factors(names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the names that are parts of adapters, and the module of each."""
    if all(map(leaf_of, names)):  # only such parts: then also names count that prove nothing alone
        yield from ((name, leaf[0]) for name in names if (leaf := leaf_of(name)))
        return
    if not any(map(_FACTOR.search, set(_INDEX.sub(".0", "\n".join(names)).split("\n")))):
        return
    for name in names:
        found = _FACTOR.search(name)
        if found:
            yield name, _NUMBER.sub("", name[: found.start()])


def _own(factors: dict[str, str], names: list[str]) -> bool:
    """Whether all modules that have these parameters have other weights too."""
    modules = set(factors.values())
    others = {name[:match] for name in names if name not in factors for match in _dots(name)}
    return modules <= others


def _dots(name: str) -> Iterator[int]:
    return (index for index, letter in enumerate(name) if letter == ".")
