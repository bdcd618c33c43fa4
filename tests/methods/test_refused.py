"""Parameters, numbers of models and kinds of input that a method cannot merge are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from merging.errors import OptionError
from support.changes import EXACT, changes, merged
from support.on_models import weights_merged


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher", "arcee_fusion"])
def test_changes_alone_do_not_tell_the_weights(method: str) -> None:
    options = {} if method == "arcee_fusion" else {"space": "weights"}
    with pytest.raises(OptionError, match=method):
        merged(changes(2, 1), method, **options)
    if options:
        with pytest.raises(OptionError, match="base"):
            weights_merged(changes(2, 1), method, space="changes")


REFUSED: Any = [
    ("della", {"density": -0.1}),
    ("della", {"density": 1.5}),
    ("della", {"epsilon": -0.1}),
    ("della", {"density": 0.1}),  # minus epsilon is not above 0
    ("della", {"density": 0.15}),
    ("della", {"density": 0.9}),  # plus epsilon is above 1
    ("della", {"density": (0.7, 0.7, 0.9)}),
    ("della", {"density": 0.7, "epsilon": (0.15, 0.15, 0.7)}),
    ("della", {"rescale": "both"}),
    ("breadcrumbs", {"density": -0.1}),
    ("breadcrumbs", {"density": 1.1}),
    ("breadcrumbs", {"gamma": -0.1}),
    ("breadcrumbs", {"gamma": 1.0}),
    ("sce", {"density": 0.0}),
    ("sce", {"density": 1.01}),
    ("sce", {"select": "both"}),
    ("ram", {"epsilon": -1.0}),
    ("ramplus_tl", {"epsilon": -1.0}),
    ("ramplus_tl", {"r": -0.1}),
    ("ramplus_tl", {"alpha": -0.1}),
    ("nuslerp", {"axis": "planes"}),
    ("nuslerp", {"space": "latent"}),
    ("multislerp", {"space": "latent"}),
    ("nuslerp", {"weights": (1.0, -1.0)}),
    ("karcher", {"weights": (1.0, -1.0, 1.0)}),
    ("karcher", {"max_iter": -1}),
    ("karcher", {"tol": -1.0}),
    ("nearswap", {"t": -1.0}),
    ("iso_cts", {"common": -0.1}),
    ("iso_cts", {"common": 1.1}),
    ("knots", {"align": "both"}),
    ("wudi", {"mode": "open"}),
    ("wudi", {"steps": -1}),
    ("svd", {"energy": 0.0}),
    ("svd", {"energy": 1.1}),
    ("svd", {"max_rank": 0}),
]


@pytest.mark.parametrize(("method", "options"), REFUSED, ids=str)
def test_parameters_out_of_bounds_are_refused(method: str, options: Any) -> None:
    models = changes({"nuslerp": 2, "nearswap": 1}.get(method, 3), 1)
    if method in ("nuslerp", "multislerp", "karcher"):
        options = {"space": "changes", **options}
    (*_, name) = options
    with pytest.raises(OptionError, match=rf"\b({method}\.{name}|{name} of {method})\b"):
        merged(models, method, **options)


def test_models_are_counted() -> None:
    for method, count in (("nuslerp", 1), ("nuslerp", 3), ("model_stock", 1)):
        options = {"space": "changes"} if method == "nuslerp" else {}
        with pytest.raises(OptionError, match=f"{method}.*{count} (was|were) given"):
            merged(changes(count, 1), method, **options)
    with pytest.raises(OptionError, match="3 values for 2 models"):
        merged(changes(2, 1), "svd", weights=EXACT)
