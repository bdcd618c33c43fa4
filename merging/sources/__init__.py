"""Models as they lie on the disk: full checkpoints and adapters, opened from their headers and read piece by piece.

A new file format is one module with ``recognises(names)`` and an opener that makes an ``Adapter``, and one line in
``DIALECTS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from merging.errors import FormatError, InputError, MergingError
from merging.hub.address import hub_address
from merging.sources import peft
from merging.sources.adapter import Adapter
from merging.sources.checkpoint import Checkpoint, open_checkpoint
from merging.sources.origin import Origin
from merging.sources.stored import Opened, Stored, open_tensors

__all__ = ["DIALECTS", "Adapter", "Checkpoint", "open_model"]

Recognises = Callable[[Mapping[str, Stored]], bool]
Opens = Callable[[Path, float | None, Opened], Adapter]

DIALECTS: tuple[tuple[Recognises, Opens], ...] = ((peft.recognises, peft.open_peft),)
"""How each adapter format is told by its tensor names, and opened."""

_FOREIGN = {
    ".lora_down.weight": "a Kohya or ComfyUI LoRA",
    ".lora.down.weight": "an old diffusers LoRA",
    ".lora_linear_layer.down.weight": "an old diffusers LoRA",
    ".hada_w1_a": "a LyCORIS LoHa",
    ".lokr_w1": "a LyCORIS LoKr",
    ".lokr_w1_a": "a LyCORIS LoKr",
    ".oft_blocks": "a LyCORIS OFT",
}
_FOREIGN_ENDINGS = tuple(_FOREIGN)
_COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "diffusion_model.")


def open_model(name: str | Path, alpha: float | None = None, dequantise: bool = False) -> Checkpoint | Adapter:
    """Open a full model or an adapter: a local folder or file, or an address on the Hub. Only headers are read.

    ``alpha`` is the LoRA alpha of adapters, instead of what they state; ``dequantise`` makes ordinary weights of those
    that are quantised in a simple way. Raises :class:`~merging.errors.InputError` if
    there is nothing, :class:`~merging.errors.FormatError` if what is there cannot be understood exactly.
    """
    address = hub_address(str(name))
    if address is None:
        return _open_local(Path(name).expanduser(), alpha, dequantise)
    from merging.hub.repository import open_repository  # it reads files with what this package is made of

    repository = open_repository(address)
    origin = Origin(address.repo, repository.commit, address.path, repository.licence)

    def named(text: str) -> str:
        return text.replace(str(repository.folder), repository.name)

    try:
        model = _open_local(repository.folder / address.path, alpha, dequantise)
    except MergingError as error:
        raise type(error)(named(str(error))) from None
    if isinstance(model, Adapter):
        return replace(model, path=Path(str(origin)), origin=origin, notices=tuple(map(named, model.notices)))
    return replace(model, path=Path(str(origin)), origin=origin)


def _open_local(path: Path, alpha: float | None, dequantise: bool) -> Checkpoint | Adapter:
    if not path.exists():
        hint = ": the Hub is meant by hf://ORG/NAME" if str(path).count("/") == 1 else ""
        raise InputError(f"{path}: there is no such file or folder{hint}")
    if path.is_dir():
        if not (path / "adapter_config.json").is_file():
            bare = next((path / name for name in peft.WEIGHTS if (path / name).is_file()), None)
            return open_checkpoint(path, None, dequantise) if bare is None else peft.open_peft(bare, alpha)
        return peft.open_peft(path, alpha)
    if path.suffix == ".json":
        return open_checkpoint(path, None, dequantise)
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        raise FormatError(f"{path}: is no weights file: .safetensors, .bin, .pt or .pth are read, or a folder")
    opened = open_tensors(path)
    _refuse_foreign(path, opened[0])
    for recognises, opens in DIALECTS:
        if recognises(opened[0]):
            return opens(path, alpha, opened)
    return open_checkpoint(path, opened, dequantise)


def _refuse_foreign(path: Path, names: Mapping[str, Stored]) -> None:
    for name in names:
        kind = None
        if name.endswith(_FOREIGN_ENDINGS):
            kind = next(kind for ending, kind in _FOREIGN.items() if name.endswith(ending))
        elif ".lora_" in name and name.startswith(_COMPONENTS):
            kind = "a diffusers or ComfyUI LoRA"
        if kind:
            raise FormatError(
                f"{path}: is {kind} file ({name}), a format that is not read yet: convert it to PEFT first"
            )
