"""A plain function as a merging method."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from merging.errors import OptionError
from merging.maths.coefficients import spread
from merging.maths.delta import Delta, Dense, Stack
from merging.maths.lazy_torch import Tensor
from merging.maths.parameters import Coefficient, Local, PerModel
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Method, Statistics, build
from merging.methods.registry import declare
from merging.type_checks import check_types

__all__ = ["OPTIONS", "FunctionMethod", "method"]

OPTIONS = frozenset(
    {
        "address",
        "allow_different_bases",
        "allow_nonfinite",
        "allow_unmatched",
        "as",
        "as_json",
        "as_trained",
        "base",
        "blocks",
        "calibrate",
        "chat_template",
        "cluster",
        "component",
        "components",
        "debug",
        "dequantise",
        "dequantize",
        "device",
        "dry_run",
        "dtype",
        "elements",
        "energy",
        "engine",
        "exclude",
        "experts",
        "format",
        "h",
        "help",
        "intruder_factor",
        "json",
        "keep_stages",
        "kind",
        "layers",
        "lenient",
        "lora_alpha",
        "m",
        "max_memory",
        "method",
        "models",
        "o",
        "on_mismatch",
        "out_proj_once",
        "output",
        "overwrite",
        "parts",
        "private",
        "progress",
        "quantize",
        "push",
        "quiet",
        "rank",
        "recipe",
        "recipe_only",
        "recipes",
        "reduce_intruders",
        "report",
        "resume",
        "set",
        "settings",
        "shard_size",
        "size",
        "stats",
        "stream",
        "threads",
        "tokenizer",
        "version",
        "vocabulary",
        "worker_cpus",
        "worker_gpus",
        "workers",
    }
)
"""The names of the options of every merge, in Python and on the command line."""


class FunctionMethod(Method):
    """A method whose merge of one tensor is a function; calling it gives the method with other parameters."""

    function: ClassVar[Callable[..., Tensor]]
    """The function that was decorated."""
    space: ClassVar[Literal["delta", "weights"]] = "delta"
    needs: ClassVar[Grain] = "matrix"
    takes_site: ClassVar[bool] = False
    each_model: ClassVar[frozenset[str]] = frozenset()
    """The parameters that the function receives as a list with one value for each model."""

    def __call__(self, **parameters: Any) -> Method:
        """Return the method with these parameters. Raises :class:`~merging.errors.OptionError`."""
        return build(type(self), parameters)

    @property
    def merge_space(self) -> Literal["delta", "weights"]:
        return self.space

    def grain_at(self, site: Site) -> Grain:
        return self.needs

    def merge(self, stack: Stack, site: Site, statistics: Statistics) -> Delta:
        values = stack.dense()
        fields = {field: getattr(self, field) for field in type(self).model_fields}
        parameters = {f: spread(v, len(values)) if f in self.each_model else v for f, v in fields.items()}
        merged = type(self).function(values, *((site,) if self.takes_site else ()), **parameters)
        # steps in float64 are done on the CPU where a device has none, and their results may be there
        there = isinstance(merged, Tensor) and merged.device.type in (values.device.type, "cpu")
        if isinstance(merged, Tensor) and (
            not merged.is_floating_point() or merged.layout != values.layout or not there
        ):
            raise OptionError(
                f"{self.name} made {site.name} as {merged.dtype}, {merged.layout}, on {merged.device}, and a method "
                f"makes a dense tensor of floating-point numbers where each model's is, on {values.device} here"
            )
        if not isinstance(merged, Tensor) or merged.shape != values.shape[1:]:
            shape = f"shape {list(merged.shape)}" if isinstance(merged, Tensor) else f"type {type(merged).__name__}"
            raise OptionError(
                f"{self.name} made a result of the {shape} of {site.name}, and a method makes one tensor of the shape "
                f"of each model's, {list(values.shape[1:])} here"
            )
        return Dense(merged.to(values))


@check_types("name", "space", "needs", "models")
def method(
    name: str,
    *,
    summary: str = "",
    paper: str = "",
    space: Literal["delta", "weights"] = "delta",
    needs: Grain = "matrix",
    models: tuple[int, int | None] = (1, None),
) -> Callable[[Callable[..., Tensor]], FunctionMethod]:
    """Make a merging method of a function.

    The function takes the tensor ``[n, *shape]`` of n models, side by side, and returns the merged one, ``[*shape]``.
    It must not change its argument, nor depend on anything else, such as a random state. A second positional
    parameter receives the :class:`~merging.maths.site.Site` of the tensor.

    Keyword-only parameters, each with a type and a default, are the parameters of the method: options of the command
    line and keys of recipes. A ``float`` may differ from place to place. For a ``list[float] = [1.0]`` the function
    receives one value for each model. Bounds and help are annotations:
    ``Annotated[float, Field(ge=0), "share that is kept"]``.

    From then on the name works like the name of a built-in method, in this process. A package offers it to others by an
    entry point: ``[project.entry-points."merging.methods"]``, ``trimmed_mean = "module:trimmed_mean"``.

    Args:
        name: its name in chains, in lower case; hyphens count as underscores.
        summary: one line for lists; by default the first line of the docstring.
        paper: title, authors and year of the paper.
        space: merge the models' changes from a base (``"delta"``) or their weights.
        needs: the smallest piece of a tensor on which the function is exact: all of it (``"matrix"``, whatever the
            tensor is), whole rows in memory (``"row"``), or any elements (``"element"``, the fastest, in least memory).
        models: the fewest and the most models; None is no limit.

    Returns:
        A decorator. It returns a :class:`~merging.methods.contract.method.Method` with the default parameters; calling
        that gives one with others: ``trimmed_mean(trim=2)``.

    Raises:
        OptionError: the name is taken, or a parameter of the function cannot be a parameter of a method.

    Example:
        >>> import merging, torch
        >>> @merging.method("trimmed_mean", needs="element")
        ... def trimmed_mean(deltas: torch.Tensor, *, trim: int = 1, scale: float = 1.0) -> torch.Tensor:
        ...     "Mean of the changes without the largest and the smallest."
        ...     return deltas.sort(0).values[trim : len(deltas) - trim].mean(0) * scale
        >>> models = [{"w": torch.tensor([value])} for value in (1.0, 2.0, 9.0)]
        >>> merging.merge_state_dicts(models, base={"w": torch.zeros(1)}, method="trimmed_mean", scale=0.5)
        {'w': tensor([1.])}
    """
    if not isinstance(name, str):
        raise OptionError(f"a method is declared with its name, @merging.method('name'), and here is {name!r:.80}")
    known = name.replace("-", "_")
    _check_words(known, space, needs, models)

    def decorate(function: Callable[..., Tensor]) -> FunctionMethod:
        if not inspect.isfunction(function):
            raise OptionError(f"{known}: a method is made of a function (def), and here is {function!r:.80}")
        fields, takes_site = _fields(function, known)
        definitions: dict[str, Any] = {field.name: (field.type, field.info) for field in fields}
        text = inspect.getdoc(function) or ""
        cls = create_model(
            function.__name__, __base__=FunctionMethod, __module__=function.__module__, __doc__=text, **definitions
        )
        cls.__qualname__ = function.__qualname__
        cls.name, cls.paper, cls.models = known, paper, models
        cls.summary = summary or text.partition("\n")[0].rstrip(".") or known
        cls.function, cls.space, cls.needs = staticmethod(function), space, needs
        cls.takes_site = takes_site
        cls.each_model = frozenset(field.name for field in fields if field.each_model)
        build(cls, {field.name: cls.model_fields[field.name].default for field in fields})  # checked
        declare(cls)
        return cls()

    return decorate


def _check_words(name: str, space: Any, needs: Any, models: Any) -> None:
    """Refuse a declaration that no type checker saw: an unknown word would count as another one."""
    for option, value, words in (("space", space, ("delta", "weights")), ("needs", needs, get_args(Grain))):
        if value not in words:
            raise OptionError(f"{name}: {option} = {value!r}: use one of {', '.join(words)}")
    fewest, most = models if isinstance(models, tuple) and len(models) == 2 else (0, None)
    whole = isinstance(fewest, int) and (most is None or isinstance(most, int))
    if not whole or fewest < 1 or (most is not None and most < fewest):
        raise OptionError(f"{name}: models = {models!r}: write the fewest and the most, such as (2, None)")


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of a function as a field; with ``each_model`` the function gets a list with one value a model."""

    name: str
    type: Any
    info: Any
    each_model: bool = False


def _fields(function: Callable[..., Tensor], name: str) -> tuple[list[_Parameter], bool]:
    """Return the fields of a function's parameters, and whether the function takes the site."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, SyntaxError, AttributeError, TypeError) as error:
        raise OptionError(f"{name}: a type of its parameters is not known: {error}") from None
    positional: list[str] = []
    fields: list[_Parameter] = []
    for field, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional.append(field)
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise OptionError(f"{name}: *{field} cannot be a parameter of a method: write each one out")
        if field not in hints or parameter.default is parameter.empty:
            raise OptionError(f"{name}: the parameter {field!r} needs a type and a default, as scale: float = 1.0")
        if field.startswith("_") or field in ("then", *OPTIONS, *dir(FunctionMethod)):
            raise OptionError(
                f"{name}: {field!r} cannot name a parameter, as all merges or methods have it: choose another name"
            )
        fields.append(_field(name, field, hints[field], parameter.default))
    if not 1 <= len(positional) <= 2:
        raise OptionError(
            f"{name}: the function takes the models' tensors, may take the site, and has all other parameters after *"
        )
    return fields, len(positional) == 2


def _field(method: str, name: str, hint: Any, default: Any) -> _Parameter:
    """Return the field of one parameter, from its type, the notes on it, and its default."""
    kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    infos = [note for note in notes if isinstance(note, FieldInfo)]
    texts = [note for note in notes if isinstance(note, str)] + [info.description for info in infos]
    bounds = [note for info in infos for note in info.metadata]
    bounds += [note for note in notes if not isinstance(note, (str, FieldInfo))]
    each_model = get_origin(kind) is list and get_args(kind) == (float,)
    if each_model:
        if not isinstance(default, (list, tuple)) or len(default) != 1:
            raise OptionError(f"{method}: the default of {name!r} is a list of one number, which all models have")
        (default,) = default
    if each_model or kind is float:
        number: Any = Annotated[(float, Field(allow_inf_nan=False), *bounds)] if bounds else Coefficient
        varying: Any = PerModel if each_model else Local
        kind = varying[number]
    elif bounds:
        kind = Annotated[(kind, *bounds)]
    return _Parameter(name, kind, Field(default, description=next(filter(None, texts), "")), each_model)
