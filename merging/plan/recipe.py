"""The declarative merge: which models, by which method, into what. It says all that decides the output's bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

import yaml
from pydantic import ConfigDict, Field, SerializeAsAny, field_validator, model_validator

import merging
from merging.cluster.settings import RayCluster
from merging.display.progress import Progress
from merging.display.tables import Displayed
from merging.errors import OptionError
from merging.maths.lazy_torch import torch
from merging.methods.contract.method import Method
from merging.plan import layer_stack
from merging.plan.as_trained import AsTrained
from merging.plan.checked_model import CheckedModel
from merging.plan.extracted_parts import ExtractedParts
from merging.plan.intruder_settings import IntruderChoice
from merging.plan.layer_stack import LayerPart, LayerStack
from merging.plan.rank_settings import RankChoice
from merging.plan.recipe_forms import FilePaths, QuantizedFormat, make_chain, read_quantized, stated_parameters
from merging.plan.sizes import parse_size
from merging.plan.tokens.settings import TokenizerSettings
from merging.sources.dtypes import plain_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Unpack

    from merging.api.options import RecipeOptions

__all__ = ["DTYPES", "FIELDS", "AdapterFormat", "Entry", "Experts", "Recipe", "plain_entry"]

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The types an output can be asked in, and their names in safetensors files."""


Experts = Literal["together", "apart"]
"""How a merged adapter names what it changes in experts: as the model in memory does, or each expert by itself."""


AdapterFormat = Literal["peft", "diffusers", "kohya", "gguf"]
"""Whose files a merged adapter can be in."""


Entry: TypeAlias = Union[str, LayerStack, "Recipe"]
"""A model of a recipe: its name, a stack of layers, or a recipe whose output it is."""


class Recipe(Displayed, CheckedModel):
    """Everything about a merge but where it runs and where it goes. Frozen, comparable, and the same through YAML.

    Example:
        >>> import merging
        >>> recipe = merging.Recipe(models=["a", "b"], method="linear")
        >>> recipe.run("merged").kind, merging.load_recipe(recipe.to_yaml()) == recipe
        ('adapter', True)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    models: Annotated[
        tuple[Entry, ...],
        Field(
            min_length=1,
            description="the models, in the order of their weights: names, recipes themselves, or layers of a model",
        ),
    ]
    method: SerializeAsAny[Method]
    base: Entry | None = Field(None, description="the model that the others were trained from, in the same forms")
    kind: Literal["adapter", "model"] | None = Field(
        None, alias="as", description="write an adapter or a full model; by default adapters make an adapter"
    )
    format: AdapterFormat | None = Field(
        None,
        description="whose files a merged adapter is in; by default it keeps the inputs' names and form where they "
        "agree, else peft, or diffusers if none of them is PEFT's",
    )
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = Field(
        None, description="type of every tensor; by default the base's, or the widest among adapters"
    )
    rank: RankChoice = Field(
        None,
        description="rank of a merged adapter, by default the sum of the ranks; or conditions by which each tensor's "
        "rank is chosen: most, energy, error, sv_ratio, size, uniform, exact",
    )
    parts: ExtractedParts | None = Field(
        None,
        description="parts of full models that go into an adapter: include, embeddings, heads, norms, biases",
    )
    experts: Experts = Field(
        "together",
        description="factors of experts in a merged adapter: stacked, as PEFT trains them, or apart, with names for "
        "each expert, as llama.cpp and SGLang read them",
    )
    layers: int | None = Field(
        None, ge=1, description="number of blocks, instead of the number in the base or the adapters"
    )
    lora_alpha: float | None = Field(
        None, gt=0, le=1e6, allow_inf_nan=False, description="LoRA alpha of adapters, instead of what they state"
    )
    reduce_intruders: IntruderChoice = Field(
        None,
        description="reduce intruder dimensions of adapters, new leading singular directions of the changed weight: "
        "true, or factor, threshold and leading",
    )
    out_proj_once: bool = Field(
        False, description="count LoRA on the output of torch's MultiheadAttention once; PEFT up to 0.21 adds it twice"
    )
    shard_size: int = Field(5_000_000_000, ge=1, description="most bytes in one file of a model's folder")
    on_mismatch: Literal["error", "base"] = Field(
        "error", description="tensors that differ in shape or that some model lacks: refuse, or keep the base's"
    )
    vocabulary: Literal["error", "base", "largest"] = Field(
        "error",
        description="models with vocabularies of different sizes: refuse, keep the base's rows, or all rows there are",
    )
    tokenizer: TokenizerSettings | None = Field(
        None,
        description="match the rows of vocabularies by token, for the union of all tokens, or the tokens of the base "
        "or of a model; also a mapping with source, tokens and pad_to_multiple_of",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="chat template of the output: auto for the commonest among the models, chatml, llama3, mistral, "
        "alpaca or exaone, a Jinja file, or a Jinja text",
    )
    components: tuple[str, ...] = Field(
        (), description="parts of a pipeline that are merged, such as unet; by default all, else the base's are kept"
    )
    dequantise: bool = Field(
        False,
        alias="dequantize",
        description="read weights quantised in a simple way (FP8, FP4, 8-bit, NF4, GPTQ, AWQ, GGUF) as numbers",
    )
    as_trained: AsTrained | None = Field(
        None,
        description="add changes to the base as bitsandbytes quantised it for their training: nf4, fp4 or int8; also a "
        "mapping with format, double_quant, block_size, dtype, skip and device",
    )
    quantize: QuantizedFormat | None = Field(
        None,
        description="format of a full model's weights: keep for the base's own, tensor by tensor, fp8 (blocks of 128 x "
        "128), fp8-channel, fp8-tensor, mxfp4 (gpt-oss), or none, which is dequantize",
    )
    stats: FilePaths = Field((), description="statistics of the models on examples, from merge stats: a file each")
    exclude: tuple[str, ...] = Field((), description="tensors that are left as in the base: names, parts, or wildcards")
    allow_different_bases: bool = Field(False, description="merge adapters that say they have different bases")
    allow_nonfinite: bool = Field(False, description="merge inputs that hold NaN or infinities")
    allow_unmatched: bool = Field(
        False, description="name patterns in parameters that match no tensor, instead of refusing them"
    )

    if TYPE_CHECKING:  # for type checkers of users, who write other types than the fields have

        def __init__(
            self,
            *,
            models: Sequence[Path | Entry],
            method: str | Method,
            parameters: Mapping[str, Any] | None = None,
            **options: Unpack[RecipeOptions],
        ) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _resolve_forms(cls, values: Any) -> Any:
        return make_chain(read_quantized(values)) if isinstance(values, dict) else values

    @field_validator("method", mode="before")
    @classmethod
    def _is_method(cls, value: Any) -> Any:
        if not isinstance(value, Method):
            raise ValueError("should be a name or a method")
        return value

    @field_validator("exclude", "components", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_name(cls, value: Any) -> Any:
        """Accept torch's own types, such as ``torch.bfloat16``."""
        return plain_dtype(value)

    @field_validator("shard_size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_size(value, "shard_size") if isinstance(value, str) else value

    @field_validator("chat_template", mode="before")
    @classmethod
    def _template_path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("models", "base", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(cls._paths, value))
        value = str(value) if isinstance(value, Path) else value
        if isinstance(value, str) and value.encode(errors="replace").decode() != value:
            raise OptionError(f"{value}: the name is not Unicode, so that no recipe could state it: rename it")
        return value

    def _display_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    def run(
        self,
        output: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        max_memory: int | str | None = None,
        overwrite: bool = False,
        stream: bool = False,
        progress: Progress | bool | None = None,
        keep_stages: str | Path | None = None,
        resume: bool | None = None,
        engine: str | RayCluster = "local",
        address: str | None = None,
        report: str | Path | None = None,
    ) -> merging.Merged:
        """Carry out the merge, as :func:`~merging.merge` does with the same models, method and options.

        Args:
            output: the file or folder to write.
            device: ``cpu``, ``cuda`` for all such GPUs, ``cuda:0,1`` for some, ``mps``, ``xpu``, or ``auto``.
            threads: the number of threads; by default one for each processor core, as far as the memory allows.
            max_memory: the most memory to take, in bytes or as ``"500MB"``, above the memory of the imports.
            overwrite: whether an output that exists is replaced.
            stream: whether models of the Hub and of stores pass through the disk file by file, and stay in no cache.
            progress: True for a bar, or a function that receives the bytes done and the bytes in all.
            keep_stages: a folder for the outputs of recipes among the models, each in a folder of its own.
            resume: whether a merge that stopped is gone on with, as for :func:`~merging.merge`.
            engine: ``local``, ``ray``, or a Ray cluster, as for :func:`~merging.merge`.
            address: ``HOST:PORT`` of the Ray cluster, as for :func:`~merging.merge`.
            report: a page to write of the merge, as for :func:`~merging.merge`.

        Returns:
            The path and the kind of the output, its size, remarks, and numbers that the method reports.

        Raises:
            MergingError: for everything that :func:`~merging.merge` refuses.
        """
        options = {name: getattr(self, name) for name in type(self).model_fields if name not in ("models", "method")}
        return merging.merge(
            self.models,
            method=self.method,
            output=output,
            device=device,
            threads=threads,
            max_memory=max_memory,
            overwrite=overwrite,
            stream=stream,
            progress=progress,
            keep_stages=keep_stages,
            resume=resume,
            engine=engine,
            address=address,
            report=report,
            **options,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults in plain values; a stack of layers by itself is ``stack``.

        Raises :class:`~merging.errors.OptionError` if a coefficient is a tensor of a size that has no plain form.
        """
        values = self._plain_fields()
        (first, *others), own = values["models"], values["method"] == "passthrough" and "parameters" not in values
        if others or not own or not isinstance(first, dict) or "stack" not in first:
            return values
        return first | {key: value for key, value in values.items() if key not in ("models", "method")}

    def _plain_fields(self) -> dict[str, Any]:
        values: dict[str, Any] = {"models": [plain_entry(each) for each in self.models], "method": self.method.chain}
        parameters = stated_parameters(self.method)
        if parameters:
            values["parameters"] = parameters
        if self.base is not None:
            values["base"] = plain_entry(self.base)
        rest = self.model_dump(exclude={"models", "method", "base"}, exclude_defaults=True, by_alias=True)
        return values | {key: list(value) if isinstance(value, tuple) else value for key, value in rest.items()}

    def to_yaml(self) -> str:
        """Return the recipe as YAML, which :func:`~merging.load_recipe` reads back to an equal one."""
        facts = self.to_dict()
        text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
        plain = text.replace("\n", "").isprintable()  # else with escapes, which every terminal takes
        return text if plain else yaml.safe_dump(facts, sort_keys=False)


vars(layer_stack).update(Entry=Entry, Recipe=Recipe)  # names of its annotations, which its file cannot import
for _model in (LayerPart, LayerStack, Recipe):
    _model.model_rebuild(force=True)

FIELDS = frozenset(name for field, info in Recipe.model_fields.items() for name in (field, info.alias) if name)
"""The fields of recipes by all their names; every other option is a parameter of the method."""


def plain_entry(entry: Entry) -> Any:
    """Return an entry of a recipe in plain values."""
    if isinstance(entry, str):
        return entry
    return entry.to_dict() if isinstance(entry, LayerStack) else entry._plain_fields()
