"""What the Hub says no with: a status, and the header by which its client tells one kind of no from another."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["BadRequest", "EntryNotFound", "Refusal", "RepoNotFound", "RevisionNotFound"]


class Refusal(Exception):
    """An answer that is an error: its status, `X-Error-Code`, `X-Error-Message` and further headers and fields."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        told = message.encode("ascii", "backslashreplace").decode()
        self.headers = {"X-Error-Message": told, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.fields = {"error": message, **(fields or {})}


class BadRequest(Refusal):
    """A request that this Hub does not understand: a test must not pass because something was ignored."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


class RepoNotFound(Refusal):
    """No such repository, or none that this account may know of; a stranger is told 401 either way."""

    def __init__(self, known: bool) -> None:
        super().__init__(404 if known else 401, "Repository not found", "RepoNotFound")


class RevisionNotFound(Refusal):
    def __init__(self, revision: str) -> None:
        super().__init__(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class EntryNotFound(Refusal):
    """No such file; the commit is told all the same, so that a client can remember that it is not there."""

    def __init__(self, message: str, commit: str) -> None:
        super().__init__(404, message, "EntryNotFound", {"X-Repo-Commit": commit})
