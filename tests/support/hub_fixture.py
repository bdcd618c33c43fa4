"""The fixture `hub`: the project's own Hub in a process of its own, for tests with the real client.

The Hub is tests/support/hub_server. Tests run offline, so that all that is to reach the Hub runs in a subprocess:

    def test_x(hub: Hub, tmp_path: Path) -> None:
        hub.put("org/a", {"config.json": b"{}", "model.safetensors": tmp_path / "a.safetensors"})
        subprocess.run([sys.executable, "-m", "merging", ...], env=hub.environment(tmp_path / "home"))
        assert [request.path for request in hub.log()] == [...]

Faults befall the requests whose "METHOD /path" the pattern (a regular expression) is found in; the path has no query
and is unquoted. A large file (any .safetensors) is answered with a redirect at `GET /ORG/NAME/resolve/REVISION/FILE`,
and its bytes come from `GET /storage/ORG/NAME/COMMIT/FILE` at `hub.storage`; uploads of large files go to
`PUT /storage/ORG/NAME/upload/SHA256/SIZE` there.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener
from urllib.request import Request as Call

import pytest
import yaml

__all__ = ["Hub", "Request", "hub", "serve"]

_SERVER = Path(__file__).parent / "hub_server" / "server.py"
_SET_BY_USERS = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
_call = build_opener(ProxyHandler({}))


@dataclass(frozen=True)
class Request:
    """A request that came in. `host` is `hub.url` or `hub.storage`; `path` is unquoted, `query` as it was sent.

    `sent` and `received` are the bytes of the answer's and the request's body that have passed, up to now;
    `status` is 0 until there is an answer.
    """

    method: str
    path: str
    query: str
    host: str
    range: str | None
    authorization: bool
    status: int
    sent: int
    received: int


@dataclass(frozen=True)
class Hub:
    """A running Hub. `token` may do everything; `outsider` is a valid token that has no rights anywhere."""

    url: str
    storage: str
    token: str
    outsider: str
    process: subprocess.Popen[str]

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a subprocess whose Hub this is, with its cache in `home`, online, and without a token."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_SET_BY_USERS)}
        local = "127.0.0.1,localhost"
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": local,
            "no_proxy": local,
        }

    def put(
        self,
        repo: str,
        files: Path | Mapping[str, Path | bytes],
        *,
        revision: str = "main",
        tags: Sequence[str] = (),
        card: Mapping[str, Any] | None = None,
        private: bool = False,
        gated: bool = False,
        downloads: int = 0,
    ) -> str:
        """Commit a folder, or files by their names, to a branch; return the commit's SHA.

        The repository and the branch (from main) are made if need be; files that are there stay. `tags` are the
        Hub's topics, besides those that follow from the card and the files. `card` becomes the head of README.md.
        Tags, private, gated and downloads are set anew by each call.
        """
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path for path in files.rglob("*") if path.is_file()}
        if card is not None:
            if "README.md" in files:
                raise ValueError("a card is the head of README.md, which is among the files")
            files = {**files, "README.md": f"---\n{yaml.safe_dump(dict(card))}---\n".encode()}
        order = {
            "repo": repo,
            "revision": revision,
            "tags": list(tags),
            "private": private,
            "gated": "manual" if gated else False,
            "downloads": downloads,
            "files": {name: _content(file) for name, file in files.items()},
        }
        sha: str = self._control("put", order)["sha"]
        return sha

    def tag(self, repo: str, tag: str, revision: str = "main") -> None:
        """Give a commit a tag of git."""
        self._ask(f"/api/models/{repo}/tag/{revision}", {"tag": tag}, {"Authorization": f"Bearer {self.token}"})

    def files(self, repo: str, revision: str = "main") -> dict[str, str]:
        """The files of a repository and the SHA-256 of each."""
        files: dict[str, str] = self._control("files?" + urlencode({"repo": repo, "revision": revision}))
        return files

    def log(self) -> list[Request]:
        """The requests since the start or the last `clear`, in the order in which they came in."""
        return [Request(**entry) for entry in self._control("log")]

    def clear(self) -> None:
        """Forget the log and the faults."""
        self._control("clear", {})

    def page(self, size: int) -> None:
        """Let no page of a list be longer than this."""
        self._control("page", {"size": size})

    def fail(self, pattern: str, statuses: Sequence[int], retry_after: int | None = None) -> None:
        """Answer so many requests with these statuses, one each; `retry_after` is told with them, in seconds."""
        self._fault("fail", pattern, statuses=list(statuses), retry_after=retry_after)

    def delay(self, pattern: str, seconds: float) -> None:
        """Answer these requests only after a while."""
        self._fault("delay", pattern, seconds=seconds)

    def cut(self, pattern: str, after: int, times: int = 1) -> None:
        """Close the connection after so many bytes of a file, down or up; files that are shorter are left alone."""
        self._fault("cut", pattern, after=after, times=times)

    def corrupt(self, pattern: str, offset: int = -1, times: int = 1) -> None:
        """Send a file with one byte changed: the one at `offset`, from the end if negative."""
        self._fault("corrupt", pattern, offset=offset, times=times)

    def throttle(self, pattern: str, bytes_per_second: int) -> None:
        """Let the bytes of these files pass slowly, down or up."""
        self._fault("throttle", pattern, bytes_per_second=bytes_per_second)

    def stop(self) -> None:
        """The Hub goes down, and stays down."""
        self.process.kill()
        self.process.communicate()

    def _fault(self, kind: str, pattern: str, **fields: Any) -> None:
        self._control("fault", {"kind": kind, "pattern": pattern, **fields})

    def _control(self, path: str, order: Mapping[str, Any] | None = None) -> Any:
        return self._ask(f"/_control/{path}", order, {})

    def _ask(self, path: str, order: Mapping[str, Any] | None, headers: Mapping[str, str]) -> Any:
        body = None if order is None else json.dumps(order).encode()
        try:
            with _call.open(Call(self.url + path, body, dict(headers))) as answer:
                return json.load(answer)
        except HTTPError as error:
            with error:
                raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from None


def _content(file: Path | bytes) -> dict[str, str]:
    if isinstance(file, bytes):
        return {"base64": base64.b64encode(file).decode()}
    return {"path": str(file.resolve())}


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """A Hub that keeps its files in a folder, as long as the context lasts; for fixtures of a wider scope."""
    command = [sys.executable, str(_SERVER), "--root", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Hub(**json.loads(process.stdout.readline()), process=process)
        finally:
            process.kill()


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with nothing in it, for one test."""
    with serve(tmp_path_factory.mktemp("hub")) as running:
        yield running
