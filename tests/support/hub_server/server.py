"""A Hub on this machine alone, for tests with the real client of the Hub.

    python tests/support/hub_server/server.py --root FOLDER [--port 0]

It prints one line of JSON (`url`, `storage`, `token`, `outsider`) once it can be reached, and runs until it is killed.
`url` is what HF_ENDPOINT must name; `storage` is a second port, the "other host" that large files come from.
The repositories' files lie in FOLDER; what they belong to is kept in memory only. Nothing but the standard library
is needed. What is served stands in api.py and storage.py, what a test can ask for in control.py.
"""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path

import api
import control
import storage
from exchange import Port
from hub import OUTSIDER_TOKEN, OWNER_TOKEN, Hub

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub on this machine alone, for tests.")
    parser.add_argument("--root", type=Path, required=True, help="the folder that the files lie in")
    parser.add_argument("--port", type=int, default=0, help="the port to listen on; 0 is any that is free")
    options = parser.parse_args()
    hub = Hub(options.root)
    front = Port(options.port, (*control.ROUTES, *api.ROUTES), hub)
    store = Port(0, storage.ROUTES, hub, host="localhost")  # by name, since hosts are told apart by it
    hub.url, hub.storage_url = front.url, store.url
    threading.Thread(target=store.serve_forever, daemon=True).start()
    told = {"url": front.url, "storage": store.url, "token": OWNER_TOKEN, "outsider": OUTSIDER_TOKEN}
    print(json.dumps(told), flush=True)
    front.serve_forever()


if __name__ == "__main__":
    main()
