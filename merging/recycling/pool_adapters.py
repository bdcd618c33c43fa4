"""The adapters of a pool: find them, and open those that fit the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path

from merging.engine.download import download_model
from merging.errors import InputError, MergingError, either
from merging.hub.address import hub_address, local_path
from merging.hub.open_model import open_model
from merging.maths.delta import LowRank
from merging.maths.lazy_torch import torch
from merging.maths.linalg import squared_norm
from merging.plan.checks import same_base
from merging.pool import Pool
from merging.pool.index import is_pool
from merging.recycling.hooks import HookPoint
from merging.sources import Adapter, Model
from merging.sources.renaming import find_renaming

__all__ = [
    "BASE",
    "FEW_SHOT",
    "AdapterRef",
    "Expert",
    "UsableAdapters",
    "find_usable",
    "list_adapters",
    "open_expert",
    "read_expert",
]

BASE, FEW_SHOT = "base", "few-shot LoRA"
"""Names of rows in the report. An adapter of a pool with such a name is called by its path."""

_HEADS = ("classifier", "score", "lm_head", "qa_outputs", "out_proj", "pooler")
"""Modules that adapters of other tasks save in full, for their own labels."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A reference to an adapter of a pool: its path or address, a unique name, and its owner if known."""

    path: str
    name: str
    owner: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """An adapter in memory: low-rank changes by the network's weights, float32, with every scale folded in."""

    name: str
    deltas: Mapping[str, LowRank]
    owner: str | None = None
    path: str | None = None
    base: str | None = None
    notices: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(delta.rank for delta in self.deltas.values())

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole change."""
        return sqrt(sum(float(squared_norm(delta)) for delta in self.deltas.values()))


@dataclass(frozen=True, slots=True)
class UsableAdapters:
    """The adapters that can be mixed, the modules that most of them change, and why the others cannot be mixed."""

    usable: tuple[AdapterRef, ...]
    modules: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def list_adapters(pool: str | Path | Iterable[str | Path], base: str) -> tuple[AdapterRef, ...]:
    """List the adapters of a pool, sorted by name.

    An entry of ``pool`` is one of these:

    - an adapter: a folder, a file, or an address on the Hub;
    - a pool that ``merge pool`` built, whose usable adapters are taken;
    - a folder of adapters, directly or by owner (``POOL/adapter``, ``POOL/owner/adapter``).

    Adapters of the same name are called by their paths.

    Raises :class:`~merging.errors.InputError` for an entry without any adapter, and for a pool of another base.
    """
    entries = [pool] if isinstance(pool, (str, Path)) else list(pool)
    found: dict[str, AdapterRef] = {}
    for entry in map(str, entries):
        for each in _under(entry, base):
            found.setdefault(each.path, each)
    if not found:
        raise InputError("the pool is empty: name adapters, or a folder of them")
    count = Counter(each.name for each in found.values())
    count.update((BASE, FEW_SHOT))
    renamed = [each if count[each.name] == 1 else replace(each, name=each.path) for each in found.values()]
    return tuple(sorted(renamed, key=lambda each: each.name))


def _under(entry: str, base: str) -> list[AdapterRef]:
    address = hub_address(entry)
    if address is not None:
        owner = None if address.in_store else address.repo.partition("/")[0]
        return [AdapterRef(entry, str(address), owner)]
    path = local_path(entry)
    if path.is_file() or _is_adapter(path):
        return [AdapterRef(str(path), path.name)]
    if not path.is_dir():
        raise InputError(f"{entry}: there is no such adapter or folder of adapters")
    if is_pool(path):
        return _of_pool(path, base)
    direct = [AdapterRef(str(each), each.name) for each in sorted(path.iterdir()) if _is_adapter(each)]
    owned = [
        AdapterRef(str(each), f"{owner.name}/{each.name}", owner.name)
        for owner in sorted(path.iterdir())
        if owner.is_dir() and not _is_adapter(owner)
        for each in sorted(owner.iterdir())
        if _is_adapter(each)
    ]
    if not direct and not owned:
        raise InputError(f"{entry}: holds no adapter: no folder in it has an adapter_config.json")
    return direct + owned


def _of_pool(path: Path, base: str) -> list[AdapterRef]:
    """List the usable adapters of an audited pool, by the last part of their paths where it is unique."""
    pool = Pool(path)
    own = {base, str(local_path(base).resolve())}
    if not any(same_base(one, other) for one in own for other in pool.base_names):
        raise InputError(f"{path}: is a pool of adapters of {pool.base_names[0]}, and the base is {base}")
    usable = pool.usable()
    if not usable:
        listed = either("merge pool list says", "its entries say")
        raise InputError(f"{path}: the pool has no adapter that may be used: {listed} why")
    last = {kept.name: Path(kept.name).name if Path(kept.name).is_absolute() else kept.name for kept, _ in usable}
    count = Counter(last.values())
    names = {name: short if count[short] == 1 else name for name, short in last.items()}
    return [AdapterRef(str(folder), names[kept.name], kept.owner) for kept, folder in usable]


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def open_expert(candidate: AdapterRef, hook_points: Mapping[str, HookPoint], network: str = "the base") -> Expert:
    """Open an adapter, and return it as :func:`read_expert` does."""
    return read_expert(candidate, open_model(candidate.path), hook_points, network)


def read_expert(
    candidate: AdapterRef, adapter: Model, hook_points: Mapping[str, HookPoint], network: str = "the base"
) -> Expert:
    """Read and check an opened adapter's changes, by the names of the network's weights.

    Heads that the adapter saved in full for its own task are left out, with a notice. Raises
    :class:`~merging.errors.MergingError` for a full model, and for an adapter that does not fit, is not made of
    low-rank factors, changes nothing, or holds NaN.
    """
    if not isinstance(adapter, Adapter):
        raise InputError(
            f"{candidate.path}: is a full checkpoint, and only adapters are recycled: leave it out, or extract a LoRA "
            f"from it with another program first"
        )
    heads = [target for target, change in adapter.changes.items() if not change.low_rank and _is_head(target)]
    changes = {target: change for target, change in adapter.changes.items() if target not in heads}
    odd = next((target for target, change in changes.items() if not change.low_rank), None)
    if odd is not None:
        raise InputError(f"{candidate.path}: changes {odd} otherwise than by low-rank factors, which cannot be mixed")
    shapes = {name: point.shape for name, point in hook_points.items()}
    renaming, left = find_renaming(changes, shapes, lambda target, name: changes[target].fits(shapes[name]))
    if left or not changes:
        raise InputError(
            f"{candidate.path}: {len(left)} of {len(changes)} targets have no place in {network}"
            f"{f', {left[0]} among them' if left else ''}: is it an adapter of this base?"
        )
    download_model(adapter)
    deltas: dict[str, LowRank] = {}
    for target, change in changes.items():
        name = renaming(target) or target
        point = hook_points[name]

        def base(point: HookPoint = point) -> torch.Tensor:
            return point.weight.detach().float().cpu()

        delta = change.read(point.shape, base, torch.float32)
        assert isinstance(delta, LowRank)
        deltas[name] = delta.oriented(point.transposed)
    _check_values(candidate, deltas)
    notices = (f"{candidate.name}: its own head ({heads[0]}) stays behind",) if heads else ()
    return Expert(
        name=candidate.name,
        deltas=deltas,
        owner=candidate.owner,
        path=candidate.path,
        base=adapter.base,
        notices=notices,
    )


def _is_head(target: str) -> bool:
    return any(part in _HEADS for part in target.split("."))


def _check_values(candidate: AdapterRef, deltas: Mapping[str, LowRank]) -> None:
    for name, delta in deltas.items():
        if not (delta.up.isfinite().all() and delta.down.isfinite().all()):
            raise InputError(f"{candidate.path}: {name} holds NaN or infinities")
    if all(not squared_norm(delta) for delta in deltas.values()):
        raise InputError(f"{candidate.path}: changes nothing: all its factors multiply to zero")


def find_usable(pool: Sequence[AdapterRef], hook_points: Mapping[str, HookPoint]) -> UsableAdapters:
    """Find the adapters that can be mixed into a network with these hook points. Each is read once, and none is kept.

    Raises :class:`~merging.errors.InputError` with the first reason if no adapter can be mixed.
    """
    usable: list[AdapterRef] = []
    left_out: dict[str, str] = {}
    notices: list[str] = []
    changed: Counter[str] = Counter()
    bases: Counter[str] = Counter()
    for candidate in pool:
        try:
            expert = open_expert(candidate, hook_points)
        except MergingError as error:
            left_out[candidate.name] = str(error)
            continue
        usable.append(candidate)
        changed.update(expert.deltas.keys())
        notices += expert.notices
        bases.update([expert.base] if expert.base else [])
    if not usable:
        raise InputError(f"none of the {len(pool)} adapters can be used: {next(iter(left_out.values()))}")
    modules = [name for name in hook_points if 2 * changed[name] > len(usable)]
    modules = modules or [name for name in hook_points if changed[name]]
    usual = bases.most_common(1)[0][0] if bases else ""
    others = {base: count for base, count in bases.items() if not same_base(base, usual)}
    if others:
        notices.append(
            f"{sum(others.values())} adapters say that they were trained on {', '.join(others)}, not {usual}"
        )
    return UsableAdapters(tuple(usable), tuple(modules), left_out, tuple(notices))
