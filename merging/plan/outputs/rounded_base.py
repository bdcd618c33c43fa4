"""The base of adapters as it was when they were trained: its linear weights rounded as bitsandbytes quantises them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from merging.errors import InputError, option
from merging.maths.patterns import all_matching
from merging.maths.site import Site
from merging.plan.as_trained import AsTrained
from merging.plan.recipe import DTYPES
from merging.sources import Adapter, Checkpoint, Model
from merging.sources.changes import Change, FullChange
from merging.sources.quantized.bitsandbytes_4bit import FourBit
from merging.sources.quantized.rounded_weights import FourBitRounded, FourBitScheme, Int8Rounded, TurnedRounded
from merging.sources.stored import Stored
from merging.sources.tied_weights import is_head

__all__ = ["RoundedBase", "round_base"]

_EXPERT = re.compile(r"(?:^|\.)experts\.[0-9]+\.")
_ROUTER = re.compile(r"\.(?:gate|router)(?:\.layer)?\.weight$")

_IN_FLOAT32 = {
    **dict.fromkeys(("t5", "mt5", "umt5", "udop", "pop2piano"), ".wo."),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), ".indexer.weights_proj."),
    "WanTransformer3DModel": ".time_embedder.",
}
"""Parts of the names of layers that transformers and diffusers keep in float32, by the type or class of the model."""


@dataclass(frozen=True, slots=True)
class RoundedBase:
    """The weights of a base that are rounded, by name, and remarks for people."""

    weights: Mapping[str, Stored]
    notices: tuple[str, ...] = ()


def round_base(
    settings: AsTrained | None,
    reference: Checkpoint,
    models: Sequence[Model],
    sites: Mapping[str, Site],
    inputs: Sequence[Mapping[str, Stored | Change]],
) -> RoundedBase:
    """Return the linear weights of a base as they were when adapters were trained on it.

    These are the weights that transformers has bitsandbytes quantise: of linear layers, but for the output head, layers
    that it keeps in float32, and modules that the adapters hold in full. In a pipeline they are weights of the
    components that the adapters change.

    Args:
        settings: the settings of the quantisation; None for a base that was not quantised.
        reference: the base.
        models: the models of the merge.
        sites: the sites of the base's tensors, by name.
        inputs: the changes of each model, by the base's names.

    Raises:
        InputError: for full models, and a base that holds no such weight or is quantised itself.
        OptionError: for layers to skip that name no tensor.
    """
    if settings is None:
        return RoundedBase({})
    full_model = next((model for model in models if isinstance(model, Checkpoint)), None)
    if full_model is not None:
        raise InputError(f"{full_model.path}: is a full model, and {option('as_trained')} is of adapters: leave it out")
    quantized = next((name for name in sites if isinstance(reference.tensors.get(name), FourBit)), None)
    if quantized is not None:
        raise InputError(
            f"{reference.path}: {quantized} is quantised by bitsandbytes, and so is already read as it was when the "
            f"adapters were trained: leave {option('as_trained')} out"
        )
    layers = _LinearLayers(reference, models, inputs)
    skipped = all_matching(settings.skip, reference.tensors)
    names = [name for name, site in sites.items() if name not in skipped and layers.is_quantized(name, site)]
    if not names:
        raise InputError(
            f"{reference.path}: holds no weight that bitsandbytes quantises: leave {option('as_trained')} out"
        )
    weights = {name: _round(settings, reference.tensors[name], turned=sites[name].axis == 0) for name in names}
    types = sorted({settings.dtype or str(reference.tensors[name].dtype).removeprefix("torch.") for name in names})
    notices = [
        f"{len(names)} linear weights of {reference.path} are rounded to {settings.describe(types)}, as bitsandbytes "
        f"rounds them"
    ]
    if layers.has_experts and not layers.single_experts:
        notices.append(
            f"{reference.path}: its experts and routers are not rounded, since no adapter changes single experts: "
            f"transformers 5 holds experts stacked, which bitsandbytes does not quantise"
        )
    return RoundedBase(weights, tuple(notices))


class _LinearLayers:
    """The layers of a base that transformers has bitsandbytes quantise, told by names and shapes.

    Attributes:
        has_experts: whether the model has experts that are stored apart, each with matrices of its own.
        single_experts: whether an adapter was trained on such experts as linear layers.
    """

    def __init__(
        self, reference: Checkpoint, models: Sequence[Model], inputs: Sequence[Mapping[str, Stored | Change]]
    ) -> None:
        self._tensors = reference.tensors
        self._of_transformers = reference.library == "transformers"
        kind = reference.config.get("model_type") or reference.config.get("_class_name")
        self._in_float32 = _IN_FLOAT32.get(str(kind), "")
        self._in_full = {name for each in inputs for name, change in each.items() if isinstance(change, FullChange)}
        changed = {name.partition(".")[0] for each in inputs for name in each}
        self._components = changed if reference.components else None
        stacked = [name for name, stored in self._tensors.items() if len(stored.shape) == 3]
        self._mixtures = {name.partition(".experts.")[0] for name in self._tensors if ".experts." in name}
        self._mixtures |= {name.removesuffix(".weight").rpartition(".")[0] for name in stacked}
        self.has_experts = any(_EXPERT.search(name) for name in self._tensors)
        self.single_experts = any(
            _EXPERT.search(target) for model in models if isinstance(model, Adapter) for target in model.changes
        )

    def is_quantized(self, name: str, site: Site) -> bool:
        """Return whether bitsandbytes quantises a tensor."""
        stored = self._tensors.get(name)
        if stored is None or stored.dtype_name not in ("F16", "BF16", "F32"):
            return False
        if site.kind != "matrix" or not name.endswith(".weight") or name in self._in_full:
            return False
        if self._components is not None and name.partition(".")[0] not in self._components:
            return False
        if self._in_float32 and self._in_float32 in name:
            return False
        return not self._of_transformers or not self._is_kept(name)

    def _is_kept(self, name: str) -> bool:
        """Return whether a matrix of a model of transformers stays as it is."""
        if is_head(name) or name == "score.weight":
            return True
        attention = name.removesuffix("out_proj.weight")
        if attention != name and f"{attention}in_proj_weight" in self._tensors:
            return True  # torch's own attention reads this weight by itself
        router = _ROUTER.search(name)
        of_mixture = _EXPERT.search(name) or (router and name[: router.start()] in self._mixtures)
        return bool(of_mixture) and not self.single_experts


def _round(settings: AsTrained, stored: Stored, *, turned: bool) -> Stored:
    """Return a weight as it was at the training; ``turned``: it is stored as inputs by outputs."""
    if settings.format == "int8":
        rounding: Callable[[Stored], Stored] = Int8Rounded
    else:
        scheme = FourBitScheme(
            format=settings.format,
            block=settings.block_size,
            double=settings.doubled,
            dtype_name=DTYPES[settings.dtype] if settings.dtype else stored.dtype_name,
            nearest=settings.device == "gpu",
        )
        rounding = partial(FourBitRounded, scheme=scheme)
    return TurnedRounded(stored, rounding) if turned else rounding(stored)
