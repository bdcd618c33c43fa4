"""Default rates, as ``merge plan --calibrate`` measured them.

A line has the processor seconds of a method for a sweep over a tensor, for an element in a sweep, for an operation of a
decomposition of a full matrix, and for an operation of a decomposition of factors.
"""

from __future__ import annotations

__all__ = ["METHODS"]

METHODS: dict[str, tuple[float, ...]] = {
    "task_arithmetic": (1.2e-4, 6.4e-10),
    "linear": (1.1e-4, 6.0e-10),
    "geometric_median": (2.3e-4, 5.6e-10),
    "varm": (1.3e-4, 6.3e-10),
    "passthrough": (4.6e-5, 0.0),
    "ties": (2.5e-4, 2.0e-9),
    "pcb": (3.2e-4, 4.1e-9),
    "sce": (1.9e-4, 2.2e-9),
    "magmax": (1.5e-4, 1.4e-9),
    "consensus": (1.7e-4, 2.6e-9),
    "ram": (1.5e-4, 1.0e-9),
    "ramplus_tl": (1.5e-4, 1.8e-9),
    "nearswap": (9.5e-5, 5.5e-10),
    "arcee_fusion": (2.2e-4, 5.0e-9),
    "train_difference": (1.2e-4, 2.4e-9),
    "slerp": (1.7e-4, 5.3e-10),
    "nuslerp": (1.8e-4, 5.3e-10),
    "multislerp": (1.8e-4, 5.3e-10),
    "karcher": (2.4e-4, 6.0e-10),
    "model_stock": (1.9e-4, 5.1e-10),
    "cosine": (1.6e-4, 2.4e-9),
    "tsv": (1.2e-4, 6.4e-10, 2.0e-11, 2.2e-10),
    "dc_merge": (1.5e-4, 6.4e-10, 2.3e-11, 2.1e-10),
    "iso_c": (1.3e-4, 6.4e-10, 2.1e-11, 2.0e-10),
    "iso_cts": (1.2e-4, 6.4e-10, 1.9e-11, 2.2e-10),
    "star": (1.4e-4, 6.4e-10, 2.0e-11, 2.2e-10),
    "wudi": (1.2e-4, 6.4e-10, 1.6e-11, 2.0e-10),
    "actmat": (1.2e-4, 6.4e-10, 1.6e-11, 1.9e-10),
    "ace": (1.2e-4, 6.4e-10, 1.6e-11, 1.9e-10),
    "svd": (1.2e-4, 6.4e-10, 2.0e-11, 2.0e-10),
    "opcm": (1.4e-4, 6.4e-10, 2.9e-11, 3.6e-10),
    "dop": (1.2e-4, 6.4e-10, 1.6e-11, 2.0e-10),
    "regmean": (1.2e-4, 6.4e-10, 1.6e-11, 2.0e-10),
    "esm": (1.2e-4, 6.4e-10, 1.3e-11, 2.0e-10),
    "fisher": (1.6e-4, 2.6e-9),
    "do": (2.6e-4, 8.8e-9),
    "dare": (1.3e-4, 1.2e-9),
    "della": (1.9e-4, 4.7e-9),
    "breadcrumbs": (1.3e-4, 6.9e-10),
    "knots": (1e-5, 0.0, 2.3e-11, 2.1e-10),
    "core": (1e-5, 0.0, 3.4e-11, 3.8e-10),
    "ctm": (1e-5, 0.0, 3.4e-11, 3.8e-10),
    "pico": (1e-5, 0.0, 2.3e-11, 2.1e-10),
    "decouple": (1.5e-4, 7.6e-9),
    "orthogonalize": (4.8e-5, 1.3e-9),
    "svc": (1e-5, 0.0, 2.3e-11, 2.1e-10),
    "clamp": (1e-4, 1.2e-9),
    "lines": (1e-6, 0.0),
    "larv": (1e-4, 1.2e-9, 2.3e-11, 2.1e-10),
    "blocks": (1e-5, 0.0),
}
