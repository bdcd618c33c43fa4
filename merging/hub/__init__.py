"""Models on the Hugging Face Hub: named, pinned to a commit, planned from their headers, downloaded when needed.

A repository is mirrored as a folder of its small files and of empty placeholders for its weights, so that every reader
of folders also reads the mirror. :mod:`merging.hub.remote` opens the placeholders: headers by range requests, values
when the merge needs them.
"""

__all__: list[str] = []
