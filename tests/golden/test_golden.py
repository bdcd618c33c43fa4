"""Golden merges: their bytes are those of version 0.1.0, with headers and the order of tensors.

A change that is wanted is recorded by ``python tests/golden/test_golden.py``, which writes ``golden.json``.

Versions in headers differ from release to release and are taken out before hashing, as are the keys of the sources,
which version 0.1.0 did not write. The merges of ``EXACT`` have the
same bytes on every processor and with every torch. Those of ``APPROXIMATE`` are held to a sketch of their values
everywhere, and to their bytes only with the torch, the processor and the kernels that the list was recorded on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load

from merging.cli.main import cli
from support.golden_cases import APPROXIMATE, EXACT, RECIPES
from support.golden_models import make_models

KEPT = Path(__file__).with_name("golden.json")
VERSIONS = ("merging_version", "merging_sources", "torch_version")


def kernels() -> str:
    """The torch, the kernels and the processor, which decide how sums and decompositions are rounded."""
    processor = platform.processor() or platform.machine()
    if (facts := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in facts.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {processor}"


def run(commands: str) -> None:
    """Run commands of ``merge`` in the working folder."""
    for command in commands.split(";"):
        words = command.split()
        done = CliRunner().invoke(cli, words, prog_name="merge")
        assert done.exit_code == 0, done.output


def outputs(folder: Path) -> list[Path]:
    """The files that a merge is read from; the card for readers is held by tests of its own."""
    kept = [
        path for name in ("out", "out.safetensors", "pack.safetensors") for path in sorted((folder / name).rglob("*"))
    ]
    kept += [folder / name for name in ("out.safetensors", "pack.safetensors")]
    return [path for path in kept if path.is_file() and path.suffix in (".json", ".safetensors")]


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header without versions, in its order, and its data."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    for version in VERSIONS:
        header.get("__metadata__", {}).pop(version, None)
    return header, content[8 + size :]


def header_of(path: Path) -> bytes:
    """The part of a file that is the same on every processor."""
    return json.dumps(parts(path)[0]).encode() if path.suffix == ".safetensors" else path.read_bytes()


def digest(folder: Path, values: bool = True) -> str:
    """SHA-256 over all outputs, with their names."""
    sum_of = hashlib.sha256()
    for path in outputs(folder):
        sum_of.update(str(path.relative_to(folder)).encode() + b"\0" + header_of(path) + b"\0")
        if values and path.suffix == ".safetensors":
            sum_of.update(parts(path)[1])
    return sum_of.hexdigest()


def sketch(folder: Path) -> list[float]:
    """Two sums of each tensor: of its entries, and of their products with a wave, which another order would change."""
    numbers: list[float] = []
    for path in outputs(folder):
        if path.suffix == ".safetensors":
            for _, value in sorted(load(path.read_bytes()).items()):
                flat = value.double().flatten()
                wave = torch.arange(len(flat), dtype=torch.float64).mul(0.7).cos()
                numbers += [float(flat.sum()), float(flat @ wave)]
    return numbers


def write_recipes(folder: Path) -> None:
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(textwrap.dedent(text))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    make_models(folder)
    write_recipes(folder)
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all models in it, by links."""
    link_all(models, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def link_all(models: Path, folder: Path) -> None:
    for path in models.iterdir():
        (folder / path.name).symlink_to(path)


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads(KEPT.read_text())


@pytest.mark.parametrize("name", EXACT)
def test_bytes(golden: Any, folder: Path, name: str) -> None:
    run(EXACT[name])
    assert digest(folder) == golden["exact"][name]


@pytest.mark.parametrize("name", APPROXIMATE)
def test_values(golden: Any, folder: Path, name: str) -> None:
    run(APPROXIMATE[name])
    wanted = golden["approximate"][name]
    assert digest(folder, values=False) == wanted["header"]
    assert sketch(folder) == pytest.approx(wanted["sketch"], rel=1e-4, abs=1e-3)
    if kernels() == golden["kernels"]:
        assert digest(folder) == wanted["bytes"]


def record() -> dict[str, Any]:
    """The digests and sketches of all merges, made here and now."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"kernels": kernels(), "exact": {}, "approximate": {}}
    with tempfile.TemporaryDirectory() as root:
        models = Path(root, "models")
        models.mkdir()
        make_models(models)
        write_recipes(models)
        for number, (name, commands) in enumerate({**EXACT, **APPROXIMATE}.items()):
            folder = Path(root, str(number))
            folder.mkdir()
            link_all(models, folder)
            os.chdir(folder)
            try:
                run(commands)
            except AssertionError as failed:
                print(f"{name}: {failed}", file=sys.stderr)
                continue
            if name in EXACT:
                found["exact"][name] = digest(folder)
            else:
                facts = {"header": digest(folder, values=False), "bytes": digest(folder)}
                found["approximate"][name] = facts | {"sketch": [round(each, 5) for each in sketch(folder)]}
        os.chdir(Path(__file__).parent)
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else KEPT
    target.write_text(json.dumps(record(), indent=1) + "\n")
