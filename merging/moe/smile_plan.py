"""The plan of a SMILE mixture: low-rank experts in the linear layers of a base, whatever its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merging.display.tables import plural
from merging.errors import InputError
from merging.hub.open_model import require_full
from merging.maths.delta import LowRank
from merging.maths.lazy_torch import Tensor, torch
from merging.moe.parts import CopiedTensor, OutputPart, check_finite
from merging.moe.plan import MoePlan
from merging.moe.recipe import MoeRecipe
from merging.moe.smile import available_rank, decompose_change, read_change, same_checkpoint
from merging.moe.smile_code import CODE_FILE, smile_code
from merging.moe.source import MoeSource, open_moe_source
from merging.plan.items import TILE
from merging.plan.recipe import DTYPES as NAMES
from merging.sources.dtypes import DTYPES
from merging.storage.output_tensor import OutputTensor
from merging.storage.writer import TensorWriter

__all__ = ["plan_smile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmileModule:
    """The experts of one linear layer.

    Attributes:
        name: the path of the layer.
        base: the base.
        experts: the models whose changes become experts.
        rank: the directions of an expert.
        rows: the right singular vectors that are kept: the larger one of ``rank`` and the router's.
        shape: the shape of the layer's matrix, ``[out, in]``.
        bias: whether experts change its bias.
        dtype_name: the type of the tensors.
    """

    name: str
    base: MoeSource
    experts: tuple[MoeSource, ...]
    rank: int
    rows: int
    shape: tuple[int, int]
    bias: bool
    dtype_name: str

    @property
    def outs(self) -> tuple[OutputTensor, ...]:
        """The left and the right directions of all experts, and their changes of the bias."""
        count, (outputs, inputs) = len(self.experts), self.shape
        shapes: dict[str, tuple[int, ...]]
        shapes = {"smile_up": (count, outputs, self.rank), "smile_down": (count, self.rows, inputs)}
        shapes |= {"smile_bias": (count, outputs)} if self.bias else {}
        return tuple(OutputTensor(f"{self.name}.{leaf}", self.dtype_name, shape) for leaf, shape in shapes.items())

    @property
    def memory(self) -> int:
        """A change, its decomposition, and the factors of one expert, in float64."""
        outputs, inputs = self.shape
        return 8 * (5 * outputs * inputs + 2 * min(self.shape) ** 2 + (outputs + inputs) * self.rows)

    def write(self, writer: TensorWriter, device: torch.device) -> None:
        """Decompose the change of each expert, and write its directions."""
        dtype = DTYPES[self.dtype_name]
        for index, expert in enumerate(self.experts):
            change = read_change(expert, self.base, f"{self.name}.weight")
            for factor in (change.up, change.down) if isinstance(change, LowRank) else (change.value,):
                check_finite(factor, factor, f"{expert.name}: the change of {self.name}")
            found = list(decompose_change(change, self.rows, self.rank, device))
            if self.bias:
                found.append(read_change(expert, self.base, f"{self.name}.bias").dense())
            for out, value in zip(self.outs, found, strict=True):
                values = check_finite(value.to(dtype), value, f"{expert.name}: the change of {self.name}")
                writer.write(out.name, values.reshape(-1).contiguous(), index * value.numel())


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragedTensor:
    """The mean of a tensor over the experts."""

    out: OutputTensor
    experts: tuple[MoeSource, ...]

    @property
    def outs(self) -> tuple[OutputTensor]:
        """The one tensor."""
        return (self.out,)

    @property
    def memory(self) -> int:
        """A few tiles, and the tensors that an adapter changes."""
        changed = sum(self.out.name in each.changes for each in self.experts)
        numel = self.experts[0].find_stored(self.out.name).numel
        return 8 * (4 * min(numel, TILE) + changed * numel)

    def write(self, writer: TensorWriter, device: torch.device) -> None:
        """Write the mean tile by tile."""
        name, numel = self.out.name, self.experts[0].find_stored(self.out.name).numel
        whole = {each.name: each.read(name).reshape(-1) for each in self.experts if name in each.changes}

        def read(source: MoeSource, start: int, count: int) -> Tensor:
            if source.name in whole:
                return whole[source.name][start : start + count].double()
            stored = source.find_stored(name)
            values = torch.empty(count, dtype=stored.dtype)
            stored.read_into(values, start)
            return values.double()

        for start in range(0, numel, TILE):
            count = min(TILE, numel - start)
            total = sum((read(each, start, count) for each in self.experts), torch.zeros(count, dtype=torch.float64))
            mean = total / len(self.experts)
            writer.write(name, check_finite(mean.to(DTYPES[self.out.dtype_name]), mean, f"the mean of {name}"), start)


def plan_smile(recipe: MoeRecipe) -> MoePlan:
    """Plan a mixture of low-rank experts; only headers are read.

    Raises:
        InputError: for models that do not fit together, and a base that transformers has no class for.
    """
    base = open_moe_source(recipe.base_model)
    require_full(base.checkpoint, base.name, "base_model")
    experts = tuple(open_moe_source(each.source_model, base) for each in recipe.experts)
    for expert in experts:
        _check_same_tensors(expert, base)
    architecture, config, linears = _linear_layers(base)
    modules = [each for each in (_module(recipe, base, experts, name) for name in linears) if each is not None]
    if not modules:
        raise InputError(f"{base.name}: no expert changes a linear layer of it: there is nothing to choose between")
    code, name, auto = smile_code(architecture, config, str(base.checkpoint.config["model_type"]))
    others, notices = _others(recipe, base, experts, modules)
    return MoePlan(
        recipe=recipe,
        architecture=f"SMILE on {architecture}",
        base=base,
        experts=experts,
        config=_config(recipe, base, modules, name, auto),
        parts=(*others, *modules),
        code={CODE_FILE: code},
        notices=(
            *notices,
            "only transformers loads it, with trust_remote_code=True: the model's class is in the folder",
        ),
    )


def _check_same_tensors(expert: MoeSource, base: MoeSource) -> None:
    ours, theirs = base.checkpoint.tensors, expert.checkpoint.tensors
    for name, stored in ours.items():
        if name not in theirs:
            raise InputError(f"{expert.name}: has no {name}, and {base.name} has: give a fine-tune of the base")
        if theirs[name].shape != stored.shape:
            raise InputError(
                f"{expert.name}: {name} is {list(theirs[name].shape)}, and {base.name} has {list(stored.shape)}"
            )
    more = next((name for name in theirs if name not in ours), None)
    if more is not None:
        raise InputError(f"{expert.name}: has {more}, and {base.name} has not: give a fine-tune of the base")


def _linear_layers(base: MoeSource) -> tuple[str, str, list[str]]:
    """Return the base's class, the class of its config, and the paths of its linear layers."""
    import transformers

    config = base.checkpoint.config
    architecture = next(iter(config.get("architectures") or []), None)
    found = getattr(transformers, str(architecture), None)
    if found is None or "auto_map" in config or "model_type" not in config:
        raise InputError(
            f"{base.name}: is a {architecture or 'model of no stated class'}, which transformers has no class of its "
            f"own for: a SMILE mixture is made of a model that it has"
        )
    made = found.config_class.from_dict(dict(config))
    with torch.device("meta"):
        model = found(made)
    tensors = base.checkpoint.tensors
    linears = [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and f"{name}.weight" in tensors
    ]
    return str(architecture), found.config_class.__name__, linears


def _module(recipe: MoeRecipe, base: MoeSource, experts: tuple[MoeSource, ...], name: str) -> SmileModule | None:
    """Return the experts of a linear layer; None if no expert can have changed it."""
    stored = base.find_stored(f"{name}.weight")
    outputs, inputs = stored.shape
    most = max(available_rank(each, base, f"{name}.weight", stored.shape) for each in experts)
    if not most or not stored.floating:
        return None
    rank = most if recipe.rank == "full" else min(recipe.rank, most)
    bias = f"{name}.bias"
    changed = bias in base.checkpoint.tensors and any(
        bias in each.changes or not same_checkpoint(each, base) for each in experts
    )
    return SmileModule(
        name=name,
        base=base,
        experts=experts,
        rank=rank,
        rows=max(rank, min(recipe.gate_rank, most)),
        shape=(outputs, inputs),
        bias=changed,
        dtype_name=NAMES[recipe.dtype] if recipe.dtype else stored.dtype_name,
    )


def _others(
    recipe: MoeRecipe, base: MoeSource, experts: tuple[MoeSource, ...], modules: Sequence[SmileModule]
) -> tuple[list[OutputPart], list[str]]:
    """Return the parts of all tensors but the experts', and remarks on changes that are left out."""
    inside = {f"{module.name}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    full = [each for each in experts if not same_checkpoint(each, base)]
    parts: list[OutputPart] = []
    left: list[str] = []
    for name, stored in base.checkpoint.tensors.items():
        dtype_name = NAMES[recipe.dtype] if recipe.dtype and stored.floating else stored.dtype_name
        out = OutputTensor(name, dtype_name, stored.shape)
        outside = name not in inside and stored.floating
        if outside and recipe.others == "average":
            parts.append(AveragedTensor(out=out, experts=experts))
            continue
        parts.append(CopiedTensor(out=out, source=base, name=name))
        if outside and (full or any(name in each.changes for each in experts)):
            left.append(name)
    if not left:
        return parts, []
    return parts, [
        f"outside linear layers all is the base's ({plural(len(left), 'tensor')}, {left[0]} among them): "
        f"others: average takes the means over the experts"
    ]


def _config(recipe: MoeRecipe, base: MoeSource, modules: Sequence[SmileModule], name: str, auto: str) -> dict[str, Any]:
    config = {key: value for key, value in base.checkpoint.config.items() if key != "_name_or_path"}
    stem = CODE_FILE.removesuffix(".py")
    config |= {
        "architectures": [name],
        "model_type": f"smile_{config['model_type']}",
        "auto_map": {"AutoConfig": f"{stem}.SmileConfig", auto: f"{stem}.{name}"},
        "smile": {
            "experts": len(recipe.experts),
            "experts_per_token": recipe.experts_per_token,
            "gate_rank": recipe.gate_rank,
            "modules": {each.name: [each.rank, each.rows, each.bias] for each in modules},
        },
    }
    return config | ({"dtype": recipe.dtype} if recipe.dtype else {})
