"""Weights files on the Hub: opened by their headers, then downloaded where they are read, with progress."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.hub_fixture import Hub

PROGRAM = """
import json
from pathlib import Path
from huggingface_hub import constants
from merging.hub.address import Address
from merging.hub.download import fetch_range
from merging.hub.repository import open_repository

repository = open_repository(Address("org/a"))
path = repository.folder / "model.safetensors"
remote = repository.remote_files[path]
facts = {"placeholder": path.stat().st_size}
tensors, _ = repository.open_file(path)
facts["at_hand"] = tensors["w"].at_hand

blob = Path(constants.HF_HUB_CACHE) / "models--org--a" / "blobs" / remote.sha256
blob.parent.mkdir(parents=True, exist_ok=True)
half = remote.size // 2
blob.with_name(blob.name + ".part").write_bytes(fetch_range(remote.url, 0, half, "half"))
calls = []
remote.fetch(lambda done, total: calls.append((done, total)))
facts |= {"first": calls[0][0] > half, "last": calls[-1], "size": remote.size, "link": path.is_symlink()}
facts["grows"] = sorted(calls) == calls
facts["sum"] = float(tensors["w"].read().sum())
facts["again"] = float(repository.open_file(path)[0]["w"].read().sum())
print(json.dumps(facts))
"""


def test_a_file_is_opened_by_its_header_and_then_by_itself(hub: Hub, tmp_path: Path) -> None:
    save_file({"w": torch.ones(400, 1000)}, tmp_path / "model.safetensors")
    hub.put("org/a", {"config.json": b"{}", "model.safetensors": tmp_path / "model.safetensors"})
    environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "model.safetensors").stat().st_size
    assert json.loads(done.stdout) == {
        "placeholder": 0,
        "at_hand": False,
        "first": True,
        "last": [size, size],
        "size": size,
        "link": True,
        "grows": True,
        "sum": 400_000.0,
        "again": 400_000.0,
    }
