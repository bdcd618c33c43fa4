"""Soups: weighted means of the checkpoints of one run, whose weights stand for a decay of the learning rate."""

from __future__ import annotations

from merging.soups.average import soup

__all__ = ["soup"]
