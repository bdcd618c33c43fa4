"""The public place that a model came from."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Origin"]


@dataclass(frozen=True, slots=True)
class Origin:
    """A model on the Hub: ``path`` in the repository ``repo`` at ``commit``, under the ``licence`` that its card
    states.

    As text it is the permanent address of these bytes.
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

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}{'/' + self.path if self.path else ''}"
