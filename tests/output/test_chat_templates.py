"""Chat templates of outputs: named, of a file, as text, or the commonest among the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

import merging
from merging.errors import InputError, OptionError
from merging.plan.tokens.chat_templates import CHAT_TEMPLATES
from support.tokenized import save_tokenized

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi."
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHello [/INST] Hi.</s>[INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi.</s>\n\n### Instruction:\nBye\n\n"
    "### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi.[|endofturn|]\n[|user|]Bye\n"
    "[|assistant|]",
}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three models of one tokenizer; the last two have a template in common, in two places."""
    made = [save_tokenized(tmp_path / name, "a") for name in ("one", "two", "three")]
    (made[1] / "chat_template.jinja").write_text("{{ 'common' }}")
    for folder, text in ((made[0], "{{ 'rare' }}"), (made[2], "{{ 'common' }}")):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": text}))
    return made


def talk(out: Path) -> str:
    text: str = AutoTokenizer.from_pretrained(out).apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    return text


def merge(folders: list[Path], out: Path, **options: Any) -> Path:
    merging.merge(folders, method="linear", output=out, **options)
    return out


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_named_templates_speak_their_formats(folders: list[Path], tmp_path: Path, name: str) -> None:
    assert talk(merge(folders, tmp_path / "out", chat_template=name)) == RENDERED[name]


def test_auto_is_the_commonest(folders: list[Path], tmp_path: Path) -> None:
    assert talk(merge(folders, tmp_path / "out")) == "rare"
    auto = merge(folders, tmp_path / "auto", chat_template="auto")
    assert talk(auto) == "common"
    assert "chat_template" not in json.loads((auto / "tokenizer_config.json").read_text())


def test_a_file_and_a_text(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ 'mine' }}\n")
    out = merge(folders, tmp_path / "file", chat_template=tmp_path / "mine.jinja")
    assert talk(out) == "mine"
    with safe_open(out / "model.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["merging_recipe"])
    assert recipe["chat_template"] == "{{ 'mine' }}\n"  # the text, as the file may change
    assert talk(merge(folders, tmp_path / "text", chat_template="{{ messages[0]['content'] }}")) == "Be brief."


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        ("chatmal", OptionError, "no chat template 'chatmal'.*did you mean 'chatml'"),
        ("{% for %}", OptionError, "is not a Jinja template: line 1"),
        (f"{{{{ {'(' * 5000}1{')' * 5000} }}}}", OptionError, "is nested too deeply to be a Jinja template"),
        ("none.jinja", InputError, "none.jinja: there is no such file"),
    ],
)
def test_wrong_templates_are_refused(
    folders: list[Path], tmp_path: Path, template: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        merge(folders, tmp_path / "out", chat_template=template)
    assert not (tmp_path / "out").exists()
