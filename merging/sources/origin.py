"""The place on the Hub or in an object store that a model came from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Origin"]

_MARK = "://"
"""The mark of an address in a store."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A model on the Hub: ``path`` in the repository ``repo`` at ``commit``, under the ``licence`` that its card
    states.

    As text it is the permanent address of these bytes. In an object store, ``repo`` is the address of a folder and
    ``commit`` a key of its state, which the text does not show.
    """

    repo: str
    commit: str
    path: str = ""
    licence: str | None = None

    @property
    def folder(self) -> str:
        """The folder of the model within the repository."""
        file = self.path.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".json"))
        return self.path.rpartition("/")[0] if file else self.path

    @property
    def in_store(self) -> bool:
        """Whether it is in an object store, and not on the Hub."""
        return _MARK in self.repo

    def __str__(self) -> str:
        if self.in_store:
            return f"{self.repo}/{self.path}" if self.path else self.repo
        return f"{self.repo}@{self.commit}{'/' + self.path if self.path else ''}"
