"""`merge verify` on the command line and in Python: exit codes, what is printed, and what cannot be looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import merging
from merging.cli.verify import verify_command
from merging.errors import InputError, OptionError, command_line_words
from merging.serving import PROGRAMS, verify
from support import tiny
from support.adapters import QUIRKS, edit_config, llama_adapters, train
from support.hub_fixture import Hub
from support.serving_edits import SERVED

pytestmark = [*QUIRKS, pytest.mark.exhaustive]


def run(*words: object) -> Result:
    with command_line_words():
        done = CliRunner().invoke(verify_command, [str(word) for word in words])
    assert "Traceback" not in done.output
    assert isinstance(done.exception, SystemExit | None)
    return done


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_adapters(tmp_path_factory.mktemp("llama"))


# ---- exit codes and what is printed


def test_served(llama: Path) -> None:
    done = run(llama / "plain", "--for", "vllm", "--for", "peft")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{llama / 'plain'}: an adapter",
        "  files   ok  nothing is refused or ignored",
        "  vllm    ok  nothing is refused or ignored",
        "  peft    ok  nothing is refused or ignored",
        "  values  -   not read (--values)",
    ]


def test_values_that_are_read_are_said_to_be(llama: Path) -> None:
    done = run(llama / "plain", "--values")
    assert [" ".join(line.split()) for line in done.stdout.splitlines()][2] == "values ok no NaN or infinities"
    assert "not read" not in done.stdout
    for words, read in ((["--values"], True), ([], False)):
        assert json.loads(run(llama / "plain", *words, "--json").stdout)["values_read"] is read


def test_not_served(llama: Path) -> None:
    done = run(llama / "dora", "--for", "vllm")
    assert (done.exit_code, done.stderr) == (1, "")
    assert done.stdout.splitlines()[2:] == [
        "  vllm    refuses  this variant of LoRA is not served",
        "                   use_dora = True",
        "                   -> merge it into its base with --as model, and serve that",
        "  vllm    refuses  tensors that are not named as LoRA's factors",
        "                   base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector",
        "                   base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector",
        "                   base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "                   and 3 more",
        f"{'':19}-> merge it with --method passthrough if it is LoRA, else into its base with --as model",
        "  values  -        not read (--values)",
    ]


def test_warnings_alone_serve(llama: Path, tmp_path: Path) -> None:
    done = run(train(tmp_path / "a", llama / "base", 1, ["lm_head"]), "--for", "vllm")
    assert done.exit_code == 0
    assert " warns " in done.stdout


def test_json(llama: Path) -> None:
    done = run(llama / "dora", "--for", "vllm", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1
    assert (told["path"], told["kind"], told["programs"]) == (str(llama / "dora"), "adapter", ["vllm"])
    assert told["served"] is False
    assert told["findings"][1] == {
        "program": "vllm",
        "severity": "refuses",
        "what": "this variant of LoRA is not served",
        "where": ["use_dora = True"],
        "todo": "merge it into its base with --as model, and serve that",
        "source": "vLLM 0.32.0: lora/peft_helper.py, run",
    }


def test_rank_of_the_server(llama: Path) -> None:
    assert run(llama / "plain", "--for", "vllm", "--max-lora-rank", 4).exit_code == 0
    done = run(llama / "plain", "--for", "vllm", "--max-lora-rank", 1)
    assert done.exit_code == 1
    assert "rank 4, --max-lora-rank 1: --max-lora-rank 8 is enough" in done.stdout


def test_values_are_read_if_asked(llama: Path, tmp_path: Path) -> None:
    state = load_file(llama / "plain" / "adapter_model.safetensors")
    name = max(state)
    state[name][-1, -1] = torch.inf
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((llama / "plain" / "adapter_config.json").read_bytes())
    assert run(tmp_path).exit_code == 0
    done = run(tmp_path, "--values")
    assert done.exit_code == 1
    assert "it holds NaN or infinities, and so will its answers" in done.stdout
    assert "no NaN" not in done.stdout
    assert name in done.stdout


def test_copy_of_the_embedding_is_told_from_a_head_by_values(tmp_path: Path) -> None:
    tensors = tiny.model()
    copy = tiny.save(
        tmp_path / "copy",
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        {**tiny.CONFIG, "tie_word_embeddings": True},
    )
    other = tiny.save(tmp_path / "other", tensors, {**tiny.CONFIG, "tie_word_embeddings": True})
    for path in (copy, other):
        assert "whether it is a copy, its values decide" in run(path).stdout
    assert run(copy, "--values").exit_code == 0
    assert "set tie_word_embeddings to false" in run(other, "--values").stdout


def test_default_is_what_loads_such_a_thing(llama: Path) -> None:
    assert verify(str(llama / "plain")).programs == ("peft",)
    assert verify(str(llama / "base")).programs == ("transformers",)


def test_all_programs_in_their_order(llama: Path) -> None:
    verdict = verify(str(llama / "plain"), [*PROGRAMS, "vllm"])
    assert verdict.programs == tuple(PROGRAMS)
    assert verdict.served is False  # diffusers takes no adapters of language models
    assert [each.program for each in verdict.findings] == ["files", *PROGRAMS]


# ---- what there is nothing to say of


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere", "nowhere: there is no such file or folder"),
        ("empty", "empty: holds no weights: none of model.safetensors, its index, or pytorch_model.bin is there"),
        ("plain --for vlm", "there is no program 'vlm' (did you mean 'vllm'?): use vllm, sglang, llama.cpp, peft,"),
        ("plain --for gguf", "there is no program 'gguf': use vllm"),
        ("plain --base nowhere", "nowhere: there is no such base: name its folder, or ORG/NAME on the Hub"),
        ("org/name", "no such model in the Hub's local cache"),
    ],
)
def test_refusals(words: str, message: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").symlink_to(llama / "plain")
    done = run(*words.split())
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr


def test_errors_in_python(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean 'sglang'"):
        verify(str(llama / "plain"), ["sglnag"])
    with pytest.raises(InputError, match="there is no such file or folder"):
        verify(str(tmp_path / "gone"))


# ---- what is damaged is a verdict too


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def pointer(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "adapter_model.safetensors: truncated"),
        (no_json, "adapter_config.json: is not valid JSON"),
        (pointer, "is a Git LFS pointer, not the file: run git lfs pull"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "but neither adapter_model.safetensors nor"),
    ],
)
def test_damage(damage: Callable[[Path], Any], message: str, llama: Path, tmp_path: Path) -> None:
    folder = edit_config(train(tmp_path / "a", llama / "base", 1, ["q_proj"]))
    damage(folder)
    done = run(folder, "--for", "vllm")
    assert done.exit_code == 1
    assert "files  refuses  they cannot be opened" in done.stdout
    assert message in done.stdout
    (finding,) = verify(str(folder), ["vllm"]).findings
    assert (finding.severity, message in finding.where[0]) == ("refuses", True)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    for name, message in (("notes.md", "is not a weights file"), ("m.gguf", "its version of the format is 0")):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(60))
        assert message in run(tmp_path / name).stdout


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m", tiny.model(), shards=2)
    assert run(folder).exit_code == 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.norm.weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "come from different saves" in run(folder).stdout
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "its shard model-00002-of-00002.safetensors is missing" in run(folder).stdout


# ---- what this package writes

VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "linear"},
        {"method": "ties", "rank": 8},
        {"method": "linear", "base": True, "models": ["plain", "dora", "pissa"], "rank": 8},
    ],
    ids=str,
)
def test_merged_adapters_are_served(settings: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    for number, (name, config) in enumerate(VARIANTS.items()):
        edit_config(
            train(tmp_path / name, llama / "base", number, SERVED, **config), base_model_name_or_path="org/base"
        )
    base = {"base": str(llama / "base")} if settings.pop("base", False) else {}
    names = settings.pop("models", ["plain", "plain"])
    merging.merge([str(tmp_path / name) for name in names], output=tmp_path / "merged", **settings, **base)
    programs = ["vllm", "sglang", "llama.cpp", "peft", "transformers"]
    verdict = verify(str(tmp_path / "merged"), programs, base=str(llama / "base"), values=True, load=True)
    assert {each.severity for each in verdict.findings} == {"ok"}, verdict.findings


def test_merged_models_are_served(llama: Path, tmp_path: Path) -> None:
    merging.merge([str(llama / "base")] * 2, method="linear", output=tmp_path / "one")
    merging.merge(
        [str(llama / "dora")], method="linear", base=str(llama / "base"), kind="model", output=tmp_path / "two"
    )
    for name in ("one", "two"):
        (tmp_path / name / "tokenizer.json").write_text("{}")
        programs = ["vllm", "sglang", "llama.cpp", "transformers"]
        verdict = verify(str(tmp_path / name), programs, values=True, load=True)
        assert {each.severity for each in verdict.findings} == {"ok"}, verdict.findings


# ---- on the Hub


def test_model_on_the_hub_is_verified_by_its_header(hub: Hub, llama: Path, tmp_path: Path) -> None:
    hub.put("org/dora", edit_config(train(tmp_path / "dora", llama / "base", 1, ["q_proj"], use_dora=True)))
    hub.put("org/base", llama / "base")
    hub.put("org/cut", {"model.safetensors": b"\xff" * 100, "config.json": b"{}"})

    def shell(*words: str) -> subprocess.CompletedProcess[str]:
        environment = hub.environment(tmp_path / "home")
        command = [sys.executable, "-m", "merging", "verify", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = shell("org/dora", "--for", "vllm", "--base", "org/base", "--json")
    assert done.returncode == 1, done.stderr
    assert "use_dora = True" in json.loads(done.stdout)["findings"][1]["where"]
    whole = [
        each for each in hub.log() if each.path.endswith(".safetensors") and each.method == "GET" and not each.range
    ]
    assert not whole
    assert "this variant" in shell("org/dora", "--for", "sglang").stdout
    refused = shell("org/dora", "--load")
    assert "--load needs the files on this machine: download them first" in refused.stderr
    damaged = shell("org/cut")
    assert damaged.returncode == 1
    assert "org/cut" in damaged.stdout.splitlines()[2]
    assert "org/gone: is neither a local path nor a model on the Hub" in shell("org/gone").stderr
