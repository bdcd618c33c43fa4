"""Leftovers of training in files: the names of wrappers, and parameters that were saved in parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from merging.errors import FormatError
from merging.sources.stored import FileContents, Stored

__all__ = ["refuse_ungathered", "strip_wrappers", "without_wrappers"]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that torch.compile, FSDP and activation checkpointing insert, at any place."""


def strip_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Remove the names of wrappers for training, which no library expects in a file. Return the new names by the old.

    ``module.``, of data-parallel training, is removed if all names begin with it. Nothing is removed if two names would
    become the same.
    """
    plain = {name: name for name in names}
    text = "\n".join(plain)
    if any(wrapper in text for wrapper in _WRAPPERS):
        plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name for name in plain}
    if plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


def without_wrappers(contents: FileContents) -> FileContents:
    """Return the contents of an adapter's file, its tensors without the names of wrappers."""
    tensors, metadata = contents
    names = strip_wrappers(tensors)
    return {names[name]: stored for name, stored in tensors.items()}, metadata


def refuse_ungathered(where: Path | str, tensors: Mapping[str, Stored]) -> None:
    """Refuse weights that DeepSpeed or FSDP kept in parts on several processes when the file was saved.

    Raises :class:`~merging.errors.FormatError`.
    """
    for name, stored in tensors.items():
        if stored.shape == (0,) and name.endswith((".weight", ".default")):
            empty = sum(each.shape == (0,) for each in tensors.values())
            raise FormatError(
                f"{where}: {name} is empty ({empty} of {len(tensors)} tensors are): DeepSpeed's ZeRO-3 saved it before "
                f"its parts were gathered: save it again with stage3_gather_16bit_weights_on_model_save, or take the "
                f"weights from zero_to_fp32.py"
            )
        if name.endswith("flat_param") and name.rpartition(".")[2] in ("_flat_param", "flat_param"):
            raise FormatError(
                f"{where}: {name} is a flat parameter of FSDP, which holds many weights without their names: save it "
                f"again with FULL_STATE_DICT"
            )
