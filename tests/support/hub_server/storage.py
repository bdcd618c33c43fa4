"""The other host, where large files lie: it asks for an address that is signed, and wants no token."""

from __future__ import annotations

from exchange import Answer, Exchange, Route
from refusals import BadRequest

__all__ = ["ROUTES", "file_address", "upload_address"]


def file_address(repo: str, commit: str, name: str) -> str:
    """The path of a large file; with the names in it, so that a fault can be meant for one file."""
    return f"/storage/{repo}/{commit}/{name}"


def upload_address(repo: str, sha256: str, size: int) -> str:
    return f"/storage/{repo}/upload/{sha256}/{size}"


def _download(exchange: Exchange, repo: str, commit: str, name: str) -> Answer:
    _check(exchange)
    file = exchange.hub.repositories[repo].at(commit).files[name]
    disposition = f'inline; filename="{name.rpartition("/")[2]}";'
    headers = {"ETag": f'"{file.sha256}"', "Content-Disposition": disposition, "Content-Type": "binary/octet-stream"}
    return Answer(body=exchange.hub.objects.path(file.sha256), headers=headers)


def _upload(exchange: Exchange, sha256: str, size: str) -> Answer:
    _check(exchange)
    exchange.hub.objects.add(exchange.upload(int(size)), expected=sha256)
    return Answer(headers={"ETag": f'"{sha256}"'})


def _check(exchange: Exchange) -> None:
    if exchange.headers["Authorization"]:  # as the storage behind the Hub does
        raise BadRequest("Only one auth mechanism allowed")
    exchange.hub.check_signature(exchange.path, exchange.query.get("signature", [""])[0])


ROUTES = (
    Route("GET", r"/storage/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", _download),
    Route("PUT", r"/storage/[^/]+/[^/]+/upload/([0-9a-f]{64})/(\d+)", _upload),
)
