"""Base class of methods that need statistics of examples, gathered beforehand for each model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merging.errors import OptionError, option
from merging.maths.coefficients import mean_weights
from merging.maths.delta import Delta, Stack
from merging.maths.layer_statistics import InputGram
from merging.maths.parameters import Coefficient, Local, PerModel
from merging.maths.site import Site
from merging.methods.contract.method import Grain, Method, StatisticsKind

__all__ = ["FromExamples", "FromInputs"]

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FromExamples(Method):
    """A method that weighs each model's change by statistics of its examples, which ``merge stats`` gathers.

    Tensors without statistics in some model take the mean of the changes.
    """

    weights: PerModel[Share] = Field(1.0, description="one weight for all models, or one each; not negative")
    scale: Local[Coefficient] = Field(1.0, description="what the merged change is multiplied by")

    def check(self, models: int) -> None:
        super().check(models)
        if not self.varies and not any(self.coefficients(models)):
            raise OptionError(f"the weights of {self.name} are all 0: give some model a weight")

    def mean(self, stack: Stack) -> Delta:
        """Return the mean of the changes, times the scale."""
        return stack.weighted_sum([weight * self.scale for weight in mean_weights(self.coefficients(len(stack)))])

    def require_statistics(self, stack: Stack) -> None:
        """Refuse changes without statistics. Raises :class:`~merging.errors.OptionError`."""
        if not stack.layer_statistics:
            raise OptionError(
                f"{self.name} needs statistics of examples, one file for each model, which only a merge of "
                f"models in files reads ({option('stats')})"
            )


class FromInputs(FromExamples):
    """A method of matrices that needs the Gram matrix of each layer's inputs. Other tensors take the mean.

    A low-rank change stays low-rank: the sum of ranks is enough for the result.
    """

    needs_statistics: ClassVar[StatisticsKind | None] = "inputs"
    decomposed_side: ClassVar[Literal["shorter", "longer"] | None] = "longer"
    workspace: ClassVar[int] = 5

    @property
    def factored(self) -> bool:
        return True

    def grain_at(self, site: Site) -> Grain:
        return "matrix" if site.kind == "matrix" else "element"

    def idle(self, site: Site) -> dict[str, str]:
        if site.kind == "matrix":
            return {}
        own = type(self).model_fields.keys() - FromExamples.model_fields.keys()
        return dict.fromkeys(own, f"{self.name} solves only for matrices")

    def grams(self, stack: Stack, site: Site) -> list[InputGram] | None:
        """Return the Gram matrix of each model at a site, float64; None where the mean is to be taken."""
        self.require_statistics(stack)
        if site.kind != "matrix":
            return None
        found = [each.read_inputs() if each else None for each in stack.layer_statistics]
        grams = [gram.to(stack.device) for gram in found if gram is not None]
        return grams if len(grams) == len(stack) else None
