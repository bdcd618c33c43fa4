"""The Hub's own host: what its client asks of models, and what it sends to publish one."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlencode

from exchange import Answer, Exchange, Route, json_answer
from facts import BRIEF, FULL, WHOLE, facts, sibling
from hub import OWNER
from refusals import BadRequest, EntryNotFound, Refusal, RepoNotFound
from repositories import Commit, File, Repository, is_large
from storage import file_address, upload_address

__all__ = ["ROUTES"]


# Who may do what


def _visible(exchange: Exchange, name: str) -> Repository:
    """The repository, for whoever may know of it."""
    account, repo = exchange.account, exchange.hub.repositories.get(name)
    if repo is None or (repo.private and account != "owner"):
        raise RepoNotFound(known=account is not None)
    return repo


def _readable(exchange: Exchange, name: str) -> Repository:
    """The repository, for whoever may read its files."""
    repo = _visible(exchange, name)
    if repo.gated and exchange.account is None:
        raise Refusal(401, f"Access to model {name} is restricted. Please log in.", "GatedRepo")
    if repo.gated and exchange.account != "owner":
        raise Refusal(403, f"Access to model {name} is restricted: you are not in the authorized list.", "GatedRepo")
    return repo


def _writable(exchange: Exchange, name: str) -> Repository:
    """The repository, for its owner."""
    if exchange.account is None:  # over https its client reads every bare 401 so; over http it needs the code
        raise RepoNotFound(known=False)
    repo = _visible(exchange, name)
    if exchange.account != "owner":
        raise Refusal(403, f"You don't have the rights to change {name}")
    return repo


def _whoami(exchange: Exchange) -> Answer:
    if exchange.account is None:
        raise Refusal(401, "Invalid username or password.")
    name = OWNER if exchange.account == "owner" else "outsider"
    return json_answer({"type": "user", "id": name, "name": name, "fullname": name, "orgs": []})


def _may_read(exchange: Exchange, name: str) -> Answer:
    _readable(exchange, name)
    return json_answer({})


# Models and their files


def _info(exchange: Exchange, name: str, revision: str | None) -> Answer:
    _know(exchange, "blobs", "expand", "securityStatus")
    repo = _visible(exchange, name)
    commit = repo.at(revision or "main")
    found = _chosen(exchange, facts(exchange.hub.objects, repo, commit), WHOLE)
    if _flag(exchange, "blobs"):
        found["siblings"] = [sibling(path, file) for path, file in sorted(commit.files.items())]
    return json_answer(found)


def _models(exchange: Exchange) -> Answer:
    """The list of models. Its pages are as long as `limit` says, and go on as long as there are models."""
    _know(exchange, "filter", "search", "author", "gated", "sort", "limit", "cursor", "expand", "full", "cardData")
    hub, query, owner = exchange.hub, exchange.query, exchange.account == "owner"
    known = [repo for repo in hub.repositories.values() if owner or not repo.private]
    found = [facts(hub.objects, repo, repo.at("main")) for repo in known]
    found = [model for model in found if set(query.get("filter", [])) <= set(model["tags"])]
    if "search" in query:
        found = [model for model in found if query["search"][0].lower() in model["id"].lower()]
    if "author" in query:
        found = [model for model in found if model["author"] == query["author"][0]]
    if "gated" in query:
        found = [model for model in found if bool(model["gated"]) == _flag(exchange, "gated")]
    if "sort" in query:
        (key,) = query["sort"]
        if key not in ("downloads", "likes", "createdAt", "lastModified"):
            raise BadRequest(f"the test's Hub does not sort by {key}")
        found.sort(key=lambda model: model[key], reverse=True)
    default = (FULL if _flag(exchange, "full") else BRIEF) | ({"cardData"} if _flag(exchange, "cardData") else set())
    page, headers = _page(exchange, found, min(int(query.get("limit", [hub.page_size])[0]), hub.page_size))
    return json_answer([_chosen(exchange, model, default) for model in page], headers=headers)


def _know(exchange: Exchange, *names: str) -> None:
    if unknown := set(exchange.query) - set(names):
        raise BadRequest(f"the test's Hub does not know the parameters {sorted(unknown)}")


def _flag(exchange: Exchange, name: str) -> bool:
    return exchange.query.get(name, ["false"])[0].lower() in ("true", "1")


def _chosen(exchange: Exchange, model: Mapping[str, Any], default: set[str]) -> dict[str, Any]:
    """The facts that are asked for by `expand`, else the default ones; those that there are."""
    keys = set(exchange.query.get("expand", default))
    if unknown := keys - set(model):
        raise BadRequest(f"the test's Hub has no {sorted(unknown)} of a model")
    return {key: value for key, value in model.items() if key in keys | {"_id", "id"} and value is not None}


def _page(exchange: Exchange, items: list[Any], size: int) -> tuple[list[Any], dict[str, str]]:
    """The items of the page that is asked for, and the header that says where the next one is."""
    start = int(exchange.query.get("cursor", ["0"])[0])
    if start + size >= len(items):
        return items[start:], {}
    query = urlencode({**exchange.query, "cursor": [start + size]}, doseq=True)
    return items[start : start + size], {"Link": f'<{exchange.hub.url}{exchange.raw_path}?{query}>; rel="next"'}


def _tree(exchange: Exchange, name: str, revision: str, folder: str | None) -> Answer:
    _know(exchange, "recursive", "expand", "limit", "cursor")
    commit = _visible(exchange, name).at(revision)
    inside = f"{folder.rstrip('/')}/" if folder else ""
    entries = [entry for entry in _entries(commit) if entry["path"].startswith(inside)]
    if inside and not entries:
        raise EntryNotFound(f"{folder} does not exist on {revision}", commit.sha)
    if not _flag(exchange, "recursive"):
        entries = [entry for entry in entries if "/" not in entry["path"][len(inside) :]]
    page, headers = _page(exchange, entries, exchange.hub.page_size)
    return json_answer(page, headers=headers)


def _paths_info(exchange: Exchange, name: str, revision: str) -> Answer:
    commit = _visible(exchange, name).at(revision)
    body = exchange.body().decode()
    paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
    return json_answer([entry for entry in _entries(commit) if entry["path"] in paths])


def _entries(commit: Commit) -> list[dict[str, Any]]:
    """The folders and files of a commit, as a listing of a tree has them."""
    folders = {path[:at] for path in commit.files for at, letter in enumerate(path) if letter == "/"}
    entries: dict[str, dict[str, Any]] = {path: _folder_entry(path) for path in folders}
    entries |= {path: _file_entry(path, file) for path, file in commit.files.items()}
    return [entries[path] for path in sorted(entries)]


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


def _file_entry(path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
    if file.pointer is not None:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer}
    return entry


def _resolve(exchange: Exchange, name: str, revision: str, path: str) -> Answer:
    """A file: its bytes, or for a large one where in the storage they lie."""
    commit = _readable(exchange, name).at(revision)
    file = commit.files.get(path)
    if file is None:
        raise EntryNotFound("Entry not found", commit.sha)
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
    if file.pointer is None:
        headers["Content-Type"] = "application/octet-stream"
        return Answer(200, exchange.hub.objects.path(file.sha256), headers)
    headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size), "Accept-Ranges": "bytes"}
    return Answer(302, b"", headers | {"Location": exchange.hub.signed(file_address(name, commit.sha, path))})


def _refs(exchange: Exchange, name: str) -> Answer:
    repo = _visible(exchange, name)

    def told(kind: str, names: Mapping[str, Commit]) -> list[dict[str, str]]:
        return [{"name": key, "ref": f"refs/{kind}/{key}", "targetCommit": at.sha} for key, at in names.items()]

    return json_answer({"branches": told("heads", repo.branches), "tags": told("tags", repo.tags), "converts": []})


def _commits(exchange: Exchange, name: str, revision: str) -> Answer:
    history = _visible(exchange, name).at(revision).history()
    authors = [{"user": OWNER}]
    told = [{"id": at.sha, "title": at.title, "message": "", "date": at.date, "authors": authors} for at in history]
    return json_answer(told)


# Publishing


def _create(exchange: Exchange) -> Answer:
    hub, order = exchange.hub, exchange.json()
    if exchange.account is None:
        raise Refusal(401, "Invalid username or password.")
    name = f"{order.get('organization') or OWNER}/{order['name']}"
    if exchange.account != "owner":
        raise Refusal(403, f"You don't have the rights to create {name}")
    with hub.lock:
        if name in hub.repositories:
            message = "You already created this model repo"
            raise Refusal(409, message, fields={"url": f"{hub.url}/{name}"})
        private = order.get("private", False) or order.get("visibility") == "private"
        repo = hub.repositories[name] = Repository(name, private=private)
        sha256 = hub.objects.add([b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"])
        repo.commit("main", "initial commit", {".gitattributes": hub.objects.file(sha256, large=False)})
    return json_answer({"url": f"{hub.url}/{name}", "name": name, "id": name})


def _branch(exchange: Exchange, name: str, branch: str) -> Answer:
    repo = _writable(exchange, name)
    return _reference(exchange, repo.branches, branch, repo.at(exchange.json().get("startingPoint", "main")))


def _tag(exchange: Exchange, name: str, revision: str) -> Answer:
    repo = _writable(exchange, name)
    return _reference(exchange, repo.tags, exchange.json()["tag"], repo.at(revision))


def _reference(exchange: Exchange, references: dict[str, Commit], name: str, commit: Commit) -> Answer:
    with exchange.hub.lock:
        if name in references:
            raise Refusal(409, f"Reference {name} already exists")
        references[name] = commit
    return json_answer({})


def _preupload(exchange: Exchange, name: str, revision: str) -> Answer:
    """Which way each file is to come, and what is there under its name already."""
    files = _writable(exchange, name).at(revision).files
    told = []
    for file in exchange.json()["files"]:
        there = files.get(file["path"])
        mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
        oid = there.etag if there else None
        told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return json_answer({"files": told})


def _large_files(exchange: Exchange, name: str) -> Answer:
    """Where to put large files; those that are in the storage already need not come."""
    _writable(exchange, name)
    told = []
    for large in exchange.json()["objects"]:
        place = {"oid": large["oid"], "size": large["size"]}
        if large["oid"] not in exchange.hub.objects:
            href = exchange.hub.signed(upload_address(name, large["oid"], large["size"]))
            place["actions"] = {"upload": {"href": href}}
        told.append(place)
    return json_answer({"transfer": "basic", "objects": told})


def _commit(exchange: Exchange, name: str, branch: str) -> Answer:
    """A commit, told line by line: a header, then files, large files that have come before, and what is deleted."""
    _know(exchange)
    repo, hub = _writable(exchange, name), exchange.hub
    head: dict[str, str] = {}
    added: dict[str, File] = {}
    deleted: list[str] = []
    for line in exchange.body().splitlines():
        key, value = _operation(json.loads(line))
        if key == "header":
            head = value
        elif key == "file":
            sha256 = hub.objects.add([base64.b64decode(value["content"])])
            added[value["path"]] = hub.objects.file(sha256, large=False)
        elif key == "lfsFile":
            added[value["path"]] = hub.objects.file(value["oid"], large=True)
        else:
            deleted.append(value["path"].rstrip("/") + "/" if key == "deletedFolder" else value["path"])
    with hub.lock:
        commit = repo.commit(branch, head["summary"], added, deleted, head.get("parentCommit"))
    url = f"{hub.url}/{name}/commit/{commit.sha}"
    return json_answer({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})


def _operation(line: dict[str, Any]) -> tuple[str, dict[str, str]]:
    if line["key"] not in ("header", "file", "lfsFile", "deletedFile", "deletedFolder"):
        raise BadRequest(f"a commit holds no {line['key']}")
    return line["key"], line["value"]


def _validate_card(exchange: Exchange) -> Answer:
    return json_answer({"errors": [], "warnings": []})


def _harnesses(exchange: Exchange) -> Answer:
    """What the client asks for, whatever it is used for, to tell which program has started it: none that is known."""
    return json_answer({"standardEnvVars": [], "harnesses": {}})


def _routes() -> Iterable[Route]:
    repo, revision = "([^/]+/[^/]+)", "([^/]+)"
    model = f"/api/models/{repo}"
    yield Route("GET", "/api/whoami-v2", _whoami)
    yield Route("GET", "/api/agent-harnesses", _harnesses)
    yield Route("GET", "/api/models", _models)
    yield Route("GET", f"{model}(?:/revision/{revision})?", _info)
    yield Route("GET", f"{model}/auth-check", _may_read)
    yield Route("GET", f"{model}/tree/{revision}(?:/(.+))?", _tree)
    yield Route("POST", f"{model}/paths-info/{revision}", _paths_info)
    yield Route("GET", f"{model}/refs", _refs)
    yield Route("GET", f"{model}/commits/{revision}", _commits)
    yield Route("GET", f"/{repo}/resolve/{revision}/(.+)", _resolve)
    yield Route("POST", "/api/repos/create", _create)
    yield Route("POST", f"{model}/branch/{revision}", _branch)
    yield Route("POST", f"{model}/tag/{revision}", _tag)
    yield Route("POST", "/api/validate-yaml", _validate_card)
    yield Route("POST", f"{model}/preupload/{revision}", _preupload)
    yield Route("POST", f"/{repo}.git/info/lfs/objects/batch", _large_files)
    yield Route("POST", f"{model}/commit/{revision}", _commit)


ROUTES = tuple(_routes())
