"""Decompress a pack into an adapter or a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from merging.api.merge_files import merge
from merging.compression.packing import model_files
from merging.display.progress import Progress, resolve_progress
from merging.display.tables import Displayed
from merging.engine.download import download_model
from merging.errors import InputError, OutputError, option
from merging.hub.open_model import open_model
from merging.sources import Adapter
from merging.sources.diffusion_loras import WEIGHTS
from merging.sources.packs import read_pack
from merging.sources.peft import CONFIG_KEY
from merging.storage.output_tensor import OutputTensor
from merging.storage.staging import StagedOutput, check_destination
from merging.storage.writer import TensorWriter
from merging.type_checks import check_types

__all__ = ["Decompressed", "decompress"]


@dataclass(frozen=True, slots=True, repr=False)
class Decompressed(Displayed):
    """The adapter or model that a pack was decompressed into.

    Attributes:
        path: The folder or file.
        kind: The kind of model that was written.
        tensors: The number of tensors.
        bytes: The size of the tensors.
        notices: Remarks.
    """

    path: Path
    kind: Literal["adapter", "model"]
    tensors: int
    bytes: int
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same in plain values, for JSON."""
        return {**asdict(self), "path": str(self.path)}


@check_types("progress")
def decompress(
    pack: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    allow_different_bases: bool = False,
    overwrite: bool = False,
    progress: Progress | bool | None = None,
) -> Decompressed:
    """Decompress a pack into an ordinary adapter in its original format, or into a full model.

    Args:
        pack: The pack: a path or an address on the Hub.
        output: The folder to write. An adapter may also be one file, if the name ends in ``.safetensors``.
        base: The base of a full model, to which the changes are added. Adapters need none.
        allow_different_bases: Whether the base may differ from the one noted in the pack.
        overwrite: Whether an existing output is replaced.
        progress: True for a bar, or a function that receives the bytes done and the bytes in all.

    Returns:
        The path and the size of the output.

    Raises:
        merging.errors.MergingError: For a file that is not a pack, and for a missing or different base. Nothing is
            written then.

    Example:
        >>> import merging
        >>> _ = merging.compress("a", "pack.safetensors")
        >>> merging.decompress("pack.safetensors", "a-again").kind
        'adapter'
    """
    progress = resolve_progress(progress, "decompressing")
    destination, opened = Path(output), open_model(pack)
    if not isinstance(opened, Adapter) or not opened.packed:
        raise InputError(f"{pack}: is not a pack: it can be used as it is")
    if opened.of_model:
        if base is None:
            known = f" ({opened.base})" if opened.base else ""
            raise InputError(f"{pack}: holds the changes of a full model: give its base{known} with {option('base')}")
        made = merge(
            [pack],
            method="task_arithmetic",
            base=str(base),
            output=destination,
            allow_different_bases=allow_different_bases,
            overwrite=overwrite,
            progress=progress,
        )
        return Decompressed(made.path, "model", made.tensors, made.bytes, made.notices)
    if base is not None:
        raise InputError(f"{pack}: holds an adapter, which is unpacked without a base: leave {option('base')} out")
    download_model(opened, progress)
    return _unpack_adapter(opened, destination, overwrite)


def _unpack_adapter(adapter: Adapter, destination: Path, overwrite: bool) -> Decompressed:
    pack = read_pack(adapter.files[0])
    manifest, single = pack.manifest, destination.suffix == ".safetensors"
    config = None if manifest.config is None else json.dumps(manifest.config, indent=2)
    if config is None and manifest.dialect == "PEFT" and not single:
        raise OutputError(
            f"{destination}: the pack has no config of PEFT's to go into a folder: use "
            + option("output", "FILE.safetensors")
        )
    stems = {"PEFT": "adapter_model", "diffusers": Path(WEIGHTS[0]).stem}
    stem = destination.stem if single else stems.get(str(manifest.dialect), destination.name)
    metadata = manifest.metadata | ({CONFIG_KEY: config} if config and single else {})
    outs = [OutputTensor(name, stored.dtype_name, stored.shape) for name, stored in pack.tensors.items()]
    nbytes = sum(out.nbytes for out in outs)
    check_destination(destination, model_files(adapter), nbytes, overwrite)
    with StagedOutput(destination, overwrite, single) as staged:
        writer = TensorWriter(staged.folder, stem, outs, metadata, None)
        try:
            for name, stored in pack.tensors.items():
                writer.write(name, stored.read().reshape(-1))
            writer.finish()
        finally:
            writer.close()
        if config and not single:
            (staged.folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        staged.commit()
    return Decompressed(destination, "adapter", len(outs), nbytes, tuple(staged.notices))
