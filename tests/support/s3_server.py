"""A server with the interface of S3 on the own machine, in a process of its own, and settings that lead to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["BUCKET", "connect_to_bucket", "run_server"]

BUCKET = "box"

_SERVER = """
import logging, sys
logging.getLogger("werkzeug").setLevel("ERROR")
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def run_server() -> Iterator[None]:
    """Run a server with an empty bucket, and set the environment of this process to it."""
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    before = dict(os.environ)
    try:
        port = int(server.stdout.readline())
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "hunter2",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        connect_to_bucket().mkdir(BUCKET)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stdin.close()
        server.wait(30)


def connect_to_bucket() -> Any:
    """Return the file system of the server."""
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)
