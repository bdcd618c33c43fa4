"""Adapters baked into their base, which is found from what they state: ``merge bake`` and ``merging.bake``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merging
from merging.cli.main import cli
from merging.errors import InputError, OptionError, QuantizedError
from merging.plan.find_base import unquantized_name
from support.adapters import LLAMA, State, assert_close, base_state, edit_config, peft, quiet, reload, save_base, train
from support.commands import ok, refused
from support.gguf_files import write_gguf
from support.peft_types import CASES, TYPES, make
from support.tiny import identical, load
from support.tokenized import save_tokenized, tokenizer_of

pytestmark = TYPES


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, and two LoRAs that state it."""
    root = tmp_path_factory.mktemp("llama")
    with quiet():
        save_base(root / "base", "llama")
        train(root / "one", root / "base", 1, LLAMA)
        train(root / "two", root / "base", 2, LLAMA, r=3)
    return root


@pytest.fixture
def folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        edit_config(tmp_path / name, base_model_name_or_path="base")
    return tmp_path


# ---- PEFT's own merge


def baked_both_ways(tmp_path: Path, case: str) -> tuple[State, State]:
    """The model that we bake, and the one of PEFT."""
    base, adapter = save_base(tmp_path / "base", CASES[case][0]), make(tmp_path / "a", case)
    edit_config(adapter, base_model_name_or_path=str(base))
    merging.bake([adapter], output=tmp_path / "out")
    wanted = peft.PeftModel.from_pretrained(reload(base), adapter).merge_and_unload().state_dict()
    got = base_state(tmp_path / "out")
    return {name: got[name] for name in wanted}, wanted


@pytest.mark.parametrize("case", ["AdaLoRA Conv1D", "LoKr conv2d", "trainable tokens", "LayerNorm"])
def test_what_comes_out_is_what_peft_bakes(tmp_path: Path, case: str) -> None:
    assert_close(*baked_both_ways(tmp_path, case))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_every_type_comes_out_as_peft_bakes_it(tmp_path: Path, case: str) -> None:
    assert_close(*baked_both_ways(tmp_path, case))


def test_several_adapters_add_up_as_peft_adds_them(folder: Path) -> None:
    merging.bake(["one", "two"], output="out")
    model = peft.PeftModel.from_pretrained(reload(folder / "base"), "one", adapter_name="one")
    model.load_adapter("two", adapter_name="two")
    wanted = model.merge_and_unload(adapter_names=["one", "two"]).state_dict()
    assert_close(base_state(folder / "out"), wanted)


def test_weights_and_methods(folder: Path) -> None:
    merging.bake(["one", "two"], weights=[1, 0.25], output="weighted")
    merging.merge(
        ["one", "two"], method="task_arithmetic", weights=[1, 0.25], base="base", kind="model", output="merged"
    )
    assert identical(load(folder / "weighted"), load(folder / "merged"))
    ok("bake", "one", "--weights", "0.5", "-o", "half")
    merging.merge(["one"], method="task_arithmetic", weights=0.5, base="base", kind="model", output="half_merged")
    assert identical(load(folder / "half"), load(folder / "half_merged"))
    ok("bake", "one", "two", "-m", "ties", "--density", "0.5", "-o", "ties")
    assert "method: ties" in (folder / "ties" / "README.md").read_text()


# ---- the base


def test_the_base_is_found_and_named(folder: Path) -> None:
    done = ok("bake", "one", "-o", "out")
    assert "the base is base, as one states" in done.output
    assert "the base is base" in ok("bake", "one", "-o", "dry", "--dry-run").output
    assert not (folder / "dry").exists()


def test_it_is_made_again_by_rerun(folder: Path) -> None:
    ok("bake", "one", "two", "-o", "out")
    assert "has the same bytes" in ok("rerun", "out", "-o", "again").output
    printed = ok("bake", "one", "two", "--recipe-only").stdout
    (folder / "recipe.yml").write_text(printed)
    ok("run", "recipe.yml", "-o", "ran")
    assert identical(load(folder / "ran"), load(folder / "out"))


def test_a_base_that_is_not_found(folder: Path) -> None:
    edit_config(folder / "one", base_model_name_or_path="/elsewhere/base")
    assert "states the base /elsewhere/base, which is not found: give it with --base" in refused("bake", "one")
    ok("bake", "one", "--base", "base", "-o", "out")
    edit_config(folder / "one", base_model_name_or_path=None)
    assert "one: states no base: give it with --base" in refused("bake", "one")
    edit_config(folder / "one", base_model_name_or_path="two")
    assert "states the base two, which is an adapter itself" in refused("bake", "one")


def test_what_cannot_be_baked(folder: Path) -> None:
    with pytest.raises(InputError, match="base: is a full model, and baking takes adapters"):
        merging.bake(["base"], output="out")
    with pytest.raises(OptionError, match="baking makes a full model: leave rank= out"):
        merging.bake(["one"], output="out", rank=4)
    with pytest.raises(OptionError, match="name at least one adapter"):
        merging.bake([], output="out")
    with pytest.raises(OptionError, match="should be a path, and is a Recipe"):
        merging.bake([merging.Recipe(models=["one"], method="linear")], output="out")  # type: ignore[list-item]
    assert not (folder / "out").exists()


def test_a_quantised_model_in_place_of_an_adapter(folder: Path) -> None:
    """More options would not make an adapter of it."""
    write_gguf(folder / "full.gguf", folder / "base", "Q8_0")
    quantised(folder / "small-HQQ", folder / "base", "hqq")
    for name in ("full.gguf", "small-HQQ"):
        for options in ([], ["--dequantize"]):
            message = refused("bake", name, "--base", "base", *options)
            assert f"{name}: is a full model, and baking takes adapters" in message


@pytest.mark.parametrize(
    ("stated", "noticed"),
    [
        ({"base_model_name_or_path": "other"}, "(qwen3)"),
        ({"auto_mapping": {"parent_library": "transformers.models.qwen3.modeling_qwen3"}}, "(qwen3)"),
        ({"base_model_name_or_path": "Qwen/Qwen3-0.6B"}, "(qwen)"),
        ({"base_model_name_or_path": "base-copy"}, None),
        ({"base_model_name_or_path": "Qwen3/base"}, None),
        ({"auto_mapping": {"parent_library": "transformers.models.llama.modeling_llama"}}, None),
        ({"base_model_name_or_path": "unsloth/Llama-3.2-1B-bnb-4bit"}, None),
        ({"base_model_name_or_path": "org/DeepSeek-R1-Distill-Qwen-7B"}, None),
    ],
)
def test_a_base_of_another_type_than_stated_is_named(folder: Path, stated: dict[str, Any], noticed: str | None) -> None:
    for name, kind in (("other", "qwen3"), ("base-copy", "llama")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": kind}))
    edit_config(folder / "one", **{"base_model_name_or_path": "/elsewhere/base", "auto_mapping": None, **stated})
    notices = merging.bake(["one"], base="base", output="out").notices
    said = [notice for notice in notices if "states the base" in notice]
    assert len(said) == (noticed is not None)
    assert not said or (noticed in said[0] and "and base (llama) is used" in said[0])


def test_a_base_that_is_not_finite_is_named(folder: Path) -> None:
    """And not the range of the output's type; a factored change is added to it piece by piece."""
    tensors = load(folder / "base")
    tensors["model.layers.1.self_attn.q_proj.weight"][1, 1] = float("inf")
    save_file(tensors, folder / "base" / "model.safetensors")
    said = " ".join(refused("bake", "one", "-o", "out").split())
    assert "base: model.layers.1.self_attn.q_proj.weight holds NaN or infinite values" in said
    said = " ".join(refused("bake", "one", "--as-trained", "nf4", "-o", "out").split())
    assert "base: model.layers.1.self_attn.q_proj.weight holds NaN or infinite values" in said
    assert not (folder / "out").exists()


def test_an_option_in_the_place_of_a_value(folder: Path) -> None:
    done = CliRunner().invoke(cli, ["bake", "one", "--as-trained", "-o", "out"])
    assert done.exit_code == 2
    assert "'--as-trained': needs a value, and -o is an option" in done.output


MIRRORS = {
    "org/Llama-3.2-1B-GGUF": "org/Llama-3.2-1B",
    "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit": "unsloth/Llama-3.2-1B-Instruct",
    "unsloth/mistral-7b-bnb-4bit": "unsloth/mistral-7b",
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3-8B-FP8": "Qwen/Qwen3-8B",
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16": "RedHatAI/Meta-Llama-3.1-8B-Instruct",
    "neuralmagic/Llama-3.3-70B-Instruct-FP8-dynamic": "neuralmagic/Llama-3.3-70B-Instruct",
    "TheBloke/Llama-2-7B-AWQ": "TheBloke/Llama-2-7B",
    "models/phi-2-4bit/": "models/phi-2",
    "mistralai/Mistral-7B-v0.1": "mistralai/Mistral-7B-v0.1",
    "google/gemma-3-4b-it": "google/gemma-3-4b-it",
}


@pytest.mark.parametrize("name", MIRRORS)
def test_names_without_the_marks_of_quantised_copies(name: str) -> None:
    assert unquantized_name(name) == MIRRORS[name]


def quantised(folder: Path, base: Path, method: str = "bitsandbytes", **stated: object) -> Path:
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method, **stated}})
    )
    return folder


@pytest.mark.parametrize("how", ["by name", "by card", "gone"])
def test_a_quantised_base_is_replaced_by_its_twin(folder: Path, how: str) -> None:
    ok("bake", "one", "-o", "wanted")
    mirror = folder / ("base-bnb-4bit" if how != "by card" else "other")
    if how != "gone":
        quantised(mirror, folder / "base", load_in_4bit=True)
    if how == "by card":
        (mirror / "README.md").write_text("---\nbase_model: base\n---\n")
    edit_config(folder / "one", base_model_name_or_path=mirror.name)
    done = ok("bake", "one", "-o", "out")
    assert f"states the quantised base {mirror.name}: its 16-bit twin base is used instead" in " ".join(
        done.output.split()
    )
    assert identical(load(folder / "out"), load(folder / "wanted"))


def test_a_name_alone_does_not_make_a_base_quantised(folder: Path) -> None:
    """A twin is looked for only if the stated base cannot be read as it is."""
    shutil.move(folder / "base", folder / "base-unsloth")
    save_base(folder / "base", "llama", torch.float16)
    edit_config(folder / "one", base_model_name_or_path="base-unsloth")
    assert "the base is base-unsloth, as one states" in ok("bake", "one", "-o", "out").output


def fp8(folder: Path, base: Path) -> tuple[str, torch.Tensor]:
    """A copy of a base with one weight in FP8: its name, and the numbers that it stands for."""
    quantised(folder, base, "fp8")
    tensors, name = load(base), "model.layers.0.mlp.up_proj.weight"
    codes, scale = tensors[name].to(torch.float8_e4m3fn), torch.ones(1, 1)
    save_file({**tensors, name: codes, f"{name}_scale_inv": scale}, folder / "model.safetensors")
    return name, codes.float()


def test_the_quantised_base_itself_on_request(folder: Path) -> None:
    """Though its twin is there."""
    name, values = fp8(folder / "base-FP8", folder / "base")
    ok("bake", "one", "-o", "plain")
    edit_config(folder / "one", base_model_name_or_path="base-FP8")
    assert "the base is base-FP8, as one states" in ok("bake", "one", "--dequantize", "-o", "out").output
    change = load(folder / "plain")[name] - load(folder / "base")[name]
    torch.testing.assert_close(load(folder / "out")[name], values + change)


def test_without_a_twin(folder: Path) -> None:
    """FP8 is read as it is, HQQ is refused with a way out."""
    name, values = fp8(folder / "small-FP8", folder / "base")
    edit_config(folder / "one", base_model_name_or_path="small-FP8")
    assert "no 16-bit twin of it was found: its weights are read as ordinary numbers" in " ".join(
        ok("bake", "one", "-o", "out").output.split()
    )
    ok("bake", "one", "--base", "base", "-o", "plain")
    change = load(folder / "plain")[name] - load(folder / "base")[name]
    torch.testing.assert_close(load(folder / "out")[name], values + change)
    quantised(folder / "small-HQQ", folder / "base", "hqq")
    edit_config(folder / "one", base_model_name_or_path="small-HQQ")
    with pytest.raises(QuantizedError, match=r"no 16-bit twin was found: give the model .* with base="):
        merging.bake(["one"], output="refused")


# ---- the tokenizer, and all that was saved with an adapter

ADDED = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model with a tokenizer, and adapters with more tokens: with trained tables, without, and a chat template."""
    root = tmp_path_factory.mktemp("chat")
    with quiet():
        base = save_tokenized(root / "base", "a")
        tokenizer = tokenizer_of("bytes", "a", ["<|a|>"])
        tokenizer.add_tokens(ADDED, special_tokens=True)
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        for name, saved in (("trained", ["embed_tokens", "lm_head"]), ("factors", None)):
            model = AutoModelForCausalLM.from_pretrained(base)
            torch.manual_seed(3)
            model.resize_token_embeddings(len(tokenizer))
            settings = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": saved, "task_type": "CAUSAL_LM"}
            tuned = peft.get_peft_model(model, peft.LoraConfig(**settings))
            with torch.no_grad():
                for value in tuned.parameters():
                    if value.requires_grad:
                        value.add_(0.1 * torch.randn(value.shape))
            tuned.save_pretrained(root / name, save_embedding_layers=False)
            tokenizer.save_pretrained(root / name)
            edit_config(root / name, base_model_name_or_path=str(base))
        (root / "trained" / "generation_config.json").write_text('{"temperature": 0.25}')
    yield root


def test_trained_tables_and_their_tokenizer_go_along(chat: Path, tmp_path: Path) -> None:
    """The vocabulary is as large as in PEFT's own loading, which resizes the base to the adapter's tokenizer."""
    done = merging.bake([chat / "trained"], output=tmp_path / "out")
    wanted = AutoPeftModelForCausalLM.from_pretrained(chat / "trained").merge_and_unload().state_dict()
    assert_close(base_state(tmp_path / "out"), wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(ADDED) == AutoTokenizer.from_pretrained(
        chat / "trained"
    ).convert_tokens_to_ids(ADDED)
    assert tokenizer.chat_template.startswith("{% for message")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.25}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(tokenizer)
    assert any("2 rows more than the base's" in notice for notice in done.notices)
    again = merging.rerun(tmp_path / "out", output=tmp_path / "again")
    assert any("has the same bytes" in notice for notice in again.notices)


def test_rows_that_nobody_trained_are_the_mean(chat: Path, tmp_path: Path) -> None:
    """transformers draws them around the mean of the base's rows, with a covariance next to none."""
    merging.bake([chat / "factors"], output=tmp_path / "out")
    wanted = AutoPeftModelForCausalLM.from_pretrained(chat / "factors").merge_and_unload().state_dict()
    got = base_state(tmp_path / "out")
    assert_close(got, wanted, 1e-3)
    before = load_file(chat / "base" / "model.safetensors")["lm_head.weight"]
    for row in got["lm_head.weight"][len(before) :]:
        torch.testing.assert_close(row, before.mean(0))


def test_files_that_stay_behind_are_named(chat: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(chat / "trained", tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    done = merging.bake([chat / "factors", chat / "trained", other], output=tmp_path / "out")
    text = "\n".join(done.notices)
    assert f"{other}: its tokenizer stays behind" in text
    assert f"{chat / 'trained'}: its tokenizer" not in text
    assert f"{chat / 'trained'}: its generation_config.json stays behind" in text


def test_a_template_without_a_tokenizer_goes_along(folder: Path) -> None:
    (folder / "one" / "chat_template.jinja").write_text("{{ messages }}")
    done = merging.bake(["one"], output="out")
    assert (folder / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "the chat template comes from one/chat_template.jinja" in done.notices


def test_the_base_tokenizer_on_request(chat: Path, tmp_path: Path) -> None:
    merging.bake([chat / "factors"], tokenizer="base", output=tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(AutoTokenizer.from_pretrained(chat / "base"))


def test_tokens_in_rows_of_other_tokens_are_named(chat: Path, tmp_path: Path) -> None:
    """A token of the base that was renamed, as reserved tokens are."""
    adapter = Path(shutil.copytree(chat / "factors", tmp_path / "adapter"))
    text = (adapter / "tokenizer.json").read_text()
    (adapter / "tokenizer.json").write_text(text.replace("<|a|>", "<|chat|>"))
    done = merging.bake([adapter], output=tmp_path / "out")
    assert any(
        "another token than the base's in 1 row, such as '<|chat|>' for '<|a|>'" in notice for notice in done.notices
    )
