"""The Hub that the tests run against answers the real client of the Hub as the real Hub does."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from contextlib import closing
from email.message import Message
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save

from support.hub_fixture import Hub

pytestmark = pytest.mark.exhaustive

WEIGHTS = save({"weight": torch.arange(5000, dtype=torch.float32), "half": torch.zeros(3, 2, dtype=torch.bfloat16)})

PRELUDE = """
import hashlib, json, os, sys
from pathlib import Path
from huggingface_hub import *
from huggingface_hub.errors import *
home, api, told = Path(os.environ["HF_HOME"]), HfApi(), {}
def sha256(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()
def error(call, *args, **kwargs):
    try: call(*args, **kwargs)
    except HfHubHTTPError as error: return [type(error).__name__, error.response.status_code]
    except Exception as error: return [type(error).__name__, str(error)]
"""


def start(hub: Hub, home: Path, code: str, token: str | None = None) -> subprocess.Popen[str]:
    """The real client in a process of its own; what the code leaves in `told` is printed."""
    environment = hub.environment(home) | ({"HF_TOKEN": token} if token else {})
    script = f"{PRELUDE}\n{code}\nprint(json.dumps(told))"
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)


def client(hub: Hub, home: Path, code: str, token: str | None = None) -> dict[str, Any]:
    """What the real client was told."""
    process = start(hub, home, code, token)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    told: dict[str, Any] = json.loads(out.splitlines()[-1])
    return told


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_files_come_down_by_branch_tag_and_commit(hub: Hub, tmp_path: Path) -> None:
    first = hub.put("org/a", {"config.json": b"{}", "sub/b c.safetensors": WEIGHTS})
    hub.tag("org/a", "v1")
    second = hub.put("org/a", {"config.json": b'{"new": 1}'})
    hub.put("org/a", {"other.txt": b"x"}, revision="feature/x")
    hub.clear()
    told = client(
        hub,
        tmp_path / "home",
        """
config = hf_hub_download("org/a", "config.json")
weights = hf_hub_download("org/a", "sub/b c.safetensors")
told["blobs"] = [os.path.basename(os.path.realpath(path)) for path in (config, weights)]
told["weights"] = sha256(weights)
old = snapshot_download("org/a", revision="v1")
told["old"] = [os.path.basename(old), Path(old, "config.json").read_text()]
told["branch"] = sorted(os.listdir(snapshot_download("org/a", revision="feature/x")))
told["resolved"] = api.resolve_revision("org/a", revision="v1").resolved
told["verified"] = api.verify_repo_checksums("org/a", local_dir=snapshot_download("org/a")).checked_count
files = HfFileSystem()
told["range"] = files.cat_file("org/a/sub/b c.safetensors", 8, 40).hex()
told["header"] = sorted(api.parse_safetensors_file_metadata("org/a", "sub/b c.safetensors").tensors)
""",
        token=hub.token,
    )
    assert told["blobs"] == [git_blob(b'{"new": 1}'), digest(WEIGHTS)]
    assert told["weights"] == digest(WEIGHTS)
    assert told["old"] == [first, "{}"]
    assert told["resolved"] == first
    assert told["branch"] == ["config.json", "other.txt", "sub"]
    assert told["verified"] == 2
    assert bytes.fromhex(told["range"]) == WEIGHTS[8:40]
    assert told["header"] == ["half", "weight"]
    log = hub.log()
    assert {request.authorization for request in log if request.host == hub.url} == {True}
    large = [request for request in log if request.host == hub.storage]
    assert large and not any(request.authorization for request in large)
    assert large[0].path == f"/storage/org/a/{second}/sub/b c.safetensors"
    assert large[0].sent == len(WEIGHTS)
    assert any(request.range and request.status == 206 and request.sent < len(WEIGHTS) for request in large)


CALLS = """
for repo in ("public", "private", "gated", "missing"):
    told[repo] = [
        error(api.model_info, f"org/{repo}"),
        error(hf_hub_download, f"org/{repo}", "config.json"),
        error(snapshot_download, f"org/{repo}"),
    ]
told["revision"] = [error(hf_hub_download, "org/public", "config.json", revision="v9"),
                    error(snapshot_download, "org/public", revision="v9")]
told["entry"] = error(hf_hub_download, "org/public", "absent.json")
told["write"] = error(api.create_branch, "org/public", branch="mine")
told["create"] = error(api.create_repo, "org/new")
told["auth"] = error(api.auth_check, "org/gated")
told["whoami"] = error(api.whoami, token=os.environ.get("HF_TOKEN", "hf_nobody"))
"""


def test_what_is_hidden_gated_or_missing_is_an_error_of_its_kind(hub: Hub, tmp_path: Path) -> None:
    hub.put("org/public", {"config.json": b"{}"})
    hub.put("org/private", {"config.json": b"{}"}, private=True)
    hub.put("org/gated", {"config.json": b"{}"}, gated=True)
    hidden, gated, fine = "RepositoryNotFoundError", "GatedRepoError", [None, None, None]
    common = {
        "public": fine,
        "revision": [["RevisionNotFoundError", 404]] * 2,
        "entry": ["RemoteEntryNotFoundError", 404],
    }
    stranger = client(hub, tmp_path / "stranger", CALLS)
    assert stranger == common | {
        "private": [[hidden, 401]] * 3,
        "missing": [[hidden, 401]] * 3,
        "gated": [None, [gated, 401], [gated, 401]],
        "write": [hidden, 401],
        "create": ["HfHubHTTPError", 401],
        "auth": [gated, 401],
        "whoami": ["HfHubHTTPError", 401],
    }
    outsider = client(hub, tmp_path / "outsider", CALLS, hub.outsider)
    assert outsider == common | {
        "private": [[hidden, 404]] * 3,
        "missing": [[hidden, 404]] * 3,
        "gated": [None, [gated, 403], [gated, 403]],
        "write": ["HfHubHTTPError", 403],
        "create": ["HfHubHTTPError", 403],
        "auth": [gated, 403],
        "whoami": None,
    }
    owner = client(hub, tmp_path / "owner", CALLS, hub.token)
    assert owner == common | {
        "private": fine,
        "missing": [[hidden, 404]] * 3,
        "gated": fine,
        "write": None,
        "create": None,
        "auth": None,
        "whoami": None,
    }


def test_models_are_listed_by_pages_and_described(hub: Hub, tmp_path: Path) -> None:
    card = {"license": "mit", "base_model": "org/base", "library_name": "peft", "tags": ["merge"]}
    for number in range(7):
        files = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
        hub.put(f"org/adapter-{number}", files, card=card, downloads=(number * 3) % 7)
    hub.put("else/model", {f"folder/{number:02}.txt": b"x" for number in range(8)}, tags=["topic"])
    hub.put("else/hidden", {"config.json": b"{}"}, tags=["topic"], private=True)
    hub.page(3)
    hub.clear()
    told = client(
        hub,
        tmp_path / "home",
        """
wanted = ["base_model:adapter:org/base", "peft"]
found = api.list_models(filter=wanted, sort="downloads", expand=["sha", "downloads", "baseModels", "safetensors"])
told["found"] = [[model.id, model.downloads] for model in found]
told["limited"] = [model.id for model in api.list_models(author="org", limit=4)]
told["searched"] = [model.id for model in api.list_models(search="ADAPTER-5", full=True, cardData=True)]
told["topic"] = [model.id for model in api.list_models(filter="topic")]
one = next(iter(api.list_models(search="adapter-5", full=True, cardData=True)))
told["one"] = [one.card_data.license, [file.rfilename for file in one.siblings], one.sha, one.gated, one.private]
info = api.model_info("org/adapter-5", files_metadata=True)
told["info"] = [info.card_data.base_model, info.tags, info.safetensors.parameters, info.sha, info.library_name]
told["sizes"] = {file.rfilename: [file.size, file.lfs and file.lfs.sha256] for file in info.siblings}
told["bases"] = api.model_info("org/adapter-5", expand=["baseModels"]).base_models
told["card"] = ModelCard.load("org/adapter-5").data.license
told["tree"] = [entry.path for entry in api.list_repo_tree("else/model", recursive=True)]
told["top"] = [[type(entry).__name__, entry.path] for entry in api.list_repo_tree("else/model")]
told["inner"] = len(list(api.list_repo_tree("else/model", "folder")))
told["paths"] = [entry.path for entry in api.get_paths_info("else/model", ["folder/03.txt", "folder", "absent"])]
told["exists"] = [api.file_exists("else/model", "folder/03.txt"), api.file_exists("else/model", "absent")]
told["commits"] = [commit.title for commit in api.list_repo_commits("else/model")]
""",
    )
    assert told["found"] == sorted(([f"org/adapter-{n}", n * 3 % 7] for n in range(7)), key=lambda pair: -pair[1])
    assert told["limited"] == [f"org/adapter-{n}" for n in range(4)]
    assert told["searched"] == ["org/adapter-5"]
    assert told["topic"] == ["else/model"]
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    license, siblings, sha, gated, private = told["one"]
    assert (license, siblings, gated, private) == ("mit", names, False, False)
    base, tags, parameters, same, library = told["info"]
    assert (base, parameters, same, library) == ("org/base", {"F32": 5000, "BF16": 6}, sha, "peft")
    assert {"peft", "merge", "safetensors", "license:mit", "base_model:org/base"} <= set(tags)
    assert told["sizes"]["adapter_model.safetensors"] == [len(WEIGHTS), digest(WEIGHTS)]
    assert told["sizes"]["adapter_config.json"] == [2, None]
    assert told["bases"] == {"relation": "adapter", "models": [{"id": "org/base"}]}
    assert told["card"] == "mit"
    assert told["tree"] == ["folder", *(f"folder/{number:02}.txt" for number in range(8))]
    assert told["top"] == [["RepoFolder", "folder"]]
    assert told["inner"] == 8
    assert told["paths"] == ["folder", "folder/03.txt"]
    assert told["exists"] == [True, False]
    assert told["commits"] == ["files of a test", "initial commit"]
    pages = [request.query for request in hub.log() if request.path == "/api/models"]
    assert len([query for query in pages if "sort=downloads" in query]) == 3
    assert any("cursor=6" in query for query in pages)


def test_models_are_published(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    contents = {
        "model.safetensors": WEIGHTS,
        "sub/again.safetensors": WEIGHTS,
        "config.json": b"{}",
        "README.md": b"---\nlicense: mit\nbase_model:\n- org/a\n- org/b\ntags: # of the Hub\n- merge\n---\n# A merge\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    told = client(
        hub,
        tmp_path / "home",
        f"""
folder = {str(folder)!r}
told["url"] = api.create_repo("me/merged", private=True).repo_id
told["again"] = error(api.create_repo, "me/merged")
api.create_repo("me/merged", exist_ok=True)
start = api.model_info("me/merged").sha
first = api.upload_folder(repo_id="me/merged", folder_path=folder, parent_commit=start)
told["first"] = [first.oid, first.oid == api.model_info("me/merged").sha]
told["found"] = [model.id for model in api.list_models(filter=["base_model:merge:org/a", "merge", "license:mit"])]
told["down"] = sha256(hf_hub_download("me/merged", "sub/again.safetensors"))
told["nothing"] = api.upload_folder(repo_id="me/merged", folder_path=folder).oid
more = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("sub/"), CommitOperationDelete("config.json")]
told["conflict"] = error(api.create_commit, "me/merged", more, commit_message="late", parent_commit=start)
told["absent"] = error(api.create_commit, "me/merged", [CommitOperationDelete("no.txt")], commit_message="no")
told["lost"] = error(api.create_commit, "me/merged", more, commit_message="lost", revision="v9")
api.create_branch("me/merged", branch="dev/x")
api.create_commit("me/merged", more, commit_message="more", revision="dev/x", parent_commit=first.oid)
api.create_tag("me/merged", tag="v1", revision="dev/x")
told["twice"] = error(api.create_tag, "me/merged", tag="v1")
refs = api.list_repo_refs("me/merged")
told["refs"] = [[ref.name for ref in refs.branches], [ref.name for ref in refs.tags]]
""",
        token=hub.token,
    )
    assert told["url"] == "me/merged"
    assert told["again"] == ["HfHubHTTPError", 409]
    oid, newest = told["first"]
    assert newest and told["nothing"] == oid
    assert told["found"] == ["me/merged"]
    assert told["down"] == digest(WEIGHTS)
    assert told["conflict"] == ["HfHubHTTPError", 412]
    assert told["absent"] == ["RemoteEntryNotFoundError", 404]
    assert told["lost"] == ["RevisionNotFoundError", 404]
    assert told["twice"] == ["HfHubHTTPError", 409]
    assert told["refs"] == [["main", "dev/x"], ["v1"]]
    published = hub.files("me/merged")
    assert published.pop(".gitattributes")
    assert published == {name: digest(content) for name, content in contents.items()}
    assert set(hub.files("me/merged", "v1")) == {".gitattributes", "README.md", "model.safetensors", "new.txt"}
    uploads = [request for request in hub.log() if request.method == "PUT"]
    assert {(request.host, request.authorization, request.received) for request in uploads} == {
        (hub.storage, False, len(WEIGHTS))
    }


def test_faults_befall_the_requests_they_are_meant_for(hub: Hub, tmp_path: Path) -> None:
    bad = WEIGHTS[::-1]  # the client keeps equal bytes of two files once
    hub.put("org/a", {"config.json": b"{}", "cut.safetensors": WEIGHTS, "bad.safetensors": bad})
    hub.put("org/b", {"config.json": b"{}"})
    hub.fail("GET /api/models/org/a", [503, 429], retry_after=7)
    hub.fail("HEAD .*/org/b/", [500])
    hub.cut("GET .*/cut.safetensors", after=3000)
    hub.corrupt("bad.safetensors")
    hub.cut("PUT ", after=100)
    hub.delay("whoami", 0.3)
    hub.throttle("/org/b/", 4)
    told = client(
        hub,
        tmp_path / "home",
        f"""
import time
told["info"] = [error(api.model_info, "org/a") for _ in range(3)]
try: api.model_info("org/a", revision="v9")
except RevisionNotFoundError: told["cleared"] = True
told["cut"] = sha256(hf_hub_download("org/a", "cut.safetensors"))
told["bad"] = sha256(hf_hub_download("org/a", "bad.safetensors"))
told["better"] = sha256(hf_hub_download("org/a", "bad.safetensors", force_download=True))
began = time.monotonic()
api.whoami()
told["delayed"] = time.monotonic() - began
began = time.monotonic()
hf_hub_download("org/b", "config.json")
told["throttled"] = time.monotonic() - began
upload = {str(tmp_path / "up.safetensors")!r}
Path(upload).write_bytes(bytes(range(256)))
api.upload_file(path_or_fileobj=upload, path_in_repo="up.safetensors", repo_id="org/a")
told["up"] = sha256(hf_hub_download("org/a", "up.safetensors"))
""",
        token=hub.token,
    )
    assert told["info"] == [["HfHubHTTPError", 503], ["HfHubHTTPError", 429], None]
    assert told["cleared"]
    assert told["cut"] == digest(WEIGHTS)
    assert told["bad"] == digest(bad[:-1] + bytes([bad[-1] ^ 0xFF]))
    assert told["better"] == digest(bad)
    assert told["delayed"] >= 0.3
    assert told["throttled"] >= 0.5
    assert told["up"] == digest(bytes(range(256)))
    log = hub.log()
    assert [request.status for request in log if request.method == "HEAD" and "/org/b/" in request.path] == [500, 200]
    cut = [request for request in log if request.method == "GET" and request.path.endswith("cut.safetensors")]
    assert [request.sent for request in cut] == [3000, len(WEIGHTS)]
    assert [(request.status, request.received) for request in log if request.method == "PUT"] == [(0, 256), (200, 256)]


def test_a_large_file_needs_no_memory_and_a_client_may_die_over_it(hub: Hub, tmp_path: Path) -> None:
    large, size = tmp_path / "large.safetensors", 120 << 20
    with large.open("wb") as file:
        file.seek(size // 2)
        file.write(b"middle")
        file.truncate(size)
    hub.put("org/large", {"large.safetensors": large})
    hub.throttle("GET .*large", 1 << 20)
    victim = start(hub, tmp_path / "home", 'hf_hub_download("org/large", "large.safetensors")')
    while not any(request.sent for request in hub.log()):
        assert victim.poll() is None
        time.sleep(0.02)
    victim.kill()
    victim.communicate()
    assert 0 < sum(request.sent for request in hub.log()) < size
    hub.clear()
    hub.cut("GET .*large", after=size - 1)
    code = f"""
with HfFileSystem().open("org/large/large.safetensors", block_size=64) as file:
    file.seek({size // 2})
    told["middle"] = file.read(6).decode()
told["whole"] = os.path.getsize(hf_hub_download("org/large", "large.safetensors"))
"""
    assert client(hub, tmp_path / "home", code) == {"middle": "middle", "whole": size}
    assert [request.sent for request in hub.log()][-2:] == [size - 1, 10 << 20]  # resumed after whole pieces of 10 MiB
    memory = Path(f"/proc/{hub.process.pid}/status")
    if memory.exists():
        peak = next(line for line in memory.read_text().splitlines() if line.startswith("VmHWM"))
        assert int(peak.split()[1]) < 60 << 10


def test_a_hub_that_is_down_is_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.stop()
    assert client(hub, tmp_path / "home", 'told["info"] = error(api.model_info, "org/a")[0]') == {
        "info": "ConnectError"
    }


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, Message, bytes]:
    """An answer as it comes, redirects included."""
    host, path = urlsplit(url).netloc, url.split(urlsplit(url).netloc)[1]
    with closing(HTTPConnection(host)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def test_ranges_signatures_and_headers(hub: Hub) -> None:
    sha = hub.put("org/a", {"config.json": b"0123456789", "w.safetensors": WEIGHTS, "empty.txt": b""})
    config = f"{hub.url}/org/a/resolve/main/config.json"
    status, headers, body = ask(config, "HEAD")
    assert (status, body, headers["Content-Length"], headers["X-Repo-Commit"]) == (200, b"", "10", sha)
    assert headers["ETag"] == f'"{git_blob(b"0123456789")}"'
    for span, part in {"bytes=2-4": b"234", "bytes=7-": b"789", "bytes=-3": b"789", "bytes=8-99": b"89"}.items():
        status, headers, body = ask(config, Range=span)
        assert (status, body) == (206, part)
    assert headers["Content-Range"] == "bytes 8-9/10"
    assert ask(config, Range="bytes=10-")[0] == 416
    assert ask(f"{hub.url}/org/a/resolve/main/empty.txt")[::2] == (200, b"")
    status, headers, body = ask(f"{hub.url}/org/a/resolve/main/w.safetensors")
    assert (status, body, headers["X-Linked-Size"]) == (302, b"", str(len(WEIGHTS)))
    assert headers["X-Linked-Etag"] == f'"{digest(WEIGHTS)}"'
    place = headers["Location"]
    assert place.startswith(hub.storage)
    assert ask(place)[::2] == (200, WEIGHTS)
    assert ask(place[:-1])[0] == 403
    assert ask(place, Authorization=f"Bearer {hub.token}")[0] == 400
    assert ask(config, Authorization="Bearer hf_nobody")[0] == 401
    hub.fail("config", [429], retry_after=7)
    status, headers, body = ask(config)
    assert (status, headers["Retry-After"]) == (429, "7")
    assert ask(f"{hub.url}/api/models?inference=warm")[0] == 400
