"""The plan of a mixture, made of headers: every tensor of the output, and all refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from merging.display.tables import plural
from merging.errors import InputError, nearest
from merging.hub.open_model import require_full
from merging.maths.layers import Stacks
from merging.moe.architectures import PARTS, MoeArchitecture, select_architecture
from merging.moe.config import moe_config
from merging.moe.hidden_states import EMBEDDING
from merging.moe.parts import CopiedTensor, OutputPart
from merging.moe.recipe import MoeRecipe
from merging.moe.source import MoeSource, open_moe_source
from merging.plan.provenance import SourceRecord, record_source
from merging.plan.recipe import DTYPES
from merging.sources import Model
from merging.sources.checkpoint import config_layers
from merging.storage.output_tensor import OutputTensor

__all__ = ["MoePlan", "plan_moe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoePlan:
    """A mixture before it is made.

    Attributes:
        recipe: the recipe.
        architecture: the name of its type.
        base: the base.
        experts: the experts, the shared one last.
        config: the config.json of the output.
        parts: the tensors that are made of the models' tensors.
        routers: the tensors of the routers, by layer.
        shared_routers: the tensors of the gates of the shared expert, by layer.
        code: the program that the output brings, by the name of its file.
        records: the records of the models for the header; None where they are still to be made.
        notices: remarks for people.
    """

    recipe: MoeRecipe
    architecture: str
    base: MoeSource
    experts: tuple[MoeSource, ...]
    config: dict[str, Any]
    parts: tuple[OutputPart, ...]
    routers: tuple[OutputTensor, ...] = ()
    shared_routers: tuple[OutputTensor, ...] = ()
    code: dict[str, str] = field(default_factory=dict)
    records: tuple[SourceRecord, ...] | None = None
    notices: tuple[str, ...] = ()

    @property
    def outs(self) -> list[OutputTensor]:
        """All tensors of the output, in the order of their files."""
        return [out for part in self.parts for out in part.outs] + [*self.routers, *self.shared_routers]

    @property
    def out_bytes(self) -> int:
        """The size of the tensors in bytes."""
        return sum(out.nbytes for out in self.outs)

    def record_sources(self) -> tuple[SourceRecord, ...]:
        """Return the records of all models under their names in the recipe. Samples of their values are read."""
        entries = [*self.recipe.experts, *self.recipe.shared_experts]
        named = [(self.recipe.base_model, self.base)]
        named += zip((each.source_model for each in entries), self.experts, strict=True)
        models: dict[str, Model] = {}
        for name, source in named:
            first = source.checkpoint if name.lora or source.adapter is None else source.adapter
            models[name.model] = first
            if name.lora and source.adapter:
                models[name.lora] = source.adapter
        return tuple(record_source(name, model) for name, model in models.items())

    @property
    def sources(self) -> list[MoeSource]:
        """The base and the experts, each checkpoint and adapter once."""
        models = (self.base, *self.experts)
        found = {(str(each.checkpoint.path), each.adapter and str(each.adapter.path)): each for each in models}
        return list(found.values())


def plan_moe(recipe: MoeRecipe) -> MoePlan:
    """Plan a mixture of dense experts with routers; only headers are read.

    Raises:
        InputError: for models that do not fit together.
        OptionError: for a recipe that no type of mixture can carry out.
    """
    base = open_moe_source(recipe.base_model)
    require_full(base.checkpoint, base.name, "base_model")
    architecture = select_architecture(recipe, base)
    layers = _count_layers(base)
    copied = architecture.list_copied(base)
    named = [*recipe.experts, *recipe.shared_experts]
    sources = tuple(open_moe_source(expert.source_model, base) for expert in named)
    for source in sources:
        _check_expert(source, base, architecture, layers)
    config = moe_config(recipe, architecture, base)
    type_of = _type(recipe)
    parts: list[OutputPart] = []
    for name in copied:
        stored = base.find_stored(name)
        out = OutputTensor(name, type_of or stored.dtype_name, stored.shape)
        parts.append(CopiedTensor(out=out, source=base, name=name))
    for layer in range(layers):
        for index, source in enumerate(sources):
            parts += _expert(recipe, architecture, layer=layer, index=index, source=source, base=base)
    hidden = base.find_stored(EMBEDDING).shape[1]
    dtype = type_of or base.find_stored(f"model.layers.0.mlp.{PARTS[0]}.weight").dtype_name
    count = len(recipe.experts)
    shared = bool(recipe.shared_experts) and architecture.shared_gate
    return MoePlan(
        recipe=recipe,
        architecture=architecture.title,
        base=base,
        experts=sources,
        config=config,
        parts=tuple(parts),
        routers=tuple(OutputTensor(architecture.router(i), dtype, (count, hidden)) for i in range(layers)),
        shared_routers=tuple(
            OutputTensor(architecture.shared_router(i), dtype, (1, hidden)) for i in range(layers if shared else 0)
        ),
        notices=tuple(_notices(recipe, architecture, sources)),
    )


def _type(recipe: MoeRecipe) -> str | None:
    return DTYPES[recipe.dtype] if recipe.dtype else None


def _count_layers(base: MoeSource) -> int:
    """Return the number of layers, which config and names must agree on."""
    tensors = base.checkpoint.tensors
    if EMBEDDING not in tensors:
        near = nearest(EMBEDDING, tensors)
        raise InputError(f"{base.name}: has no {EMBEDDING}{near}: give a model with its language-model head")
    counted = Stacks.from_names(tensors).lengths.get("model.layers", 1)
    stated = config_layers(base.checkpoint.config)
    if stated is not None and stated != counted:
        raise InputError(f"{base.name}: its config states {stated} layers, and its tensors are of {counted}")
    return counted


def _check_expert(source: MoeSource, base: MoeSource, architecture: MoeArchitecture, layers: int) -> None:
    """Refuse an expert whose MLPs do not fit into the base. Raises :class:`~merging.errors.InputError`."""
    kind, wanted = source.checkpoint.config.get("model_type"), architecture.dense
    if kind not in wanted:
        raise InputError(
            f"{source.name}: is a model of type {kind}, and the experts of a {architecture.title} mixture are "
            f"{' or '.join(wanted)} models"
        )
    ours, theirs = (each.checkpoint.config.get("hidden_act", "silu") for each in (base, source))
    if ours != theirs:
        raise InputError(f"{source.name}: its hidden_act is {theirs}, and the base's is {ours}")
    counted = Stacks.from_names(source.checkpoint.tensors).lengths.get("model.layers", 1)
    if counted != layers:
        raise InputError(f"{source.name}: has {counted} layers, and {base.name} has {layers}")
    for layer in range(layers):
        for part in PARTS:
            name = f"model.layers.{layer}.mlp.{part}.weight"
            for each in (base, source):
                if name not in each.checkpoint.tensors:
                    raise InputError(f"{each.name}: has no {name}, which an expert is made of")
                if not each.find_stored(name).floating:
                    raise InputError(
                        f"{each.name}: {name} is {each.find_stored(name).dtype_name}, which are no plain numbers"
                    )
            shape, wanted_shape = source.find_stored(name).shape, base.find_stored(name).shape
            if shape != wanted_shape:
                raise InputError(f"{source.name}: {name} is {list(shape)}, and {base.name} has {list(wanted_shape)}")


def _expert(
    recipe: MoeRecipe, architecture: MoeArchitecture, *, layer: int, index: int, source: MoeSource, base: MoeSource
) -> list[OutputPart]:
    """Return the three matrices of an expert in a layer; the shared expert comes behind the others."""
    made: list[OutputPart] = []
    expert = [*recipe.experts, *recipe.shared_experts][index]
    shared = index >= len(recipe.experts)
    for part, dense in enumerate(PARTS):
        name = f"model.layers.{layer}.mlp.{dense}.weight"
        new = architecture.shared_expert(layer, part) if shared else architecture.expert(layer, index, part)
        stored = source.find_stored(name)
        scale = 1.0 if expert.residual_scale is None or dense != "down_proj" else expert.residual_scale
        made.append(
            CopiedTensor(
                out=OutputTensor(new, _type(recipe) or base.find_stored(name).dtype_name, stored.shape),
                source=source,
                name=name,
                scale=scale,
                noise=expert.noise_scale or 0.0,
                place=("moe noise", recipe.seed, index, name),
            )
        )
    return made


def _notices(recipe: MoeRecipe, architecture: MoeArchitecture, sources: Sequence[MoeSource]) -> list[str]:
    notices = []
    for source in sources:
        unused = [name for name in source.changes if ".mlp." not in name]
        if unused:
            notices.append(
                f"{source.name}: its LoRA also changes {plural(len(unused), 'tensor')} outside the MLPs ({unused[0]}), "
                f"which are left out: experts are MLPs, and all else is the base's"
            )
    given = [each.source_model for each in recipe.experts if each.positive_prompts or each.negative_prompts]
    if given and not recipe.prompted:
        notices.append(f"the prompts of {given[0]} are not used: gate_mode is {recipe.gate_mode}")
    if architecture.model_type == "deepseek":
        notices.append(
            "transformers has no DeepSeek-MoE of its own: it needs trust_remote_code=True and code from the Hub, and "
            "vLLM reads the folder as it is; architecture: mixtral, or qwen with a shared expert, needs no such code"
        )
    return notices
