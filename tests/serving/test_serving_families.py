"""LoRA files of every family under names of every layout: what is said of them is what real programs load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from merging.serving import Finding, verify
from support.diffusion_models import trained
from support.serving_families import LOADED, UNTOLD, loaded_by_diffusers, modules_in, write_layout

CASES = [pytest.param(family, layout, id=f"{family}: {layout}") for family, layout in LOADED]


def left_out(findings: tuple[Finding, ...], program: str, severity: str) -> set[str]:
    """The modules that a program is said to leave out, of this model or of some that have such modules."""
    found = [each for each in findings if each.program == program and each.what.startswith("modules under names that")]
    return {where.partition(": ")[0] for each in found if each.severity == severity for where in each.where}


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_what_is_said_is_what_is_loaded(family: str, layout: str, tmp_path: Path) -> None:
    path = write_layout(tmp_path / "lora.safetensors", family, layout)
    modules = modules_in(path)
    findings = verify(str(path), ["diffusers", "comfyui"]).findings
    for program, loaded in zip(("diffusers", "comfyui"), LOADED[family, layout], strict=True):
        ignored, doubtful = (left_out(findings, program, severity) for severity in ("ignores", "warns"))
        assert ignored | doubtful <= modules
        if loaded == "all":
            assert not ignored
        elif loaded == "none":
            assert ignored | doubtful == modules
        else:
            assert ignored < modules
            assert ignored | doubtful


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_diffusers_loads_what_the_table_says(family: str, layout: str, tmp_path: Path) -> None:
    path = write_layout(tmp_path / "lora.safetensors", family, layout)
    told = "none" if (family, layout) in UNTOLD else LOADED[family, layout][0]
    assert loaded_by_diffusers(path, family) == told


# ---- ComfyUI


def test_attention_of_a_unet_under_diffusers_names(tmp_path: Path) -> None:
    """ComfyUI has ``unet.X.processor.to_q`` in its map, and no ``unet.X.to_q``; feed-forward layers it has."""
    lora = trained("sd", tmp_path, lora_alpha=4)
    findings = [each for each in verify(str(lora), ["comfyui"]).findings if each.program == "comfyui"]
    (lost,) = [each for each in findings if "attention of a U-Net" in each.what]
    modules = {name.partition(".lora_")[0] for name in load_file(lora) if name.startswith("unet.")}
    assert set(lost.where) == {name for name in modules if ".to_" in name}
    assert set(lost.where) < modules
    assert (lost.severity, 'format="kohya"' in lost.todo) == ("ignores", True)


def test_comfyui_knows_no_alphas_of_a_header(tmp_path: Path) -> None:
    state = load_file(write_layout(tmp_path / "wan", "wan", "ComfyUI"))
    for alpha, said in ((2, False), (8, True)):
        config = {f"transformer.{key}": value for key, value in {"r": 2, "lora_alpha": alpha}.items()}
        save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(config)})
        findings = verify(str(tmp_path / "lora.safetensors"), ["comfyui"]).findings
        assert any("alphas in a config" in each.what for each in findings) == said
