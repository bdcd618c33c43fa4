"""Merging methods written naively from their papers, a file each.

Changes are `tau`: `[n, d]`, each model's change flattened over everything that is merged, for methods that look at
entries; `[n, out, in]` for those that decompose matrices; and `x` where weights may be merged as well as changes.
Nothing is streamed, factored or blocked, and all is in the dtype of the input. Sums over models run in order from the
first. A decomposition is a plain SVD (or `eigh`) of the full matrix, with a cut-off relative to its largest value.
"""

from __future__ import annotations

from support.references.ace import ace
from support.references.actmat import actmat
from support.references.arcee_fusion import arcee_fusion
from support.references.breadcrumbs import breadcrumbs
from support.references.consensus import consensus
from support.references.core import core
from support.references.ctm import ctm
from support.references.dare import dare
from support.references.dc_merge import dc_merge, diagonal_dc_merge
from support.references.della import della_probabilities
from support.references.diffusion import clamped, cosine_merge, train_difference
from support.references.do import balanced, decoupled, do_merging
from support.references.dop import dop, dop_loss
from support.references.esm import esm
from support.references.flat import flatten, unflatten
from support.references.geometric_median import geometric_median
from support.references.iso_c import iso_c
from support.references.iso_cts import iso_cts
from support.references.karcher import karcher
from support.references.knots import knots
from support.references.larv import larv_factors
from support.references.magmax import magmax
from support.references.model_stock import model_stock
from support.references.multislerp import multislerp
from support.references.nearswap import nearswap
from support.references.nuslerp import nuslerp
from support.references.opcm import opcm
from support.references.orthogonalize import orthogonalized
from support.references.pcb import pcb
from support.references.pico import pico
from support.references.published import GOLDEN, golden_adapters
from support.references.ram import ram
from support.references.regmean import fisher, regmean
from support.references.regmean_plus_plus import regmean_plus_plus
from support.references.sce import sce
from support.references.spectral import decomposed
from support.references.star import star
from support.references.svc import svc
from support.references.svd import svd
from support.references.ties import ties
from support.references.tsv import tsv
from support.references.varm import varm
from support.references.wudi import wudi, wudi_loss

__all__ = [
    "GOLDEN",
    "ace",
    "actmat",
    "arcee_fusion",
    "balanced",
    "breadcrumbs",
    "clamped",
    "consensus",
    "core",
    "cosine_merge",
    "ctm",
    "dare",
    "dc_merge",
    "decomposed",
    "decoupled",
    "della_probabilities",
    "diagonal_dc_merge",
    "do_merging",
    "dop",
    "dop_loss",
    "esm",
    "fisher",
    "flatten",
    "geometric_median",
    "golden_adapters",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "larv_factors",
    "magmax",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "opcm",
    "orthogonalized",
    "pcb",
    "pico",
    "ram",
    "regmean",
    "regmean_plus_plus",
    "sce",
    "star",
    "svc",
    "svd",
    "ties",
    "train_difference",
    "tsv",
    "unflatten",
    "varm",
    "wudi",
    "wudi_loss",
]
