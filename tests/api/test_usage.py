"""The line on how to use an output: each call in it is evaluated, and each command is taken apart."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import safetensors.torch
import sentence_transformers
import torch
import transformers

import merging
from merging.api.usage import describe_usage
from merging.serving import verify
from merging.serving.vllm import MAX_RANKS
from support.commands import ok
from support.diffusion_models import build, factors, kohya_modules, quietly, trained
from support.pipelines import diffusion_pipeline, sentence_encoder
from support.tiny import checkpoint

LLAMA = transformers.LlamaConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=False,
)


def llama(folder: Path, seed: int) -> Path:
    """A small language model, as transformers saves it."""
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(LLAMA).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def lora(folder: Path, base: Path, seed: int, rank: int = 9) -> Path:
    """A LoRA of the language model, as PEFT saves it."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def calls(*words: object, output: str) -> list[str]:
    """The ways that a merge prints, which are those in its JSON."""
    printed = [line for line in ok(*words, "-o", output).stderr.splitlines() if line.startswith("to use it: ")]
    assert len(printed) == 1
    usage = json.loads(ok(*words, "-o", output, "--overwrite", "--json").stdout)["usage"]
    assert printed == [f"to use it: {usage}"]
    assert "to use it" not in ok(*words, "-o", output, "--overwrite", "--quiet").output
    return str(usage).split(", or ")


def evaluate(call: str, **names: Any) -> Any:
    """What a call returns, with the libraries that people import for it."""
    libraries = [diffusers, peft, safetensors, sentence_transformers, transformers]
    with quietly():
        return eval(call, {each.__name__: each for each in libraries} | names)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_language_model(tmp_path: Path) -> None:
    models = [llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    loaded, served = calls("-m", "linear", *models, output="my model")
    assert isinstance(evaluate(loaded), transformers.LlamaForCausalLM)
    assert shlex.split(served) == ["vllm", "serve", "my model"]
    assert verify("my model", ["vllm"]).served


def test_a_bare_file_of_weights(tmp_path: Path) -> None:
    models = [llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    (loaded,) = calls("-m", "linear", *models, output="merged.safetensors")
    assert not evaluate(loaded, model=transformers.LlamaForCausalLM(LLAMA)).missing_keys


def test_adapters_of_a_language_model(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", 0)
    loras = [lora(tmp_path / name, base, seed) for seed, name in enumerate("ab")]
    loaded, served = calls("-m", "linear", *loras, output="merged")
    model = evaluate(loaded, model=transformers.LlamaForCausalLM.from_pretrained(base))
    assert isinstance(model, peft.PeftModel)
    words = shlex.split(served)
    assert words[:4] == ["vllm", "serve", str(base), "--enable-lora"]
    rank = int(words[words.index("--max-lora-rank") + 1])
    assert rank in MAX_RANKS
    assert verify("merged", ["vllm"], max_lora_rank=rank).served
    assert not verify("merged", ["vllm"], max_lora_rank=1).served
    assert words[-2:] == ["--lora-modules", "merged=merged"]


def test_a_bare_adapter_file_is_not_what_peft_opens(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", 0)
    loras = [lora(tmp_path / name, base, seed) for seed, name in enumerate("ab")]
    (said,) = calls("-m", "linear", *loras, output="merged.safetensors")
    assert "no bare adapter file: merge with -o FOLDER" in said
    with pytest.raises(Exception, match=r"merged\.safetensors"):
        peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), "merged.safetensors")


def test_loras_by_the_names_of_diffusers(tmp_path: Path) -> None:
    """ComfyUI does not know these names of a U-Net, and is not named."""
    loras = [trained("sd", tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    (loaded,) = calls("-m", "linear", *loras, output="merged")
    pipeline: Any = build("sd")
    evaluate(loaded, pipeline=pipeline)
    assert pipeline.get_active_adapters()


def test_loras_by_the_names_of_kohya(tmp_path: Path) -> None:
    loras = [factors(tmp_path / f"{seed}.safetensors", kohya_modules("sd", 1.0), seed) for seed in (1, 2)]
    loaded, copied = calls("-m", "linear", *loras, output="merged.safetensors")
    pipeline: Any = build("sd")
    evaluate(loaded, pipeline=pipeline)
    assert pipeline.get_active_adapters()
    verb, file, to, folder = copied.split()
    assert (verb, to, folder) == ("copy", "to", "ComfyUI/models/loras/")
    assert Path(file).is_file()
    assert verify(file, ["comfyui"]).served


@pytest.mark.parametrize(
    ("make", "cls"),
    [
        (diffusion_pipeline, diffusers.StableDiffusionPipeline),
        (sentence_encoder, sentence_transformers.SentenceTransformer),
    ],
)
def test_pipelines(tmp_path: Path, make: Callable[[Path, int], Path], cls: type) -> None:
    models = [make(tmp_path / name, seed) for seed, name in enumerate("ab")]
    (loaded,) = calls("-m", "linear", *models, output="merged")
    assert isinstance(evaluate(loaded), cls)


def test_a_part_of_a_pipeline(tmp_path: Path) -> None:
    models = [diffusion_pipeline(tmp_path / name, seed) / "unet" for seed, name in enumerate("ab")]
    (loaded,) = calls("-m", "linear", *models, output="merged")
    assert isinstance(evaluate(loaded), diffusers.UNet2DConditionModel)


def test_an_export_of_a_store(tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path, 1)
    ok("continual", "init", "store", "--base", base)
    ok("continual", "add", "store", *tuned, "--threads", "1")
    assert "to use it: transformers.LlamaForCausalLM" in ok("continual", "export", "store", "-o", "out").stderr
    assert json.loads(ok("continual", "export", "store", "-o", "out2", "--json").stdout)["usage"]


def test_what_is_not_there_has_no_use(tmp_path: Path) -> None:
    assert describe_usage(tmp_path / "none") == ""


def test_a_disk_that_fails_leaves_a_merge_without_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, 1)

    def glob(path: Path, pattern: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "glob", glob)
    assert describe_usage(tmp_path / "tuned0") == ""


def test_packs_and_what_they_hold(tmp_path: Path) -> None:
    """The command that a pack's line names is run, and prints the line of what it wrote."""
    base, other = (llama(tmp_path / name, seed) for seed, name in enumerate(("base", "other")))
    packed = {"adapter": [lora(tmp_path / "a", base, 0)], "model": [other, "--base", base]}
    opens = {
        "adapter": "peft.PeftModel.from_pretrained(model, 'OUT')",
        "model": "LlamaForCausalLM.from_pretrained('OUT')",
    }
    for kind, words in packed.items():
        done = ok("compress", *words, "-o", f"{kind}.safetensors")
        usage = done.stderr.splitlines()[-1].removeprefix("to use it: ")
        assert (
            json.loads(ok("compress", *words, "-o", f"{kind}.safetensors", "--overwrite", "--json").stdout)["usage"]
            == usage
        )
        as_it_is, command = usage.split(", or ")
        assert as_it_is == "merge it as it is"
        command = (
            command.removesuffix(" for other programs").replace("FOLDER", f"{kind}-folder").replace("BASE", str(base))
        )
        program, *typed = shlex.split(command)
        assert program == "merge"
        assert opens[kind].replace("OUT", f"{kind}-folder") in ok(*typed).stderr
        assert json.loads(ok(*typed, "--overwrite", "--json").stdout)["usage"]
        call = describe_usage(f"{kind}.safetensors").split(", or ")[1].removesuffix(" for other programs")
        names = {"FOLDER": f"{kind}-again", "BASE": base, "merging": merging}
        assert describe_usage(eval(call, names).path)
