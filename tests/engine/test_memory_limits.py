"""A limit that a run never passes: merges of more bytes than ``max_memory``, held to it by the system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.engine.process_memory import memory_limits
from support.peaks import peak_of
from support.tiny import save

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process takes")

LAYERS, SHAPE, RANK = 128, (512, 512), 64
NAMES = [f"model.layers.{layer}.mlp.up_proj" for layer in range(LAYERS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three fine-tunes of 67 MB and three adapters of 34 MB."""
    folder = tmp_path_factory.mktemp("models")
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) / 50

    base = {f"{name}.weight": noise(*SHAPE) for name in NAMES}
    save(folder / "base", {name: value.bfloat16() for name, value in base.items()})
    for number in range(3):
        save(folder / f"tuned{number}", {name: (value + noise(*SHAPE) / 9).bfloat16() for name, value in base.items()})
        factors = {
            f"base_model.model.{name}.lora_{side}.weight": noise(*shape)
            for name in NAMES
            for side, shape in (("A", (RANK, SHAPE[1])), ("B", (SHAPE[0], RANK)))
        }
        (folder / f"lora{number}").mkdir()
        save_file(factors, folder / f"lora{number}" / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["up_proj"]}
        (folder / f"lora{number}" / "adapter_config.json").write_text(json.dumps(config))
    return folder


MODELS, LORAS, BASE = ("tuned0", "tuned1", "tuned2"), ("lora0", "lora1", "lora2"), "base"
CASES: dict[str, dict[str, Any]] = {
    "linear": {"models": MODELS, "method": "linear"},
    "ties": {"models": MODELS, "method": "ties", "base": BASE},
    "dare_ties": {"models": MODELS, "method": "dare_ties", "base": BASE, "drop": 0.5},
    "tsv": {"models": MODELS, "method": "tsv", "base": BASE},
    "pcb": {"models": MODELS, "method": "pcb", "base": BASE},
    "adapters": {"models": LORAS, "method": "linear"},
    "adapters of a rank": {"models": LORAS, "method": "ties", "rank": RANK},
    "baked": {"models": LORAS, "method": "linear", "base": BASE, "kind": "model"},
    "quantised": {"models": MODELS, "method": "linear", "quantize": "fp8-channel"},
}


def options(folder: Path, case: str, output: Path) -> dict[str, Any]:
    found = {**CASES[case], "models": [str(folder / name) for name in CASES[case]["models"]], "output": str(output)}
    return {**found, "base": str(folder / BASE)} if "base" in found else found


def limit_of(wanted: dict[str, Any]) -> int:
    """The least memory that a merge accepts, which its inputs are larger than."""
    limit = merging.preview(**wanted).memory(1)
    folders = [Path(name) for name in (*wanted["models"], *filter(None, [wanted.get("base")]))]
    assert sum(file.stat().st_size for each in folders for file in each.glob("*.safetensors")) > limit
    return limit


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_no_merge_passes_its_limit(folder: Path, tmp_path: Path, case: str) -> None:
    """The system refuses every byte beyond it."""
    wanted = options(folder, case, tmp_path / "out")
    limit = limit_of(wanted)
    peak = peak_of(wanted, 8, limit, hard=limit)
    assert peak.workers == 1
    assert peak.taken <= peak.promised <= limit, peak


@pytest.mark.exhaustive
def test_the_system_holds_a_merge_to_the_limit(folder: Path, tmp_path: Path) -> None:
    """Else the test above could not fail."""
    wanted = options(folder, "ties", tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"not enough memory|MemoryError|can't allocate|Thread creation failed"):
        peak_of(wanted, 1, hard=limit_of(wanted) // 6)


def in_scope(limit: int) -> list[str]:
    """The words that run a command in a control group (v2) of its own, which is killed beyond the limit."""
    own = ["--user"] if os.getuid() else []
    properties = [f"--property=MemoryMax={limit}", "--property=MemorySwapMax=0"]
    return ["systemd-run", *own, "--scope", "--quiet", *properties]


@cache
def scopes_work() -> bool:
    try:
        return subprocess.run([*in_scope(1 << 30), "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_no_control_group_kills_a_merge(folder: Path, tmp_path: Path, case: str) -> None:
    """The pages of files that it reads and writes count too, and are freed in time."""
    if not scopes_work():
        pytest.skip("systemd makes no control groups of version 2 here")
    wanted = options(folder, case, tmp_path / "out")
    limit = limit_of(wanted)
    free = peak_of(wanted, 8, limit)
    (tmp_path / "out").rename(tmp_path / "first")
    held = peak_of(wanted, 8, limit, prefix=in_scope(free.imports + limit))
    assert held.taken <= held.promised <= limit, held


def test_limits_of_control_groups_are_read(tmp_path: Path) -> None:
    """Of both versions, and of the groups around the process's own."""
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "job" / "step").mkdir(parents=True)
    (root / "job" / "memory.max").write_text("3000\n")
    (root / "job" / "step" / "memory.max").write_text("max\n")
    (root / "memory" / "docker").mkdir(parents=True)
    (root / "memory" / "memory.limit_in_bytes").write_text("4000\n")
    groups.write_text("9:cpuset:/x\n4:memory:/docker/elsewhere\n0::/job/step\n")
    assert memory_limits(groups, root) == [4000, 3000]
    (root / "memory.max").write_text("2000\n")
    groups.write_text("0::/\n")
    assert memory_limits(groups, root) == [2000]
    assert memory_limits(tmp_path / "none", root) == []
