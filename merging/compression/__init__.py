"""Packs: adapters in signs, and what full models changed in bands of singular directions, many times smaller."""

from __future__ import annotations

from merging.compression.packing import Compressed, Decompressed, compress, decompress

__all__ = ["Compressed", "Decompressed", "compress", "decompress"]
