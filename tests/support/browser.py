"""A headless Chromium, driven over its debugging pipe: what a page draws, says, and asks the network for."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM", "Browser", "browser"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""The browser of this machine, None where there is none."""

_HABIT = "CONNECT www.google.com:443 "
"""What the browser connects to in advance, whatever it shows: no page's doing."""

_WORDS = [
    *("--headless=new", "--remote-debugging-pipe", "--window-size=1100,900", "--hide-scrollbars", "--no-sandbox"),
    *("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
]

_SECONDS = 60


class Browser:
    """One page at a time. ``requests`` are the addresses that the page asked for, ``complaints`` what its console and
    its log said, ``connections`` what came to the proxy that is its only way out, and leads nowhere."""

    def __init__(self, write: int, read: int, proxy: socket.socket) -> None:
        self._write, self._read = write, read
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        self.connections: list[str] = []
        threading.Thread(target=self._count, args=(proxy,), daemon=True).start()
        # Pages have a way out of their own, since browsers ask their makers for this and that.
        address = f"127.0.0.1:{proxy.getsockname()[1]}"
        options = {"proxyServer": address, "proxyBypassList": "<-loopback>"}
        self._context = self.ask("Target.createBrowserContext", **options)["browserContextId"]

    def _count(self, proxy: socket.socket) -> None:
        with suppress(OSError):  # closed at the end
            while True:
                connection, _ = proxy.accept()
                with connection, suppress(OSError):
                    connection.settimeout(2)
                    head = connection.recv(1 << 12).decode("latin-1").partition("\r\n")[0]
                    if head and not head.startswith(_HABIT):
                        self.connections.append(head)

    def open(self, address: str) -> None:
        """Load a page in a new tab, and wait until all that it shows has come."""
        self._session = None
        target = self.ask("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.events.clear()
        self.ask("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._read, 1 << 16)
            assert piece, "the browser ended"
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        if "method" in found:
            self.events.append(found)
        return found

    def value(self, script: str) -> Any:
        """What a script in the page evaluates to; a promise is waited for."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, clip: dict[str, float] | None = None) -> bytes:
        """The page, or a rectangle of it (x, y, width, height), as PNG."""
        options = {} if clip is None else {"clip": clip | {"scale": 1}}
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True, **options)["data"])

    @property
    def requests(self) -> list[str]:
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]

    @property
    def complaints(self) -> list[str]:
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, which is gone afterwards."""
    assert CHROMIUM is not None
    (theirs, write), (read, back) = os.pipe(), os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        words = [CHROMIUM, *_WORDS, f"--user-data-dir={profile}"]
        # The protocol wants descriptors 3 and 4, which only a shell can promise between fork and exec.
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{back}', "bash", *words]
        process = subprocess.Popen(
            shell, pass_fds=(theirs, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.close(theirs)
        os.close(back)
        try:
            yield Browser(write, read, proxy)
        finally:
            os.close(write)  # the browser ends with its pipe
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
            os.close(read)
