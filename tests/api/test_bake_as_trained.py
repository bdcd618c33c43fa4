"""Adapters baked into their base as it was quantised for their training: ``as_trained``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.errors import InputError, OptionError
from merging.plan.as_trained import AsTrained
from merging.sources.quantized.rounded_weights import FourBitRounded, FourBitScheme, Int8Rounded, TurnedRounded
from merging.sources.stored import MappedTensor, Stored
from support.adapters import QUIRKS, State, assert_close, base_state, edit_config, peft, quiet, reload, save_base, train
from support.commands import ok
from support.tiny import identical, load

pytestmark = QUIRKS

NESTED = FourBitScheme(format="nf4", double=True, dtype_name="F32")


def linear(name: str) -> bool:
    return name.endswith("proj.weight")


def rounded_copy(folder: Path, base: Path, scheme: FourBitScheme | None = NESTED) -> Path:
    """A base with its linear weights rounded; to int8 without a scheme."""
    shutil.copytree(base, folder)
    tensors = load(base)

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        stored: Stored = MappedTensor(weight, ("", 0))
        return (FourBitRounded(stored, scheme) if scheme else Int8Rounded(stored)).read()

    save_file({k: rounded(v) if linear(k) else v for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, a LoRA that states it, and one whose head is trained in full."""
    root = tmp_path_factory.mktemp("llama")
    with quiet():
        save_base(root / "base", "llama")
        train(root / "one", root / "base", 1, ["q_proj", "up_proj"])
        train(root / "saved", root / "base", 2, ["q_proj"], modules_to_save=["down_proj"])
    return root


@pytest.fixture
def folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("one", "saved"):
        edit_config(tmp_path / name, base_model_name_or_path="base")
    return tmp_path


def merged_by_peft(base: Path, adapter: str) -> State:
    return peft.PeftModel.from_pretrained(reload(base), adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_the_change_is_added_to_the_base_as_it_was(folder: Path, format: str) -> None:
    """As PEFT adds it, and what no adapter changes is rounded all the same."""
    schemes = {"nf4": NESTED, "fp4": FourBitScheme(format="fp4", double=False, dtype_name="F32"), "int8": None}
    base = rounded_copy(folder / "rounded", folder / "base", schemes[format])
    done = ok("bake", "one", "--as-trained", format, "-o", "out")
    assert f"14 linear weights of base are rounded to {format}" in " ".join(done.output.split())
    assert_close(base_state(folder / "out"), merged_by_peft(base, "one"))
    out, plain = load(folder / "out"), load(folder / "base")
    assert torch.equal(out["model.layers.0.mlp.down_proj.weight"], load(base)["model.layers.0.mlp.down_proj.weight"])
    assert all(torch.equal(out[name], plain[name]) for name in plain if not linear(name))


def test_modules_that_are_saved_in_full_stay_as_they_are_saved(folder: Path) -> None:
    base = rounded_copy(folder / "rounded", folder / "base")
    merging.bake(["saved"], output="out", as_trained="nf4")
    assert_close(base_state(folder / "out"), merged_by_peft(base, "saved"))


def test_layers_stored_as_inputs_by_outputs(tmp_path: Path) -> None:
    """Those of GPT-2, which bitsandbytes quantises transposed."""
    base = save_base(tmp_path / "base", "gpt2")
    with quiet():
        train(tmp_path / "a", base, 1, ["c_attn"], fan_in_fan_out=True)
    merging.bake([tmp_path / "a"], base=base, output=tmp_path / "out", as_trained="nf4")
    name = "transformer.h.0.mlp.c_fc.weight"
    stored = MappedTensor(load(base)[name], ("", 0))
    wanted = TurnedRounded(stored, lambda each: FourBitRounded(each, NESTED)).read()
    assert torch.equal(load(tmp_path / "out")[name], wanted)
    direct = FourBitRounded(MappedTensor(load(base)[name].mT.contiguous(), ("", 0)), NESTED).read()
    assert torch.equal(wanted, direct.mT)


def test_settings(folder: Path) -> None:
    """In braces on the command line, as a mapping in Python and in a recipe, from which it is made again."""
    stated = {"format": "nf4", "double_quant": False, "block_size": 128, "dtype": "float16", "skip": ["layers.0"]}
    ok("bake", "one", "--as-trained", json.dumps(stated), "-o", "out")
    merging.bake(["one"], output="same", as_trained=stated)
    assert identical(load(folder / "out"), load(folder / "same"))
    assert "has the same bytes" in ok("rerun", "out", "-o", "again").output
    (folder / "recipe.yml").write_text(ok("bake", "one", "--as-trained", json.dumps(stated), "--recipe-only").stdout)
    ok("run", "recipe.yml", "-o", "ran")
    assert identical(load(folder / "out"), load(folder / "ran"))
    scheme = FourBitScheme(format="nf4", double=False, block=128, dtype_name="F16")
    name, base = "model.layers.1.mlp.down_proj.weight", load(folder / "base")
    wanted = FourBitRounded(MappedTensor(base[name], ("", 0)), scheme).read().float()
    assert torch.equal(load(folder / "out")[name], wanted)
    skipped = name.replace("layers.1", "layers.0")
    assert torch.equal(load(folder / "out")[skipped], base[skipped])


def test_the_type_of_the_output_stays_the_base_s(folder: Path) -> None:
    merging.bake(["one"], output="out", as_trained={"format": "nf4", "dtype": "float16"})
    assert {value.dtype for value in load(folder / "out").values()} == {torch.float32}


WRONG: dict[str, Any] = {
    "as_trained.format = 'nf5': should be 'nf4', 'fp4' or 'int8'": "nf5",
    "as_trained.format is missing": {"block_size": 64},
    "as_trained.block_size = 48": {"format": "nf4", "block_size": 48},
    "int8 has no double_quant: it has one scale a row": {"format": "int8", "double_quant": True},
    "as_trained = 3: should be nf4, fp4, int8 or a mapping": 3,
    "as_trained.blocks = 3: is not known here": {"format": "nf4", "blocks": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings(folder: Path, message: str) -> None:
    with pytest.raises(OptionError) as refusal:
        merging.bake(["one"], output="out", as_trained=WRONG[message])
    assert message in str(refusal.value)
    assert not (folder / "out").exists()


def test_it_is_of_adapters_in_a_full_model(folder: Path) -> None:
    with pytest.raises(OptionError, match="as_trained= is of a full model, and this merge makes an adapter"):
        merging.merge(["one"], method="linear", output="out", as_trained="nf4")
    with pytest.raises(InputError, match="base: is a full model, and as_trained= is of adapters"):
        merging.merge(["base"], method="task_arithmetic", base="base", output="out", as_trained="nf4")


# ---- the settings of the copy that the adapters state


def mirror(folder: Path, **stated: object) -> None:
    """A quantised copy of the base, by its config, which the adapter states."""
    shutil.copytree(folder / "base", folder / "base-bnb-4bit")
    config = json.loads((folder / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", **stated}
    (folder / "base-bnb-4bit" / "config.json").write_text(json.dumps(config))
    edit_config(folder / "one", base_model_name_or_path="base-bnb-4bit")


@pytest.mark.parametrize(
    ("stated", "format"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True}, "fp4"),
        ({"load_in_8bit": True}, "int8"),
        (None, "nf4"),
    ],
)
def test_a_notice_names_it_where_the_base_was_quantised(
    folder: Path, stated: dict[str, object] | None, format: str
) -> None:
    if stated is None:
        edit_config(folder / "one", base_model_name_or_path="base-bnb-4bit")
    else:
        mirror(folder, **stated)
    said = f"--as-trained {format} adds the change to base as it was quantised for the training"
    assert said in " ".join(ok("bake", "one", "-o", "out").output.split())
    assert said not in " ".join(ok("bake", "one", "--as-trained", "nf4", "-o", "out4").output.split())


def test_settings_of_the_copy_are_taken(folder: Path) -> None:
    """Unless others are stated; layers that the base does not have are left out."""
    skipped = ["lm_head", "model.layers.0.self_attn", "vision_tower"]
    mirror(
        folder,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        llm_int8_skip_modules=skipped,
    )
    printed = ok("bake", "one", "--as-trained", "nf4", "--recipe-only").stdout
    recipe = merging.load_recipe(printed)
    assert recipe.as_trained == AsTrained(format="nf4", double_quant=False, skip=tuple(skipped[:2]))
    stated = ok("bake", "one", "--as-trained", "{format: nf4, double_quant: true, skip: []}", "--recipe-only").stdout
    assert merging.load_recipe(stated).as_trained == AsTrained(format="nf4", double_quant=True)
    assert merging.load_recipe(ok("bake", "one", "--as-trained", "nf4", "--base", "base", "--recipe-only").stdout)


def test_settings_in_an_adapter_s_card_are_taken(folder: Path) -> None:
    """As PEFT writes them, of a base without a quantised copy."""
    stated = {"quant_method": "QuantizationMethod.BITS_AND_BYTES", "load_in_8bit": False, "load_in_4bit": True}
    stated |= {"llm_int8_skip_modules": ["lm_head"], "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
    lines = "\n".join(f"- {name}: {value}" for name, value in stated.items())
    head = "## Training procedure\n\nThe following `bitsandbytes` quantization config was used during training:\n"
    (folder / "one" / "README.md").write_text(f"{head}{lines}\n\n### Framework versions\n\n- PEFT 0.6.0\n")
    for words in ((), ("--base", "base")):
        done = ok("bake", "one", *words, "-o", "out", "--overwrite")
        assert "--as-trained nf4 adds the change to base" in " ".join(done.output.split())
    recipe = merging.load_recipe(ok("bake", "one", "--as-trained", "nf4", "--recipe-only").stdout)
    assert recipe.as_trained == AsTrained(format="nf4", double_quant=False, skip=("lm_head",))
