"""What the Hub tells of a model, and how much of it where."""

from __future__ import annotations

from typing import Any

import cards
from repositories import Commit, File, Objects, Repository

__all__ = ["BRIEF", "FULL", "WHOLE", "facts", "sibling"]

BRIEF = {"modelId", "likes", "downloads", "private", "tags", "library_name", "createdAt"}
"""In a list of models."""

FULL = BRIEF | {"author", "sha", "lastModified", "gated", "disabled", "siblings"}
"""In a list of models with `full`."""

WHOLE = FULL | {"cardData", "safetensors", "usedStorage"}
"""Of one model."""


def facts(objects: Objects, repo: Repository, commit: Commit) -> dict[str, Any]:
    """Everything that is told of a model; None for what is not known."""
    readme = commit.files.get("README.md")
    card = cards.front_matter(objects.path(readme.sha256).read_text("utf-8")) if readme else {}
    stands = cards.base_models(card, commit.files)
    weights = [objects.path(file.sha256) for name, file in commit.files.items() if name.endswith(".safetensors")]
    return {
        "_id": repo.id,
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.sha,
        "createdAt": repo.created,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": repo.downloads,
        "likes": 0,
        "tags": list(dict.fromkeys([*cards.tags(card, commit.files), *repo.topics])),
        "library_name": cards.library(card, commit.files),
        "cardData": card or None,
        "baseModels": stands and {"relation": stands[0], "models": [{"id": base} for base in stands[1]]},
        "safetensors": cards.parameters(weights),
        "usedStorage": sum(file.size for file in commit.files.values()),
        "siblings": [{"rfilename": path} for path in sorted(commit.files)],
    }


def sibling(path: str, file: File) -> dict[str, Any]:
    """A file with its size and names, as a model's information has it with `blobs`."""
    told: dict[str, Any] = {"rfilename": path, "size": file.size, "blobId": file.oid}
    if file.pointer is not None:
        told["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer}
    return told
