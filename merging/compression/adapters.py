"""Packing an adapter: code the factors in its file, and keep its other tensors as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from merging.compression.assembly import Assembly, Losses, OutputErrors, as_read
from merging.compression.bands import FactorCodings, count_directions, pack_factors
from merging.compression.calibration import Calibration, choose_codings, damp
from merging.compression.settings import BandsSpec, PackSettings
from merging.compression.ternary import balance, norm_factor, pack_signs
from merging.errors import InputError, either, option
from merging.maths.delta import LowRank
from merging.maths.layer_statistics import InputGram
from merging.maths.lazy_torch import Tensor, torch
from merging.maths.linalg import factored_svd, squared_norm
from merging.sources import Dialect, dialect_of
from merging.sources.adapter import Adapter
from merging.sources.changes import LoraChange
from merging.sources.dtypes import DTYPES
from merging.sources.opening import open_tensors
from merging.sources.packs import Described
from merging.sources.packs.codings import Bands, DtypeName, Raw, Ternary
from merging.sources.stored import FileContents, Stored

__all__ = ["AdapterFile", "adapter_file", "pack_adapter"]

_METADATA = ("lora_adapter_metadata", "ss_base_model_version", "ss_v2", "ss_network_", "modelspec.architecture")
"""Prefixes of the metadata entries that are kept. Other entries of Kohya's hold captions and paths."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter with the tensors of its file.

    Attributes:
        path: The file.
        dialect: The format of its names.
        opened: Its tensors and metadata.
        adapter: The adapter.
        pairs: The names of lower and upper factors that belong together.
        layers: The change of each lower factor of a linear layer, by the name of the factor.
        alone: The names of factors without a gauge of their own: factors of experts, and shared ones.
    """

    path: Path
    dialect: Dialect
    opened: FileContents
    adapter: Adapter
    pairs: tuple[tuple[str, str], ...]
    layers: Mapping[str, LoraChange]
    alone: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """The entries of the header's metadata that are kept."""
        return {key: text for key, text in self.opened[1].items() if key.startswith(_METADATA)}

    def holding(self, tensors: Mapping[str, Stored]) -> Adapter:
        """Return the adapter that the file would be with these tensors."""
        return self.dialect.opens(self.path, None, (dict(tensors), self.opened[1]))

    def loras(self, adapter: Adapter) -> dict[str, LoraChange]:
        """Return the changes by factors, without DoRA's magnitudes, which need the base."""
        found = {target: each for target, each in adapter.changes.items() if isinstance(each, LoraChange)}
        return {target: replace(each, magnitude=None) for target, each in found.items()}


def adapter_file(adapter: Adapter) -> AdapterFile:
    """Open the file of an adapter. Raises :class:`~merging.errors.InputError` for one that cannot be packed."""
    path = adapter.files[0]
    opened = open_tensors(path)
    dialect = dialect_of(opened)
    assert dialect is not None
    if dialect.name == "pack":
        raise InputError(f"{adapter.path}: is a pack already: {either('merge decompress', 'decompress')} it first")
    if dialect.name in ("GGUF", "MLX"):
        raise InputError(
            f"{adapter.path}: is an adapter of the format {dialect.name}, which packs do not hold: make a LoRA of PEFT "
            "of it first, with " + either("merge --method passthrough", 'merge([...], method="passthrough")')
        )
    adapter = replace(dialect.opens(path, None, opened), path=adapter.path, origin=adapter.origin)
    names = {id(stored): name for name, stored in opened[0].items()}
    changes = [each for each in adapter.changes.values() if isinstance(each, LoraChange)]
    started = next((each for each in changes if each.start), None)
    if started is not None:
        raise InputError(
            f"{adapter.path}: {started.target}: its factors hold directions that its start took off the base "
            f"({started.start}), which must not be lost: make a plain LoRA of it first, with "
            + either("merge --method passthrough --base BASE", 'merge([...], method="passthrough", base=BASE)')
        )
    uses = Counter(id(part) for each in changes for part in (each.down, each.up))
    pairs = tuple(
        (names[id(each.down)], names[id(each.up)])
        for each in changes
        if all(id(part) in names and uses[id(part)] == 1 for part in (each.down, each.up))
    )
    paired = {name for pair in pairs for name in pair}
    used = {names[id(of)] for each in changes for part in (each.down, each.up) for of in part.made_of}
    if not used:
        raise InputError(
            f"{adapter.path}: holds no factors of a LoRA ({adapter.about or adapter.dialect}): make one of it first, "
            + either("with merge --method passthrough --rank N", 'with merge([...], method="passthrough", rank=N)')
        )
    layers = {names[id(each.down)]: each for each in changes if each.kind == "linear" and id(each.down) in names}
    return AdapterFile(
        path=path,
        dialect=dialect,
        opened=opened,
        adapter=adapter,
        pairs=pairs,
        layers=layers,
        alone=tuple(sorted(used - paired)),
    )


def pack_adapter(
    file: AdapterFile, settings: PackSettings, assembly: Assembly, calibration: Calibration | None = None
) -> tuple[Losses, list[str]]:
    """Code an adapter's factors into an assembly. Return the losses, and remarks on tensors that are kept as they are.

    Raises :class:`~merging.errors.InputError` for values that are not finite.
    """
    if file.alone and settings.method == "bands":
        raise InputError(
            f"{file.adapter.path}: {file.alone[0]} holds factors of experts, or shared ones, whose directions cannot "
            f"be separated: use {option('method', 'ternary')}"
        )
    tensors, outputs = dict(file.opened[0]), dict[str, OutputErrors]()
    for down, up in file.pairs:
        change = file.layers.get(down)
        gram = calibration.find(change.target, change.down.shape[1]) if calibration and change else None
        factors, errors = _pair(file, (up, down), settings, gram)
        if errors and change:
            outputs[change.target] = errors.scaled(change.scale**2)
        for described, payload in factors:
            assembly.add(described, payload)
            tensors[described.name] = as_read(described, payload)
    for name in file.alone:
        kind, coding, payload = pack_signs(_values(file, name), _kind(tensors[name]), settings)
        described = Described(name=name, kind=kind, shape=tensors[name].shape, coding=coding)
        assembly.add(described, payload)
        tensors[name] = as_read(described, payload)
    coded = {name for pair in file.pairs for name in pair} | set(file.alone)
    kept = [name for name in tensors if name not in coded]
    for name in kept:
        stored = tensors[name]
        assembly.add(Described(name=name, kind=_kind(stored), shape=stored.shape, coding=Raw()), _values(file, name))
    remarks = []
    if kept:
        size = sum(tensors[name].nbytes for name in kept)
        remarks = [f"{len(kept)} tensors of {size:,} bytes are not factors and kept as they are ({kept[0]})"]
    return replace(_losses(file, file.holding(tensors)), outputs=outputs), remarks


def _pair(
    file: AdapterFile, names: tuple[str, str], settings: PackSettings, gram: InputGram | None
) -> tuple[list[tuple[Described, Tensor]], OutputErrors | None]:
    """Return the upper and the lower factor of a product in the balanced gauge, coded, and errors by examples."""
    stored = [file.opened[0][name] for name in names]
    rank = stored[1].shape[0]
    up, down = (_values(file, name).reshape(shape) for name, shape in zip(names, ((-1, rank), (rank, -1)), strict=True))
    left, right = balance(up, down)
    coded: Sequence[tuple[DtypeName, Bands | Ternary, Tensor]]
    errors = None
    if settings.method == "bands":
        factors = pack_factors(left, right, settings.bands)
        if gram is not None:
            by_inputs = _pack_by_inputs(left, right, settings.bands, damp(gram))
            product = _Product(left, right, gram, tuple(DTYPES[_kind(each)] for each in stored))
            factors, errors = choose_codings(factors, by_inputs, product.error, product.norm())
        coded = [(_kind(each), *factor) for each, factor in zip(stored, factors, strict=True)]
    else:
        growth = norm_factor(settings.density, left, right) if settings.keeps_norm else 1.0
        coded = [
            pack_signs(factor, _kind(each), settings, growth)
            for factor, each in zip((left, right), stored, strict=True)
        ]
    described = [
        (Described(name=name, kind=kind, shape=each.shape, coding=coding), payload)
        for name, each, (kind, coding, payload) in zip(names, stored, coded, strict=True)
    ]
    return described, errors


def _pack_by_inputs(up: Tensor, down: Tensor, bands: BandsSpec, gram: InputGram) -> FactorCodings:
    """Return the codings of a product's factors, ``[out, r]`` and ``[r, in]``, for the inputs of its layer.

    Where the bands hold fewer directions than ``r``, the product is projected onto the leading ones of its outputs.
    """
    kept, rank = count_directions(bands), len(down)
    if kept is not None and kept < rank:
        outputs = factored_svd(up, gram.root(down))[0][:, :kept]
        left, right = balance(outputs, (outputs.mT @ up) @ down)
        missing = rank - right.shape[0]
        up, down = torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))
    return pack_factors(up, down, bands, gram=gram)


@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """A product of factors, float64, the Gram matrix of its inputs, and the dtypes of the coded factors."""

    up: Tensor
    down: Tensor
    gram: InputGram
    dtypes: tuple[torch.dtype, ...]

    def norm(self) -> float:
        """Return the squared length of the outputs."""
        return self._energy(self.up, self.down)

    def error(self, up: Tensor, down: Tensor) -> float:
        """Return the squared error of the outputs of decoded factors, as they are read."""
        up, down = (each.to(dtype).double() for each, dtype in zip((up, down), self.dtypes, strict=True))
        return self._energy(torch.cat([self.up, -up], 1), torch.cat([self.down, down]))

    def _energy(self, up: Tensor, down: Tensor) -> float:
        return max(0.0, float(((up.mT @ up) * (self.gram.apply(down) @ down.mT)).sum()))


def _values(file: AdapterFile, name: str) -> Tensor:
    """Read a tensor of the file, and check that it is finite."""
    values = file.opened[0][name].read()
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise InputError(f"{file.adapter.path}: {name} holds NaN or infinite values: repair the adapter first")
    return values


def _kind(stored: Stored) -> DtypeName:
    return cast(DtypeName, stored.dtype_name)


def _losses(file: AdapterFile, packed: Adapter) -> Losses:
    """Return the loss of every product, computed from the factors."""
    losses, after = Losses(), file.loras(packed)
    for target, change in file.loras(file.adapter).items():
        one, other = (_product(each) for each in (change, after[target]))
        difference = LowRank(
            torch.cat([one.up, -other.up], -1), torch.cat([one.down, other.down], -2), one.shape, one.transposed
        )
        losses.add(target, float(squared_norm(difference)), float(squared_norm(one)))
    return losses


def _product(change: LoraChange) -> LowRank:
    delta = change.read(change.shape, lambda: torch.empty(0), torch.float64)
    assert isinstance(delta, LowRank)
    return delta
