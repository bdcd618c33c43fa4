"""Weights by block and element: laws over methods, interpolation of two checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.methods import chain
from support.commands import ok, refused
from support.tiny import identical

NAMES = {
    "BASE": "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
    "IN00": "model.diffusion_model.input_blocks.0.0.weight",
    "IN01": "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
    "IN04": "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.ff.net.2.weight",
    "IN11": "model.diffusion_model.input_blocks.11.0.in_layers.2.weight",
    "M00": "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    "OUT03": "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn1.to_v.weight",
    "OUT11": "model.diffusion_model.out.2.weight",
    "VAE": "first_stage_model.decoder.conv_in.weight",
}
FILES = "ABC"
Tensors = dict[str, Tensor]

EACH = """
linear task_arithmetic ties dare+ties della breadcrumbs pcb magmax sce consensus ram tsv iso_c iso_cts wudi svd
knots+ties core+ties decouple+linear varm slerp nuslerp multislerp karcher model_stock nearswap arcee_fusion passthrough
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensors]:
    """Three checkpoints with the names of Stable Diffusion 1.5, also as files in the working folder."""
    monkeypatch.chdir(tmp_path)
    drawn = torch.Generator().manual_seed(0)
    states = {file: {name: torch.randn(6, 6, generator=drawn) for name in NAMES.values()} for file in FILES}
    for file, state in states.items():
        save_file(state, f"{file}.safetensors")
    return states


def merged(files: str, method: str, output: str = "out.safetensors", **options: Any) -> Tensors:
    paths = [f"{file}.safetensors" for file in files]
    merging.merge(paths, method=method, output=output, overwrite=True, **options)
    return load_file(output)


def shares(merge: Tensors, models: dict[str, Tensors]) -> dict[str, float]:
    """Return how far each block went from the first model to the second."""
    first, second = models["A"], models["B"]
    found = {}
    for block, name in NAMES.items():
        way = (merge[name] - first[name]) / (second[name] - first[name])
        assert way.max() - way.min() < 1e-3
        found[block] = round(float(way.mean()), 4)
    return found


@pytest.mark.parametrize("method", EACH.split())
def test_weights_of_1_and_of_0(models: dict[str, Tensors], method: str) -> None:
    """With weights of 1 the bytes are the plain merge's; with weights of 0 the base's; else by block either."""
    files, base = ("B", "A.safetensors") if chain(method).models[1] == 1 else ("BC", "A.safetensors")
    plain = merged(files, method, base=base)
    assert identical(merged(files, method, base=base, blocks="ALL"), plain)
    assert identical(merged(files, method, base=base, blocks=[1.0] * 26), plain)
    assert identical(merged(files, method, base=base, blocks="NONE"), models["A"])
    half = merged(files, method, base=base, blocks="ALL,IN00-OUT11:0")
    assert all(
        torch.equal(half[name], models["A"][name]) == (block not in ("BASE", "VAE")) for block, name in NAMES.items()
    )


def test_each_change_is_multiplied(models: dict[str, Tensors]) -> None:
    """Any method merges the changes times their weights, one list for each model."""
    base = models["A"]
    lists = ["IN01:0.5,M00:2", {"OUT": 0.25, "IN01": 3}]
    by_hand = []
    for file, weights in zip("BC", [{"IN01": 0.5, "M00": 2}, {"OUT03": 0.25, "OUT11": 0.25, "IN01": 3}], strict=True):
        by_block = {NAMES[block]: value for block, value in weights.items()}
        by_hand.append({n: base[n] + (v - base[n]) * by_block.get(n, 1) for n, v in models[file].items()})
    for method in ("ties", "task_arithmetic", "tsv", "linear", "slerp"):
        wanted = merging.merge_state_dicts(by_hand, base=base, method=method)
        for got in (
            merging.merge_state_dicts([models["B"], models["C"]], base=base, method=method, blocks=lists),
            merged("BC", method, base="A.safetensors", blocks=lists),
        ):
            for name in base:
                torch.testing.assert_close(got[name], wanted[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["linear", "nuslerp", "slerp"])
def test_two_checkpoints_without_a_base(models: dict[str, Tensors], method: str) -> None:
    """As in MBW: 0 is the first model, 1 the second."""
    numbers = [number / 25 for number in range(26)]
    got = merged("AB", method, blocks=numbers)
    if method == "linear":
        order = ["BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]
        wanted = {block: round(numbers[order.index(block.replace("VAE", "BASE"))], 4) for block in NAMES}
        assert shares(got, models) == wanted
    assert identical(got, merging.merge_state_dicts([models["A"], models["B"]], method=method, blocks=numbers))
    for name in NAMES.values():
        torch.testing.assert_close(merged("AB", method, blocks="NONE")[name], models["A"][name])
        torch.testing.assert_close(merged("AB", method, blocks="ALL")[name], models["B"][name])
    again = ok("rerun", "out.safetensors", "-o", "again.safetensors")
    assert "again.safetensors" in again.output
    assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes()


def test_the_wrapper_without_weights_changes_nothing(models: dict[str, Tensors]) -> None:
    assert identical(merged("AB", "blocks+linear"), merged("AB", "linear"))


def test_elements_take_the_place_of_blocks(models: dict[str, Tensors]) -> None:
    got = shares(merged("AB", "linear", blocks="OUTALL,M00:0.5", elements="attn:0.25,M00:attn2 attn1:0.75"), models)
    assert got["IN01"] == got["OUT03"] == 0.25
    assert got["M00"] == 0.75
    assert got["OUT11"] == got["BASE"] == got["VAE"] == 1
    assert got["IN04"] == got["IN00"] == 0
    got = shares(
        merged("AB", "linear", blocks="NONE", elements="NOT M00 BASE:NOT mlp conv:1,NOT IN01 M00::0.5"), models
    )
    assert got == {"BASE": 0.5, "IN00": 0.5, "IN01": 1, "IN04": 0.5, "IN11": 0.5, "M00": 0, "OUT03": 0.5, "OUT11": 0.5,
                   "VAE": 0.5}  # fmt: skip


def test_recipes_hold_them(models: dict[str, Tensors]) -> None:
    """As parameters, or from the command line; the recipe that is written reads back, and gives the same bytes."""
    ok("-m", "ties", "--base", "A.safetensors", "B.safetensors", "C.safetensors", "--blocks", "IN01:0.5",
       "--blocks", "0.25,M00:2", "--elements", "conv:0", "-o", "typed.safetensors")  # fmt: skip
    text = """
        models: [B.safetensors, C.safetensors]
        base: A.safetensors
        method: ties
        parameters:
          blocks: ["IN01:0.5", {"*": 0.25, M00: 2}]
          elements: {conv: 0}
    """
    recipe = merging.load_recipe(text)
    assert recipe.method.chain == "blocks+ties"
    assert merging.load_recipe(recipe.to_yaml()) == recipe
    recipe.run("run.safetensors")
    assert identical(load_file("typed.safetensors"), load_file("run.safetensors"))


def test_they_apply_to_any_parameter_by_place(models: dict[str, Tensors]) -> None:
    """The values by block that an interpolation has are values of any parameter, next to gradients and patterns."""
    got = merged("AB", "linear", weights=[{"by_block": "IN01:0.75", "complement": True}, {"by_block": "IN01:0.75"}])
    assert shares(got, models) == dict.fromkeys(NAMES, 1.0) | {"IN01": 0.75}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": [1, 2, 3]}, "3 numbers by block do not fit this model: Stable Diffusion 1 and 2 takes 17 numbers "),
        ({"blocks": "IN12:0.5"}, "'IN12' names no block (did you mean 'IN"),
        ({"blocks": "IN04-IN12:0.5"}, "'IN12' names no block"),
        ({"blocks": "IMALL"}, "'IMALL' is neither a number nor a preset (did you mean 'INALL'?)"),
        ({"blocks": "IN01:half"}, "'IN01:half': 'half' is no number"),
        ({"blocks": "INALL,OUTALL"}, "'INALL' is a preset, which stands for all numbers: only names follow it"),
        ({"blocks": []}, "holds no value"),
        ({"elements": {}}, "holds no value"),
        ({"blocks": "IN01-LAST:0.5"}, "'LAST' names no block"),
        ({"blocks": "1,R,0"}, "'R' stands for a number chosen elsewhere"),
        ({"blocks": "IN01:nan"}, "'nan' is no number"),
        ({"blocks": "a:b:c:1"}, "write a name and its value, as IN08:0.5, or BLOCK:ELEMENT:VALUE"),
        ({"blocks": "NOT:1"}, "NOT is followed by"),
        ({"elements": "atn:0.5"}, "'atn' names no element (did you mean 'attn'?)"),
        ({"blocks": ["ALL", "ALL", "ALL"]}, "3 values for 2 models"),
        ({"blocks": ["ALL", "NONE"], "elements": ["q:1", "q:1", "q:1"]}, "2 values and 3 values"),
        ({"blocks": True}, "write numbers, a preset, or names with values"),
    ],
)
def test_refused(models: dict[str, Tensors], options: dict[str, Any], words: str) -> None:
    with pytest.raises(merging.OptionError) as error:
        merged("BC", "task_arithmetic", base="A.safetensors", **options)
    assert words in str(error.value)
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    ("files", "method", "options", "words"),
    [
        ("ABC", "linear", {"blocks": "ALL"}, "in linear, slerp or nuslerp of two models: use one of these, or give"),
        ("AB", "karcher", {"blocks": "ALL"}, "in linear, slerp or nuslerp of two models"),
        ("AB", "linear", {"blocks": ["ALL", "NONE"]}, "give them once"),
        ("AB", "linear", {"blocks": "ALL", "weights": [1, 2]}, "take the place of linear's own"),
        ("AB", "slerp", {"blocks": "ALL", "t": 0.5}, "take the place of slerp's own"),
    ],
)
def test_refused_without_a_base(
    models: dict[str, Tensors], files: str, method: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(merging.OptionError) as error:
        merged(files, method, **options)
    assert words in str(error.value)


def test_blocks_that_are_not_there_are_named(models: dict[str, Tensors]) -> None:
    """A block of the architecture that no tensor is in."""
    done = merging.merge(
        ["B.safetensors"],
        method="linear",
        base="A.safetensors",
        blocks="IN05:0.5",
        elements="bias:0",
        output="o.safetensors",
    )
    assert any("no tensor is in block 'IN05'" in notice for notice in done.notices)
    assert any("no tensor has the element 'bias'" in notice for notice in done.notices)


def test_fused_projections_take_one_value(tmp_path: Path) -> None:
    state = {
        "double_blocks.0.img_attn.qkv.weight": torch.ones(6, 2),
        "single_blocks.0.linear1.weight": torch.ones(6, 2),
    }
    zero = {name: torch.zeros(6, 2) for name in state}
    same = merging.merge_state_dicts(
        [state], base=zero, method="linear", elements="q:0.5,k:0.5,v:0.5,S00:attn mlp:0.25"
    )
    assert [float(value.max()) for value in same.values()] == [0.5, 0.25]
    with pytest.raises(merging.OptionError, match="holds attn, k, q, v in one tensor, and these have different values"):
        merging.merge_state_dicts([state], base=zero, method="linear", elements="q:0.5")


def test_layers_of_language_models() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]
    ones, zero = ({name: torch.full((2, 2), value) for name in names} for value in (1.0, 0.0))
    got = merging.merge_state_dicts([ones], base=zero, method="linear", blocks="layers.0-1:0.5,layers.3:0")
    assert [float(value.max()) for value in got.values()] == [0.5, 0.5, 1, 0]
    with pytest.raises(merging.OptionError, match=r"names no block.*the blocks are model.layers.0-3"):
        merging.merge_state_dicts([ones], base=zero, method="linear", blocks="layers.4-9:0.5")
    with pytest.raises(merging.OptionError, match=r"'IN-LAST' names no block"):
        merging.merge_state_dicts([ones], base=zero, method="linear", blocks="IN-LAST:0.5")
    with pytest.raises(merging.OptionError, match=r"SDXL \(12, 20, 21 or 26\).*name blocks, as in layers.0-15:0.5"):
        merging.merge_state_dicts([ones], base=zero, method="linear", blocks=[0.5] * 4)


def test_no_option_of_another_command(models: dict[str, Tensors]) -> None:
    assert "blocks" in refused(
        "-m", "linear", "A.safetensors", "B.safetensors", "--blocks", "IN99:1", "-o", "o.safetensors"
    )
