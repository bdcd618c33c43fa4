"""Comparison of models: inner products, angles, spectra, signs and subspaces of their changes."""

from merging.geometry.compare_models import compare
from merging.geometry.comparison import Comparison
from merging.geometry.grams import cosines, gram
from merging.geometry.signs import Signs, sign_agreement
from merging.geometry.spectrum import spectra
from merging.geometry.suggestion import Suggestion, suggest

__all__ = ["Comparison", "Signs", "Suggestion", "compare", "cosines", "gram", "sign_agreement", "spectra", "suggest"]
