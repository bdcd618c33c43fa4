"""Packs: adapters as signs, and changes of full models as bands of singular directions, many times smaller."""

from __future__ import annotations

from merging.compression.packing import Compressed, compress
from merging.compression.unpacking import Decompressed, decompress

__all__ = ["Compressed", "Decompressed", "compress", "decompress"]
