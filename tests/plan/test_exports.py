"""Merged LoRAs in the formats of PEFT, diffusers and Kohya: each program makes of them the sum of what was merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import merging
from merging.api.inspect import inspect
from merging.cli.main import cli
from merging.errors import InputError, MergingError
from support.adapters import QUIRKS
from support.diffusion_models import (
    TEXT,
    factors,
    trained,
)
from support.exported import WEIGHTS, Made, merge, metadata, modules

pytestmark = [*QUIRKS, pytest.mark.exhaustive]


def test_the_default_is_the_inputs_format(made: Made, tmp_path: Path) -> None:
    for kinds, format in (("dd", "diffusers"), ("kk", "kohya"), ("dk", "diffusers")):
        plan = merging.preview(made.pair("sd", kinds), method="linear", base=made.base("sd"))
        assert plan.format == format


@pytest.mark.parametrize(
    ("format", "name", "dialect"),
    [
        ("diffusers", "pytorch_lora_weights.safetensors", "diffusers"),
        ("kohya", "out.safetensors", "Kohya"),
    ],
)
def test_folder_and_file(made: Made, tmp_path: Path, format: str, name: str, dialect: str) -> None:
    """One adapter is converted; a folder holds the file that its program looks for, and a card."""
    given = [made.lora("sdxl", "diffusers", 0)]
    options: dict[str, Any] = {"format": format, "base": made.base("sdxl"), "method": "linear", "weights": 1.0}
    inside, alone = merge(given, tmp_path / "out", **options), merge(given, tmp_path / "out.safetensors", **options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name, "README.md"}
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()
    assert all(torch.equal(value, load_file(alone)[key]) for key, value in load_file(inside).items())
    for path in (tmp_path / "out", alone):
        facts = inspect(path)
        assert (facts["kind"], facts["rank"], facts["scales"]) == (f"adapter ({dialect})", 2, [1.0])
        assert facts["targets"] == len(modules(given[0]))


def test_headers(made: Made, tmp_path: Path) -> None:
    """One rank that is the alpha, and the kind of model; nothing that is private."""
    for model, kind in (("sdxl", {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}), ("sd", {})):
        file = merge(made.pair(model, "dd"), tmp_path / f"{model}.safetensors", base=made.base(model), format="kohya")
        said = {key: value for key, value in metadata(file).items() if key.startswith("ss")}
        wanted = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "4"}
        assert said == wanted | kind
        state = load_file(file)
        assert {float(value) for name, value in state.items() if name.endswith(".alpha")} == {4.0}
        assert {value.shape[0] for name, value in state.items() if name.endswith("lora_down.weight")} == {4}
        assert len(state) == 3 * len(modules(file))
    file = merge(made.pair("sd", "dd"), tmp_path / "d.safetensors")
    configs = json.loads(metadata(file)["lora_adapter_metadata"])
    assert {configs[f"{part}.{key}"] for part in ("unet", "text_encoder") for key in ("r", "lora_alpha")} == {4}
    assert not any(name.endswith(".alpha") for name in load_file(file))


@pytest.mark.parametrize(
    ("width", "kind"),
    [(768, {"ss_base_model_version": "sd_v1", "ss_v2": "False"}), (1024, {"ss_v2": "True"}), (500, {})],
)
def test_kind_of_stable_diffusion(tmp_path: Path, width: int, kind: dict[str, str]) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(1, width), f"{name}.lora_B.weight": torch.ones(8, 1)},
        tmp_path / "a.safetensors",
    )
    file = merge([tmp_path / "a.safetensors"], tmp_path / "out.safetensors", format="kohya")
    said = metadata(file)
    assert {key: said[key] for key in ("ss_base_model_version", "ss_v2") if key in said} == kind


def test_what_kohya_files_say_is_kept_but_for_what_is_private(made: Made, tmp_path: Path) -> None:
    stated = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_tag_frequency": "private", "ss_datasets": "x"}
    save_file(load_file(made.lora("sd", "kohya", 0)), tmp_path / "a.safetensors", stated)
    file = merge([tmp_path / "a.safetensors", made.lora("sd", "kohya", 1)], tmp_path / "out.safetensors")
    said = metadata(file)
    assert {key: said.get(key) for key in stated} == {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_tag_frequency": None,
        "ss_datasets": None,
    }


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_are_kept(made: Made, tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    lora = trained("sd", tmp_path / "a", dtype=dtype)
    file = merge([lora], tmp_path / "out", base=made.base("sd"), format=format)
    assert {value.dtype for name, value in load_file(file).items() if not name.endswith(".alpha")} == {dtype}


NAME = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_half_precision(tmp_path: Path, format: str) -> None:
    """A scale that takes one factor out of range is split between the two; what leaves it even so is refused."""
    for name, size, alpha in (("fits", 100.0, 4000.0), ("large", 60000.0, 400000.0)):
        pair = {
            f"{NAME}.lora_A.weight": torch.full((1, 8), 1e-3).half(),
            f"{NAME}.lora_B.weight": torch.full((8, 1), size).half(),
        }
        save_file({**pair, f"{NAME}.alpha": torch.tensor(alpha)}, tmp_path / f"{name}.safetensors")
    out = tmp_path / "out.safetensors"
    file = merge([tmp_path / "fits.safetensors"], out, format=format, weights=1.0)
    down, up = (value for name, value in sorted(load_file(file).items()) if name.endswith("weight"))
    torch.testing.assert_close(up.float() @ down.float(), torch.full((8, 8), 400.0), rtol=2e-3, atol=0)
    with pytest.raises(InputError, match=r"beyond the range of F16: set a wider dtype="):
        merge([tmp_path / "large.safetensors"], tmp_path / "other.safetensors", format=format, weights=1e6)
    assert not (tmp_path / "other.safetensors").exists()


def norms(folder: Path) -> Path:
    """A file of LyCORIS's with factors, and the changes of a bias and of a norm."""
    state = load_file(factors(folder / "plain.safetensors", {f"lora_te_{TEXT}_mlp_fc1": ((12, 8), 2)}))
    state[f"lora_te_{TEXT}_mlp_fc1.diff_b"] = torch.randn(12)
    state[f"lora_te_{TEXT}_layer_norm1.w_norm"] = torch.randn(8)
    state[f"lora_te_{TEXT}_layer_norm1.b_norm"] = torch.randn(8)
    save_file(state, folder / "norms.safetensors")
    return folder / "norms.safetensors"


@pytest.mark.parametrize("based", [True, False])
def test_kohya_files_hold_biases_and_norms(made: Made, tmp_path: Path, based: bool) -> None:
    given = norms(tmp_path)
    file = merge([given], tmp_path / "out.safetensors", base=made.base("sd") if based else None, weights=0.5)
    got, were = load_file(file), load_file(given)
    assert got.keys() == were.keys()
    assert metadata(file)["ss_network_module"] == "lycoris.kohya"
    for name in ("mlp_fc1.diff_b", "layer_norm1.w_norm", "layer_norm1.b_norm"):
        torch.testing.assert_close(got[f"lora_te_{TEXT}_{name}"], 0.5 * were[f"lora_te_{TEXT}_{name}"])


def dotted(name: str) -> Callable[[Path], Path]:
    """A maker of a LoRA file of one module."""

    def make(folder: Path) -> Path:
        save_file(
            {f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.ones(8, 1)},
            folder / "x.safetensors",
        )
        return folder / "x.safetensors"

    return make


def flat_loha(folder: Path) -> Path:
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    save_file(
        {
            f"{name}.hada_w{n}_{side}": torch.randn(*shape)
            for n in (1, 2)
            for side, shape in (("a", (8, 2)), ("b", (2, 72)))
        },
        folder / "x.safetensors",
    )
    return folder / "x.safetensors"


def fused_bias(folder: Path) -> Path:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = load_file(factors(folder / "plain.safetensors", {name: ((48, 16), 1)}))
    save_file({**state, f"{name}.diff_b": torch.ones(48)}, folder / "x.safetensors")
    return folder / "x.safetensors"


LLAMA = "base_model.model.model.layers.0.self_attn.q_proj"


REFUSED: dict[str, tuple[Callable[[Path], Path], str, str | None, dict[str, Any], str]] = {
    "language model": (dotted(LLAMA), "kohya", None, {}, r"q_proj.weight: what it is called .* format of kohya is not"),
    "language model in diffusers": (dotted(LLAMA), "diffusers", None, {}, r"format of diffusers is not known without"),
    "norms in diffusers": (norms, "diffusers", None, {}, r"is changed in full, which LoRA files .* diffusers do not"),
    "flat names in PEFT": (norms, "peft", None, {}, r"format of peft is not known without the model itself"),
    "biases in diffusers": (norms, "diffusers", "sd", {}, r"is changed in full, which LoRA files .* diffusers do not"),
    "a fused bias": (fused_bias, "kohya", "flux", {}, r"is changed in full, which LoRA files .* of kohya do not hold"),
    "several components in PEFT": (
        lambda folder: trained("sd", folder / "a"), "peft", "sd", {}, "is of text_encoder and unet, and .* of one model"
    ),
    "a text encoder of no version": (
        dotted("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"), "peft", None, {}, "of peft is not known"
    ),
    "a U-Net of no family": (
        dotted("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"), "kohya", None, {}, "kohya is not known"
    ),
    "part of what is fused": (
        dotted("transformer.single_transformer_blocks.0.attn.to_q"), "kohya", None, {}, "of kohya is not known without"
    ),
    "what may be a convolution": (flat_loha, "kohya", None, {"rank": 2}, "may be a convolution, whose kernel"),
    "a text encoder of no family": (
        dotted("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"), "kohya", None, {}, "kohya is not known"
    ),
    "a model": (
        lambda folder: trained("sd", folder / "a"), "kohya", "sd", {"kind": "model"}, "format= is the format of a"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(made: Made, tmp_path: Path, case: str) -> None:
    """With one message, before anything is written."""
    make, format, base, options, message = REFUSED[case]
    lora = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    settings = {"base": made.base(base) if base else None, "format": format, **options}
    with pytest.raises(MergingError, match=message):
        merge([lora], tmp_path / "out", **settings)
    assert sorted(tmp_path.iterdir()) == before


def test_text_encoders_under_the_names_of_two_versions_are_one(tmp_path: Path) -> None:
    for number, level in enumerate(("text_model.", "")):
        dotted(f"text_encoder.{level}encoder.layers.0.self_attn.q_proj")(tmp_path).rename(
            tmp_path / f"{number}.safetensors"
        )
    file = merge([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "out.safetensors")
    down, up = (value for _, value in sorted(load_file(file).items()))
    change = up @ down
    torch.testing.assert_close(change, torch.full((8, 8), sum(WEIGHTS)))


def test_models_with_one_set_of_names(tmp_path: Path) -> None:
    """ComfyUI's names of any denoiser are those of Kohya's files, without their dots."""
    lora = dotted("diffusion_model.blocks.0.self_attn.q")(tmp_path)
    file = merge([lora], tmp_path / "out.safetensors", format="kohya")
    assert modules(file) == {"lora_unet_blocks_0_self_attn_q"}


def test_command_line(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = made.lora("sdxl", "diffusers", 0)
    words = ["-m", "linear", str(one), "--base", str(made.base("sdxl")), "--format", "kohya", "-o", "one.safetensors"]

    def run(*words: str) -> str:
        done = CliRunner().invoke(cli, list(words))
        assert done.exit_code == 0, done.output
        return done.stdout

    assert "into the kohya adapter of rank 2 one.safetensors" in run(*words, "--dry-run")
    assert json.loads(run(*words, "--dry-run", "--json"))["format"] == "kohya"
    (tmp_path / "recipe.yaml").write_text(run(*words, "--recipe-only"))
    assert "format: kohya\n" in (tmp_path / "recipe.yaml").read_text()
    assert run(*words).startswith("one.safetensors: kohya adapter of rank 2, 1 model by linear")
    assert json.loads(run("run", "recipe.yaml", "-o", "two.safetensors", "--json"))["format"] == "kohya"
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert "adapter (Kohya)" in run("inspect", "one.safetensors")
