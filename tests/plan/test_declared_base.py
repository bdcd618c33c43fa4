"""How many blocks LiNeS counts when only adapters are given: their declared base tells, wherever it is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

import merging

CONFIG = json.dumps({"model_type": "llama", "num_hidden_layers": 9}).encode()


def adapter(folder: Path, base: str) -> Path:
    """A LoRA adapter of layers 0 to 2, which says what its base is."""
    tensors = {}
    for layer in range(3):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def counted(adapter: Path, **options: object) -> tuple[int, bool]:
    """The number of blocks, and whether it is said to be a guess."""
    plan = merging.preview([adapter, adapter], method="lines", **options)
    return plan.items[0].site.position.layers, any("number of blocks" in notice for notice in plan.notices)


def test_folder_of_the_declared_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes(CONFIG)
    assert counted(adapter(tmp_path / "a", str(tmp_path / "base"))) == (9, False)


def test_option_before_declared_base(tmp_path: Path) -> None:
    assert counted(adapter(tmp_path / "a", "nobody/nothing"), layers=5) == (5, False)


def test_guess_from_the_adapters(tmp_path: Path) -> None:
    assert counted(adapter(tmp_path / "a", "nobody/nothing")) == (3, True)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as fetching one file takes."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        """The file's facts."""
        self.do_GET()

    def do_GET(self) -> None:
        """The file, if it is the config."""
        self.asked.append(self.path)
        found = self.path.startswith("/org/base/resolve/") and self.path.endswith("/config.json")
        body = CONFIG if found else b""
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", hashlib.sha1(CONFIG).hexdigest())
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a Hub on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_config_from_the_hub_then_from_its_cache(tmp_path: Path, hub: str) -> None:
    """In processes of their own, since the library reads its addresses once; the second has no Hub any more."""
    folder = adapter(tmp_path / "a", "org/base")
    plan = f"merging.preview([{str(folder)!r}] * 2, method='lines')"
    code = f"import merging; print({plan}.items[0].site.position.layers)"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    for address in (hub, "http://127.0.0.1:9"):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment | {"HF_ENDPOINT": address})
        assert done.returncode == 0, done.stderr
        assert done.stdout == "9\n"
    assert Hub.asked
