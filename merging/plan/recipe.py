"""The declarative merge: which models, by which method, into what. It says all that decides the output's bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from merging.errors import FormatError, OptionError, nearest
from merging.maths.parameters import plain
from merging.methods import chain, parameters_of
from merging.methods.contract.method import Method
from merging.sources.plain_yaml import FAULTS, check_yaml

__all__ = ["DTYPES", "FIELDS", "AdapterFormat", "Experts", "Recipe", "load_recipe"]

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The types an output can be asked in, and their names in safetensors files."""


Experts = Literal["together", "apart"]
"""How a merged adapter names what it changes in experts: as the model in memory does, or each expert by itself."""


AdapterFormat = Literal["peft", "diffusers", "kohya"]
"""Whose files a merged adapter can be in."""


class Recipe(BaseModel):
    """Everything about a merge but where it runs and where it goes. Frozen, comparable, and the same through YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    models: Annotated[tuple[str, ...], Field(min_length=1, description="the models, in the order of their weights")]
    method: SerializeAsAny[Method]
    base: str | None = Field(None, description="the model that the others were trained from")
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
    rank: int | None = Field(None, ge=1, description="rank of a merged adapter; by default the sum of the ranks")
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
    components: tuple[str, ...] = Field(
        (), description="parts of a pipeline that are merged, such as unet; by default all, else the base's are kept"
    )
    dequantise: bool = Field(
        False,
        alias="dequantize",
        description="read weights that are quantised in a simple way (FP8, MXFP4, 8-bit) as ordinary numbers",
    )
    exclude: tuple[str, ...] = Field((), description="tensors that are left as in the base: names, parts, or wildcards")
    allow_different_bases: bool = Field(False, description="merge adapters that say they have different bases")
    allow_nonfinite: bool = Field(False, description="merge inputs that hold NaN or infinities")

    @model_validator(mode="before")
    @classmethod
    def _chain(cls, values: Any) -> Any:
        """A method may be given as it is written, a chain and its parameters by name."""
        if isinstance(values, dict) and isinstance(values.get("method"), str):
            values = dict(values)
            parameters = values.pop("parameters", None) or {}
            if not isinstance(parameters, dict) or not all(isinstance(key, str) for key in parameters):
                raise OptionError(f"parameters should be a mapping of names to values, and is {parameters!r}")
            values["method"] = chain(values["method"], parameters)
        return values

    @field_validator("exclude", "components", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("models", "base", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(cls._paths, value))
        value = str(value) if isinstance(value, Path) else value
        if isinstance(value, str) and value.encode(errors="replace").decode() != value:
            raise OptionError(f"{value}: the name is not Unicode, so that no recipe could state it: rename it")
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults, in plain values: the chain as written, its parameters by
        name.

        Raises :class:`~merging.errors.OptionError` if a coefficient is a tensor of a size that has no plain form.
        """
        values: dict[str, Any] = {"models": list(self.models), "method": self.method.chain}
        parameters = _parameters(self.method)
        if parameters:
            values["parameters"] = parameters
        rest = self.model_dump(exclude={"models", "method"}, exclude_defaults=True, by_alias=True)
        return values | {key: list(value) if isinstance(value, tuple) else value for key, value in rest.items()}

    def to_yaml(self) -> str:
        """Return the recipe as YAML, which :func:`load_recipe` reads back to an equal one."""
        facts = self.to_dict()
        text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
        plain = text.replace("\n", "").isprintable()  # else with escapes, which every terminal takes
        return text if plain else yaml.safe_dump(facts, sort_keys=False)


FIELDS = frozenset(name for field, info in Recipe.model_fields.items() for name in (field, info.alias) if name)
"""The fields of recipes by all their names; every other option is a parameter of the method."""


def _parameters(method: Method) -> dict[str, Any]:
    links = method.links()
    fields = [field for link in links for field in parameters_of(type(link))]
    return {
        f"{link.name}.{field}" if fields.count(field) > 1 else field: plain(getattr(link, field))
        for link in links
        for field in parameters_of(type(link))
        if plain(getattr(link, field)) != plain(type(link).model_fields[field].default)
    }


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Make a recipe from plain values.

    Raises :class:`~merging.errors.OptionError`, with the field and the values it accepts.
    """
    if not isinstance(values.get("method", ""), (str, Method)):
        raise OptionError(f"{where}: method should be a name, and is {str(values['method'])[:80]!r}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = [info.alias or name for name, info in Recipe.model_fields.items()] + ["parameters"]
            raise OptionError(
                f"{where}: there is no {field!r}{nearest(field, known)}: use {', '.join(known)}"
            ) from None
        raise OptionError(f"{where}: {field}: {first['msg']} (it is {first['input']!r})") from None


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, as one of the two would be lost, and 1:2 is not a number.

    To YAML 1.1 it is one of base 60; here it is a value that runs from block to block.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; an alias stands for a value or a list of values, as deeper ones can grow without end."""
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        if alias is not None and isinstance(node, yaml.CollectionNode):
            flat = isinstance(node, yaml.SequenceNode) and all(isinstance(each, yaml.ScalarNode) for each in node.value)
            if not flat or node.end_mark is None:
                raise yaml.composer.ComposerError(
                    None, None, f"*{alias.anchor} is not a list of values", alias.start_mark
                )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node, its keys each seen once."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _unless_sexagesimal(construct: Callable[[_Loader, yaml.ScalarNode], Any]) -> Callable[..., Any]:
    return lambda loader, node: node.value if ":" in node.value else construct(loader, node)


_Loader.add_constructor(
    "tag:yaml.org,2002:timestamp", lambda loader, node: str(node.value)
)  # a name like a date is one
_Loader.add_constructor("tag:yaml.org,2002:int", _unless_sexagesimal(_Loader.construct_yaml_int))
_Loader.add_constructor("tag:yaml.org,2002:float", _unless_sexagesimal(_Loader.construct_yaml_float))


def load_recipe(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe from YAML.

    Args:
        text: the YAML.
        where: the source of the text, which errors name.

    Raises:
        FormatError: for a text that is not a YAML mapping.
        OptionError: for fields or values that no recipe has.
    """
    try:
        check_yaml(text, where)
        values = yaml.load(text, _Loader)
    except FAULTS as error:
        raise FormatError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise FormatError(f"{where}: is nested too deeply to be a recipe") from None
    if not isinstance(values, dict):
        raise FormatError(f"{where}: should be a YAML mapping with models and method")
    return make_recipe(values, where)
