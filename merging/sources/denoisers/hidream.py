"""HiDream, with the same names everywhere."""

from __future__ import annotations

from merging.sources.denoisers.family import Family, NameMark

__all__ = ["HIDREAM"]

HIDREAM = Family(name="HiDream", marks=(NameMark(names=r"^(?:double|single)_stream_blocks_\d+_block_"),))
