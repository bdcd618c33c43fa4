"""A server with the interface of S3 on the own machine that fails as it is told, for tests with the real driver.

It needs moto's server and s3fs, as .ci/run object_stores installs them. Faults befall the requests whose
"METHOD /bucket/key RANGE" a regular expression is found in.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from support.object_stores import put

__all__ = ["WITH_S3", "FaultyS3", "faulty_s3"]

WITH_S3 = pytest.mark.skipif(
    not (find_spec("moto") and find_spec("s3fs")),
    reason="the server and driver of S3 are not installed: .ci/run object_stores installs them",
)

BUCKET = "box"

Start = Callable[..., Any]
Application = Callable[[dict[str, Any], Start], Iterable[bytes]]


@dataclass
class Fault:
    """A fault of the next ``times`` requests that match: an error's status and code, bytes that are cut, or a call."""

    pattern: str
    times: int
    status: str = ""
    cut: int = 0
    call: Callable[[], None] | None = None


@dataclass
class FaultyS3:
    """The server. `requests` are "METHOD /bucket/key RANGE", as they came in."""

    url: str
    application: Application
    requests: list[str] = field(default_factory=list)
    _faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, source: Path, name: str = "") -> str:
        """Put a folder or file into the bucket, and return its address."""
        return put(source, f"s3://{BUCKET}/{name or source.name}")

    def fail(self, pattern: str, status: str, times: int = 1) -> None:
        """Answer with an error, such as ``503 SlowDown``: its status and S3's code."""
        self._faults.append(Fault(pattern, times, status=status))

    def cut(self, pattern: str, after: int, times: int = 1) -> None:
        """Close the connection after some bytes of a body."""
        self._faults.append(Fault(pattern, times, cut=after))

    def before(self, pattern: str, call: Callable[[], None]) -> None:
        """Call a function before the next request that matches is answered."""
        self._faults.append(Fault(pattern, 1, call=call))

    def mend(self) -> None:
        """Forget the faults and the requests."""
        self._faults.clear()
        self.requests.clear()

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ.get('HTTP_RANGE', '')}".rstrip()
        with self._lock:
            self.requests.append(request)
            fault = next((each for each in self._faults if each.times and re.search(each.pattern, request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status:
            status, _, code = fault.status.partition(" ")
            start(f"{status} {code}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()]
        if fault is not None and fault.call is not None:
            fault.call()
        body = self.application(environ, start)
        if fault is not None and fault.cut:
            return [b"".join(body)[: fault.cut]]  # the stated length is longer
        return body


@pytest.fixture
def faulty_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A server with an empty bucket, an empty cache, and the driver's settings for it."""
    import s3fs
    from moto.backends import get_backend
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    get_backend("s3").reset()
    server = make_server("127.0.0.1", 0, lambda *_: [], threaded=True)
    store = FaultyS3(f"http://127.0.0.1:{server.server_port}", DomainDispatcherApplication(create_backend_app))
    server.app = store
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",  # the driver and this package try again themselves
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("merging.hub.object_folder._KNOWN", {})  # the ETags of equal files are equal in each test
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(BUCKET)
    yield store
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    thread.join()
    server.server_close()
