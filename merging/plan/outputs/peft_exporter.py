"""A merged LoRA in the files of PEFT: factors by module, biases, tensors in full, and rows of tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from merging.errors import InputError, option
from merging.maths.site import Site
from merging.plan.items import Item
from merging.plan.names.peft_names import PREFIX, FactorPaths, factor_tensors, module_of
from merging.plan.names.resolve import Resolver
from merging.plan.outputs.experts_apart import place_experts
from merging.plan.outputs.exporter import Changes, Exporter, is_bias, is_experts, is_lora
from merging.plan.recipe import AdapterFormat
from merging.sources import Adapter
from merging.sources.stored import Stored
from merging.sources.token_rows import TokenRows, TokenTable
from merging.storage.output_tensor import OutputTensor

__all__ = ["PeftExporter"]


class PeftExporter(Exporter):
    """Lays out the items of a merged LoRA as PEFT does.

    Args:
        labels: the name of each target in PEFT's files.
        targets: the changes of each target.
        factored: the targets that become factors.
        ranks: the rank of the factors of each.
        dtype_name: the type of every tensor.
        apart: whether experts get factors each, under the names that ``resolver`` finds in the base.
        resolver: finds tensors in the base; None without a base.
    """

    format = "peft"
    header: AdapterFormat | None = "peft"

    def __init__(
        self,
        labels: Mapping[str, str],
        targets: Mapping[str, Changes],
        *,
        factored: Collection[str],
        ranks: Mapping[str, int],
        dtype_name: str,
        apart: bool,
        resolver: Resolver | None,
    ) -> None:
        self._labels, self._factored, self.ranks, self._dtype_name = labels, factored, ranks, dtype_name
        self._apart, self._resolver = apart, resolver
        experts = (labels[name] for name in factored if is_experts(targets[name]))
        self._modules = {module_of(labels[name]) for name in factored}
        self._paths = FactorPaths((labels[name] for name in factored), experts)

    def item(self, site: Site, changes: Changes, stored: Stored | None) -> Item:
        """Return the item of a target."""
        label = self._labels[site.name]
        if stored is not None and all(isinstance(each, TokenRows) for each in changes if each):
            return self._token_item(site, changes, stored)
        if site.name not in self._factored:
            outs = self._tensors(site, changes)
            return Item(site, changes, stored, outs, "delta" if is_bias(changes) else "dense")
        if self._apart and is_experts(changes):
            first = next(each for each in changes if each)
            placings = place_experts(
                site, first, rank=self.ranks[site.name], dtype_name=self._dtype_name, resolver=self._resolver
            )
            outs = tuple(out for each in placings for out in (each.down, each.up) if out)
            return Item(site, changes, stored, outs, "factors", placings=placings)
        written = 0.5 if self._paths.applied_twice(label) else 1.0
        return Item(site, changes, stored, self._tensors(site, changes), "factors", written=written)

    def _tensors(self, site: Site, changes: Changes) -> tuple[OutputTensor, ...]:
        label = self._labels[site.name]
        if is_lora(changes):
            first = next(each for each in changes if each)
            return factor_tensors(self._paths.of(label), first, site.shape, self.ranks[site.name], self._dtype_name)
        name = label
        if is_bias(changes):
            name = f"{module_of(label)}.lora_B.bias"
        elif label.endswith(".bias") and module_of(label) in self._modules:
            name = f"{module_of(label)}.base_layer.bias"  # PEFT's own name of the bias of a module with factors
        return (OutputTensor(PREFIX + name, self._dtype_name, site.shape),)

    def _token_item(self, site: Site, changes: Changes, table: Stored) -> Item:
        """Return the rows that any adapter trained, as a table of their own."""
        rows = [each for each in changes if isinstance(each, TokenRows)]
        indices = sorted({index for each in rows for index in each.indices})
        among = tuple(each.among(indices) if isinstance(each, TokenRows) else None for each in changes)
        shape = (len(indices), site.shape[1])
        wrapper = "token_adapter." if self._factored else ""
        name = f"{PREFIX}{module_of(self._labels[site.name])}.{wrapper}trainable_tokens_delta"
        out = OutputTensor(name, self._dtype_name, shape)
        return Item(replace(site, shape=shape), among, TokenTable(table, indices), (out,), "dense")

    def check(self, items: Sequence[Item]) -> None:
        """Refuse rows of tokens without factors of several modules, and tensors in full without factors."""
        tables = [item.base for item in items if isinstance(item.base, TokenTable)]
        if tables and not self.rank and (len(tables) < len(items) or len({table.indices for table in tables}) > 1):
            raise InputError(
                f"the adapters hold rows of tokens and no factors, and PEFT's format keeps such rows of one module "
                f"only: make a model with {option('kind', 'model')}"
            )
        if not self._factored and all(item.form == "dense" and not isinstance(item.base, TokenTable) for item in items):
            raise InputError(
                f"the adapters hold tensors in full and no factors, and PEFT reads these only with factors: make a "
                f"model with {option('kind', 'model')}"
            )

    def check_biases(self, targets: Mapping[str, Changes], adapters: Sequence[Adapter]) -> None:
        """Refuse biases of some modules alone: PEFT has them as ``lora_bias``, of every module with factors or none."""
        biases = {module_of(self._labels[name]): name for name, changes in targets.items() if is_bias(changes)}
        modules = {module_of(self._labels[name]) for name in self._factored}
        if biases and biases.keys() != modules:
            odd = sorted(biases.keys() ^ modules)[0]
            raise InputError(
                f"{adapters[0].path} and the others change biases ({odd} is one that has only a bias or only factors), "
                f"and PEFT's format carries biases only of all adapted modules: make a model with "
                f"{option('kind', 'model')} and {option('base')}"
            )
