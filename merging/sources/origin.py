"""Where a model came from, if that is a place that others can name too."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Origin"]


@dataclass(frozen=True, slots=True)
class Origin:
    """A model on the Hub: ``path`` in the repository ``repo`` as of ``commit``, under the ``licence`` its card states.

    As text it is the address that means these very bytes for ever.
    """

    repo: str
    commit: str
    path: str = ""
    licence: str | None = None

    @property
    def folder(self) -> str:
        """The folder in the repository that the model lies in."""
        file = self.path.endswith((".safetensors", ".bin", ".pt", ".pth", ".json"))
        return self.path.rpartition("/")[0] if file else self.path

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}{'/' + self.path if self.path else ''}"
