"""The notebooks under examples/ run from the first cell to the last, and what is stored in them is small and clean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
LARGEST = 100_000
"""Bytes of a notebook with its pictures."""


def read_outputs(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_small_and_clean(notebook: Path) -> None:
    """`python examples/run_notebooks.py --save` stores them so."""
    assert notebook.stat().st_size < LARGEST
    outputs = read_outputs(notebook)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("<table>" in "".join(output.get("data", {}).get("text/html", "")) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "run_notebooks.py", notebook]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
