"""Models on the Hugging Face Hub: named, pinned to a commit, planned from their headers, fetched when they are needed.

A repository is mirrored as a folder of its small files and of empty stand-ins for its weights, so that every reader of
folders reads it too. The stand-ins are opened by :mod:`merging.hub.remote`: headers by range requests, values when the
merge comes to them.
"""

__all__: list[str] = []
