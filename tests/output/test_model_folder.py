"""What is copied beside merged weights: all that other libraries read there, and nothing else."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import transformers

import merging
from merging.output.model_folder import companion_patterns
from merging.plan import Plan
from support.tiny import CONFIG, model, save


def plan_of(folder: Path) -> Plan:
    paths = [save(folder / str(seed), model(seed)) for seed in (1, 2)]
    return merging.preview(paths, method="linear")


def test_the_files_of_every_tokenizer_of_transformers(tmp_path: Path) -> None:
    """By the names in its own sources."""
    patterns = companion_patterns(plan_of(tmp_path))
    sources = (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py")
    tables = [re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL) for path in sources]
    names = {name for table in tables for text in table for name in re.findall(r'"([\w.-]+\.\w+)"', text)}
    assert len(names) > 20
    assert not [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]


COPIED = (
    "tokenizer.json",
    "normalizer.json",
    "spm.model",
    "1_Pooling/config.json",
    "chat_template.jinja",
    "LICENSE.txt",
)
LEFT = (
    "pytorch_model.bin",
    "optimizer.pt",
    "modeling.py",
    "training_args.bin",
    "model.gguf",
    "onnx/model.onnx",
    ".env",
)


def test_what_is_copied_and_what_is_left(tmp_path: Path) -> None:
    paths = [save(tmp_path / str(seed), model(seed)) for seed in (1, 2)]
    for name in (*COPIED, *LEFT):
        (paths[0] / name).parent.mkdir(exist_ok=True)
        (paths[0] / name).write_text(name)
    merged = merging.merge(paths, method="linear", output=tmp_path / "out")
    found = {str(path.relative_to(merged.path)) for path in merged.path.rglob("*") if path.is_file()}
    assert found == {*COPIED, "README.md", "config.json", "model.safetensors"}
    assert any("code of its own, which is not copied" in notice for notice in merged.notices)


@pytest.mark.parametrize("nested", [False, True])
def test_the_config_of_the_output(tmp_path: Path, nested: bool) -> None:
    text = {"torch_dtype": "float32", "vocab_size": 12}
    config = CONFIG | {"_name_or_path": "org/base"} | ({"text_config": text} if nested else text)
    paths = [save(tmp_path / str(seed), model(seed), config) for seed in (1, 2)]
    merged = merging.merge(paths, method="linear", dtype="bfloat16", output=tmp_path / "out")
    written = json.loads((merged.path / "config.json").read_text())
    part = written["text_config"] if nested else written
    assert (part["torch_dtype"], written["dtype"], part["vocab_size"]) == ("bfloat16", "bfloat16", 12)
    assert "_name_or_path" not in written
