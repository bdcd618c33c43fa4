"""What a test tells the Hub and asks of it, under /_control/."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from exchange import Answer, Exchange, Route, json_answer
from refusals import RepoNotFound
from repositories import File, Repository, is_large, read

__all__ = ["ROUTES"]


def _put(exchange: Exchange) -> Answer:
    """Commit files to a branch; the repository and the branch are made where they are not there yet."""
    hub, order = exchange.hub, exchange.json()
    files = {name: _file(exchange, name, content) for name, content in order["files"].items()}
    branch = order["revision"]
    with hub.lock:
        repo = hub.repositories.setdefault(order["repo"], Repository(order["repo"]))
        repo.private, repo.gated, repo.downloads = order["private"], order["gated"], order["downloads"]
        repo.topics = tuple(order["tags"])
        repo.branches.setdefault(branch, repo.at("main"))
        return json_answer({"sha": repo.commit(branch, "files of a test", files).sha})


def _file(exchange: Exchange, name: str, content: dict[str, str]) -> File:
    """A file that lies at a path, or whose bytes are sent along."""
    objects = exchange.hub.objects
    pieces = read(Path(content["path"])) if "path" in content else [base64.b64decode(content["base64"])]
    sha256 = objects.add(pieces)
    return objects.file(sha256, is_large(name, objects.path(sha256).stat().st_size))


def _files(exchange: Exchange) -> Answer:
    repo, revision = exchange.query["repo"][0], exchange.query["revision"][0]
    if repo not in exchange.hub.repositories:
        raise RepoNotFound(known=True)
    files = exchange.hub.repositories[repo].at(revision).files
    return json_answer({name: file.sha256 for name, file in sorted(files.items())})


def _fault(exchange: Exchange) -> Answer:
    fault: dict[str, Any] = exchange.json()
    exchange.hub.faults.add(**fault)
    return json_answer({})


def _page(exchange: Exchange) -> Answer:
    exchange.hub.page_size = exchange.json()["size"]
    return json_answer({})


def _log(exchange: Exchange) -> Answer:
    return json_answer(exchange.hub.log.json())


def _clear(exchange: Exchange) -> Answer:
    exchange.hub.log.clear()
    exchange.hub.faults.clear()
    return json_answer({})


ROUTES = (
    Route("POST", "/_control/put", _put),
    Route("GET", "/_control/files", _files),
    Route("POST", "/_control/fault", _fault),
    Route("POST", "/_control/page", _page),
    Route("GET", "/_control/log", _log),
    Route("POST", "/_control/clear", _clear),
)
