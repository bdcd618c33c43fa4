"""The update rule of a store, which its method states."""

from __future__ import annotations

from merging.continual.manifest import Manifest
from merging.errors import OptionError
from merging.maths.coefficients import number
from merging.maths.lazy_torch import Tensor
from merging.methods import METHODS, chain, method_class
from merging.methods.contract.method import Method
from merging.methods.contract.update_rule import History, UpdateRule
from merging.methods.contract.wrapper import Wrapper

__all__ = ["checked_rule", "continual_methods", "history_of", "rule_of"]


def continual_methods() -> list[str]:
    """Return the methods, and chains of a wrapper and a method, by which a store can take in models."""
    wrappers = [name for name in METHODS if issubclass(method_class(name), Wrapper)]
    mergers = [name for name in METHODS if name not in wrappers]
    chains = [*mergers, *(f"{wrapper}+{merger}" for wrapper in wrappers for merger in mergers)]
    return [each for each in chains if chain(each).update_rule() is not None]


def checked_rule(method: Method) -> UpdateRule:
    """Return the rule of a method.

    Raises :class:`~merging.errors.OptionError` for a method that cannot be continued, and for parameters that differ
    from model to model or from place to place.
    """
    if chain(method.chain).update_rule() is None:
        raise OptionError(
            f"a store cannot grow by {method.chain}, which must see all models at once: choose one of "
            f"{', '.join(continual_methods())}"
        )
    last = method.links()[-1]
    weights = getattr(last, "weights", 1.0)
    if isinstance(weights, (tuple, Tensor)) or number(weights) != 1:
        raise OptionError(f"{last.name}.weights: the models of a store all have the weight 1")
    if any(link.varies for link in method.links()):
        raise OptionError("the parameters of a store's method are the same everywhere: give one value for each")
    rule = method.update_rule()
    assert rule is not None
    return rule


def rule_of(manifest: Manifest) -> UpdateRule:
    """Return the rule of a store."""
    return checked_rule(chain(manifest.method, manifest.parameters))


def history_of(manifest: Manifest) -> History:
    """Return the norms that the steps of a store noted."""
    steps = manifest.steps
    return History(tuple(step.norm for step in steps), steps[-1].merged if steps else 0.0)
