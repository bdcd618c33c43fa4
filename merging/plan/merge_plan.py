"""A plan: the items of a merge, its inputs, and about how much memory and space it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from merging.display.tables import Table, Tabular, count_notices, format_size, plural
from merging.maths.lazy_torch import torch
from merging.plan import estimates
from merging.plan.inputs.vocabulary import Vocabulary
from merging.plan.items import Constant, Item
from merging.plan.outputs.quantized import QuantizedOutput
from merging.plan.provenance import SourceRecord
from merging.plan.recipe import AdapterFormat, Recipe
from merging.plan.stages import Stage, all_stages
from merging.sources import Checkpoint, Model
from merging.storage.output_tensor import OutputTensor

__all__ = ["Plan"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Plan(Tabular):
    """A merge that can be run: all checks that headers allow are done.

    Attributes:
        recipe: the recipe, with models of the Hub named by their commits.
        models: the models, in the order of the recipe.
        base: the base, if there is one.
        keys: one key a model of its content, for methods that draw random numbers.
        output: whether an adapter or a model is written.
        weights: whether weights are merged, and not changes from the base.
        items: one item a tensor, in the order of the files.
        rank: the rank of a merged adapter, the largest of its tensors' ranks.
        ranks: the ranks of single tensors, where they may differ from it.
        sized: returns the plan for ranks that were chosen from the values, where the recipe has conditions on them.
        untied: whether the output writes a head of its own where the base ties it.
        notices: remarks for people.
        matched: one line a model about how its names were matched.
        vocabulary: the output's vocabulary, where the models' vocabularies differ in size.
        chat_template: the text of the output's chat template, where the recipe asks for one.
        format: the name of the form of a merged adapter's file.
        header: the program whose entries the file's header has, if it has any.
        constants: numbers that the file holds in addition to merged tensors.
        quantized: the weights that are written as codes and scales, where the output is quantised.
        sources: records of the models that the recipe names, with keys of their content.
        files: the models in files that are read, by their names in the recipe.
        stages: the merges whose outputs are models of this one.
    """

    recipe: Recipe
    models: tuple[Model, ...]
    base: Checkpoint | None
    keys: tuple[str, ...]
    output: Literal["adapter", "model"]
    weights: bool
    items: tuple[Item, ...]
    rank: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    sized: Callable[[Mapping[str, int]], Plan] | None = None
    untied: bool = False
    notices: tuple[str, ...] = ()
    matched: tuple[str, ...] = field(default=())
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None
    format: str = "peft"
    header: AdapterFormat | None = "peft"
    constants: tuple[Constant, ...] = ()
    quantized: QuantizedOutput | None = None
    sources: tuple[SourceRecord, ...] = ()
    files: Mapping[str, Model] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()

    def _display_table(self) -> Table:
        rank = f" of rank {self.rank}" if self.rank else ""
        by = f"by {self.recipe.method.chain}"
        facts = {
            "base": None if self.base is None else str(self.base.path),
            "reads": format_size(self.read_bytes),
            "writes": f"{format_size(self.out_bytes)} in {plural(len(self.outs), 'tensor')}",
            "memory": f"{format_size(self.memory(1))} with one worker, above the imports",
        }
        models = [("model", str(model.path)) for model in self.models]
        return Table(
            f"Plan: {plural(len(self.models), 'model')} into {self.output}{rank}, {by}",
            rows=[*((name, value) for name, value in facts.items() if value), *models],
            notes=count_notices(self.notices),
        )

    @property
    def reference(self) -> Checkpoint | None:
        """The full model that the output is like: the base, or else the first full model."""
        return self.base or next((model for model in self.models if isinstance(model, Checkpoint)), None)

    @property
    def leaves(self) -> tuple[Model, ...]:
        """The models in files, where models are made of others; else none."""
        entries = [*self.recipe.models, self.recipe.base or ""]
        return tuple(self.files.values()) if any(not isinstance(entry, str) for entry in entries) else ()

    @property
    def kept(self) -> dict[str, Checkpoint]:
        """The components of a pipeline that are not merged, but copied from the reference."""
        components = self.reference.components if self.reference and self.output == "model" else {}
        if not self.recipe.components:
            return {}
        return {name: each for name, each in components.items() if name not in self.recipe.components}

    @property
    def kept_bytes_on_disk(self) -> int:
        """The bytes of the weights that are copied as they are."""
        return sum(stored.nbytes for component in self.kept.values() for stored in component.tensors.values())

    @property
    def outs(self) -> list[OutputTensor]:
        """The tensors of the output, with the largest elements first, so that all are aligned in their file."""
        merged = [out for item in self.items for out in item.outs]
        encodings = self.quantized.encodings if self.quantized else {}
        outs = {
            out.name: out
            for each in merged
            for out in (encodings[each.name].outs if each.name in encodings else (each,))
        }
        outs |= {constant.out.name: constant.out for constant in self.constants}
        return sorted(outs.values(), key=lambda out: -out.itemsize)

    @property
    def out_bytes(self) -> int:
        return sum(out.nbytes for out in self.outs)

    @property
    def read_bytes(self) -> int:
        return sum(item.read_bytes for item in self.items)

    @property
    def widest(self) -> torch.dtype:
        """The widest type that any item is computed in."""
        dtypes = {item.dtype for item in self.items if item.form != "copy"}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    @property
    def kept_bytes(self) -> int:
        """The memory for factors as wrappers transformed them, if later sweeps need it; 0 if that is too much."""
        return estimates.kept_bytes(self.items, self.recipe.method, len(self.models))

    @property
    def spool_bytes(self) -> int:
        """The space on the disk for merged tensors that wait for their factor."""
        return estimates.spool_bytes(self.items, self.recipe.method, len(self.models))

    @property
    def stage_bytes(self) -> int:
        """The space on the disk for stages that are set aside."""
        aside = [stage.plan for stage in all_stages(self.stages) if not stage.lazy]
        return sum(plan.out_bytes for plan in aside) + max((plan.spool_bytes for plan in aside), default=0)

    @property
    def worker_bytes(self) -> int:
        """The memory of one worker, whose buffers fit the largest item, with the unused blocks between them."""
        return estimates.worker_bytes(self.items, self.recipe.method, self.recipe.rank)

    def memory(self, workers: int) -> int:
        """Return the most memory, in bytes above the imports, that a merge by this many workers takes."""
        own = (workers and workers * self.worker_bytes) + self.kept_bytes + estimates.FIXED
        if self.quantized is not None:
            own += estimates.encoding_bytes(self.quantized.encodings.values(), workers)
        return max([own, *(stage.plan.memory(workers) for stage in self.stages if not stage.lazy)])
