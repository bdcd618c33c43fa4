"""Models on the Hugging Face Hub and in object stores: planned from their headers, and downloaded when needed.

A repository is pinned to a commit, a folder of a store to the ETags of its files. Either is mirrored as a folder of its
small files and of empty placeholders for its weights, so that every reader of folders also reads the mirror.
:mod:`merging.hub.remote` opens the placeholders: headers by range requests, values when the merge needs them.
"""

__all__: list[str] = []
