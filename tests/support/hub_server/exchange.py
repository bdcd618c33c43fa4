"""A request and its answer over HTTP/1.1: bodies in and out, ranges, the log, and the faults on the way."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from faults import Lost
from hub import Account, Hub
from log import Entry
from refusals import BadRequest, Refusal
from repositories import CHUNK, read

__all__ = ["UNNOTED", "Answer", "Exchange", "Port", "Route", "json_answer"]

UNNOTED = ("/_control/", "/api/agent-harnesses")
"""Paths that neither faults nor the log see: what the tests ask, and what the client asks about itself once a day."""


@dataclass
class Answer:
    """A status, headers, and a body: bytes, or a file on the disk, of which a client may ask for a range."""

    status: int = 200
    body: bytes | Path = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


@dataclass(frozen=True)
class Route:
    """What answers a method and a path; a HEAD is answered like a GET.

    The pattern is of the path as it was sent: a slash inside a name is %2F there. `answer` is called with the
    exchange and with the groups of the pattern, unquoted.
    """

    method: str
    pattern: str
    answer: Callable[..., Answer]


class Port(ThreadingHTTPServer):
    """A port of this machine and its routes; every connection has a thread of its own."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, routes: Sequence[Route], hub: Hub, host: str = "127.0.0.1") -> None:
        super().__init__(("127.0.0.1", port), Exchange)
        self.url = f"http://{host}:{self.server_port}"
        self.routes, self.hub = routes, hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error; others are told on stderr."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Exchange(BaseHTTPRequestHandler):
    """The requests that come over one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Port

    @property
    def hub(self) -> Hub:
        return self.server.hub

    @property
    def account(self) -> Account:
        return self.hub.account(self.headers["Authorization"])

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        target = urlsplit(self.path)
        self.raw_path, self.query = target.path, parse_qs(target.query, keep_blank_values=True)
        self.path = unquote(target.path)
        known = "Authorization" in self.headers
        self.entry = Entry(self.command, self.path, target.query, self.server.url, self.headers["Range"], known)
        self._unread = self._incoming()
        try:
            try:
                self._send(self._answer())
            except Refusal as refusal:
                self._send(json_answer(refusal.fields, refusal.status, refusal.headers))
            for _ in self._unread:  # or the next request of the connection would begin in the middle of this one
                pass
        except Lost:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _answer(self) -> Answer:
        if not self.path.startswith(UNNOTED):
            self.hub.log.add(self.entry)
            self.hub.faults.meet(self._name)
        method = "GET" if self.command == "HEAD" else self.command
        for route in self.server.routes:
            if route.method == method and (match := re.fullmatch(route.pattern, self.raw_path)):
                try:
                    return route.answer(self, *(group and unquote(group) for group in match.groups()))
                except (Refusal, Lost, ConnectionError):
                    raise
                except Exception as error:
                    traceback.print_exc()
                    raise Refusal(500, f"the test's Hub is at fault: {error!r}") from error
        raise BadRequest(f"the test's Hub has no answer to {self._name}")

    @property
    def _name(self) -> str:
        """What the patterns of faults are looked for in."""
        return f"{self.command} {self.path}"

    def _incoming(self) -> Iterator[bytes]:
        """The body of the request, a piece at a time."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield from self._receive(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self._receive(int(self.headers.get("Content-Length", 0)))

    def _receive(self, left: int) -> Iterator[bytes]:
        while left:
            piece = self.rfile.read(min(left, CHUNK))
            if not piece:
                raise Lost
            left -= len(piece)
            self.entry.received += len(piece)
            yield piece

    def json(self) -> Any:
        return json.loads(self.body())

    def body(self) -> bytes:
        return b"".join(self._unread)

    def upload(self, size: int) -> Iterator[bytes]:
        """The body of a request that brings a file of this size, and what befalls it."""
        return self.hub.faults.body(self._name, self._unread, 0, size, size)

    def _send(self, answer: Answer) -> None:
        if isinstance(answer.body, bytes):
            self._send_head(answer.status, answer.headers, len(answer.body))
            self._send_body([answer.body])
            return
        size = answer.body.stat().st_size
        span = _span(self.headers["Range"], size)
        start, end = span or (0, size)
        ranges = {"Accept-Ranges": "bytes"} | ({"Content-Range": f"bytes {start}-{end - 1}/{size}"} if span else {})
        self._send_head(206 if span else 200, {**answer.headers, **ranges}, end - start)
        if self.command != "HEAD":
            pieces = read(answer.body, start, end - start)
            self._send_body(self.hub.faults.body(self._name, pieces, start, end, size))

    def _send_head(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self.entry.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_body(self, pieces: Iterable[bytes]) -> None:
        if self.command == "HEAD":
            return
        for piece in pieces:
            self.entry.sent += len(piece)  # before it goes: whoever has the last byte finds it counted
            self.wfile.write(piece)


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """The first byte and the end of the range that is asked for; None for the whole file, as for several ranges."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if not start < end:
        raise Refusal(416, "The range is not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return start, end
