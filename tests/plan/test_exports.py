"""Merged LoRAs in the formats of PEFT, diffusers and Kohya: each program makes of them the sum of what was merged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers.loaders import lora_conversion_utils
from lycoris.kohya import create_network_from_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import merging
from merging.api.inspect import inspect
from merging.cli.main import cli
from merging.errors import InputError, MergingError
from merging.sources.diffusion_names import known_names
from support.adapters import QUIRKS, quiet, save_base, train
from support.diffusion_models import (
    TEXT,
    State,
    build,
    components,
    factors,
    fused,
    kohya_modules,
    quietly,
    state_of,
    trained,
)

pytestmark = [*QUIRKS, pytest.mark.exhaustive]

WEIGHTS = (0.7, -0.4)


class Made:
    """A folder with a pipeline of each kind, two LoRAs of it in each format, and what diffusers makes of any two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lora = cache(self._lora)
        self.together = cache(self._together)
        self.before = cache(lambda model: state_of(build(model)))

    @cache  # noqa: B019
    def base(self, model: str) -> Path:
        with quietly():
            build(model).save_pretrained(self.folder / model)
        return self.folder / model

    def _lora(self, model: str, kind: str, seed: int) -> Path:
        path = self.folder / f"{model}-{kind}-{seed}"
        if kind == "diffusers":
            return trained(model, path, seed=seed, lora_alpha=3)
        return factors(path.with_suffix(".safetensors"), kohya_modules(model, 1), seed=seed)

    def pair(self, model: str, kinds: str) -> list[Path]:
        """Two LoRAs, of the kinds that their letters say."""
        return [self.lora(model, {"d": "diffusers", "k": "kohya"}[kind], seed) for seed, kind in enumerate(kinds)]

    def _together(self, model: str, kinds: str) -> State:
        """The pipeline's weights when diffusers has loaded the two and fused them with their weights."""
        pipeline = build(model)
        with quietly():
            for name, lora in zip("ab", self.pair(model, kinds), strict=True):
                pipeline.load_lora_weights(
                    lora.parent, weight_name=lora.name, adapter_name=name, low_cpu_mem_usage=False
                )
            pipeline.set_adapters(["a", "b"], list(WEIGHTS))
            pipeline.fuse_lora(components=list(components(pipeline)), adapter_names=["a", "b"])
            pipeline.unload_lora_weights()
        return state_of(pipeline)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def merge(loras: list[Path], out: Path, **options: Any) -> Path:
    """The file of a weighted sum."""
    settings: dict[str, Any] = {"method": "task_arithmetic", "weights": WEIGHTS[: len(loras)], **options}
    merging.merge(loras, output=out, **settings)
    if out.is_file():
        return out
    (file,) = out.glob("*.safetensors")
    return file


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def close(got: dict[str, Tensor], wanted: dict[str, Tensor], error: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    off = {name: float((got[name] - wanted[name]).abs().max()) for name in wanted}
    assert not {name: each for name, each in off.items() if not each <= error}


def modules(file: Path) -> set[str]:
    """The modules that a file changes; those of text encoders by their names in any version of transformers."""
    names = (re.sub(r"\.(?:lora_\w+(?:\.(?:up|down))?\.weight|alpha)$", "", name) for name in load_file(file))
    return {name.replace("text_model.", "") for name in names}


# ---- what diffusers makes of them


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("model", "kinds"), [(model, kinds) for model in ("sd", "sdxl") for kinds in ("dd", "kk", "dk")]
)
def test_diffusers_loads_the_sum(made: Made, tmp_path: Path, model: str, kinds: str, format: str) -> None:
    """From either format or both into each: U-Net, its convolutions, and one text encoder or two."""
    file = merge(made.pair(model, kinds), tmp_path / "out", base=made.base(model), format=format)
    close(fused(build(model), file), made.together(model, kinds))


def test_diffusers_loads_a_transformer(made: Made, tmp_path: Path) -> None:
    file = merge(made.pair("flux", "dd"), tmp_path / "out.safetensors", base=made.base("flux"))
    close(fused(build("flux"), file), made.together("flux", "dd"))


@pytest.mark.parametrize("kinds", ["dd", "kk"])
def test_without_a_base_the_format_stays(made: Made, tmp_path: Path, kinds: str) -> None:
    file = merge(made.pair("sd", kinds), tmp_path / "out")
    assert modules(file) == set.union(*map(modules, made.pair("sd", kinds)))
    close(fused(build("sd"), file), made.together("sd", kinds))


def published(state: State) -> State:
    """A transformer of diffusers as it was published."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return {
        known.name: torch.cat([state[part.name][part.start : part.start + part.length] for part in known.rows])
        for known in known_names(shapes)
        if known.component == "transformer" and "published" in known.styles
    }


def changes(file: Path) -> State:
    """What a file of Kohya's changes, by the definition: alpha / rank times the product of the factors."""
    state = load_file(file)
    found = {}
    for name in state:
        module, _, part = name.partition(".")
        if part == "lora_up.weight":
            up, down = state[name].flatten(1), state[f"{module}.lora_down.weight"].flatten(1)
            found[module] = float(state[f"{module}.alpha"]) / len(down) * up @ down
    return found


@pytest.mark.parametrize(
    ("kinds", "base"), [("dd", "pipeline"), ("kk", "pipeline"), ("dk", "pipeline"), ("dk", "single file")]
)
def test_flux_as_it_was_published(made: Made, tmp_path: Path, kinds: str, base: str) -> None:
    """Projections that diffusers keeps apart are fused, with zeros where nothing was trained, halves in their order."""
    before = made.before("flux")
    given = made.base("flux")
    if base == "single file":
        given = tmp_path / "single.safetensors"
        text = {
            name.replace("text_encoder.", "text_encoders.clip_l.transformer."): value
            for name, value in before.items()
            if name.startswith("text_encoder.")
        }
        transformer = {f"model.diffusion_model.{name}": value for name, value in published(before).items()}
        save_file(transformer | text, given)
    file = merge(made.pair("flux", kinds), tmp_path / "out", base=given, format="kohya")
    wanted: dict[str, Tensor] = {}
    for lora, weight in zip(made.pair("flux", kinds), WEIGHTS, strict=True):
        if lora.name == "pytorch_lora_weights.safetensors":
            after = fused(build("flux"), lora)
            now, then = published(after), published(before)
            own = {f"lora_unet_{n.removesuffix('.weight')}".replace(".", "_"): now[n] - then[n] for n in then}
            own |= {
                f"lora_te1_text_model_{n.removesuffix('.weight').partition('.')[2]}".replace(".", "_"): after[n] - value
                for n, value in before.items()
                if n.startswith("text_encoder.")
            }
        else:
            own = changes(lora)
        for name, change in own.items():
            if change.any():
                wanted[name] = wanted.get(name, 0) + weight * change
    close(changes(file), wanted)


def test_flux_at_its_width_is_read_by_diffusers(tmp_path: Path) -> None:
    """diffusers takes the fused layers of Kohya's files apart as we have put them together."""
    width = 3072
    sizes = {
        "transformer_blocks.0.attn.to_q": (width, width),
        "transformer_blocks.0.attn.to_k": (width, width),
        "transformer_blocks.0.attn.to_v": (width, width),
        "transformer_blocks.0.ff.net.2": (width, 4 * width),
        "single_transformer_blocks.0.attn.to_q": (width, width),
        "single_transformer_blocks.0.attn.to_k": (width, width),
        "single_transformer_blocks.0.attn.to_v": (width, width),
        "single_transformer_blocks.0.proj_mlp": (4 * width, width),
    }
    given = {}
    for name, (outputs, inputs) in sizes.items():
        given[f"transformer.{name}.lora_A.weight"] = torch.randn(2, inputs)
        given[f"transformer.{name}.lora_B.weight"] = torch.randn(outputs, 2)
    save_file(given, tmp_path / "a.safetensors")
    file = merge([tmp_path / "a.safetensors"], tmp_path / "out.safetensors", format="kohya", weights=1.0)
    assert {name.partition(".")[0] for name in load_file(file)} == {
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_double_blocks_0_img_mlp_2",
        "lora_unet_single_blocks_0_linear1",
    }
    got = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(load_file(file))
    for name, (_, inputs) in sizes.items():
        probe = torch.randn(inputs)
        one, other = (
            state[f"transformer.{name}.lora_B.weight"] @ (state[f"transformer.{name}.lora_A.weight"] @ probe)
            for state in (got, given)
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_baked_in_they_are_what_diffusers_fuses(made: Made, tmp_path: Path) -> None:
    """The same sum written into the pipeline, whose components load."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"weights": WEIGHTS, "base": made.base("sdxl"), "kind": "model", "output": out}
    merging.merge(made.pair("sdxl", "dk"), method="task_arithmetic", **options)
    wanted = made.together("sdxl", "dk")
    for name, module in components(build("sdxl")).items():
        loaded = type(module).from_pretrained(out, subfolder=name).state_dict()
        close(dict(loaded), {key: wanted[f"{name}.{key}"] for key in loaded})


# ---- what LyCORIS makes of them


def tree(state: State) -> nn.Module:
    """Modules of these names, with the weights of linear layers and convolutions."""
    root = nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        if leaf != "weight" or value.dim() not in (2, 4):
            continue
        sizes = (value.shape[1], value.shape[0])
        layer = nn.Linear(*sizes, bias=False) if value.dim() == 2 else nn.Conv2d(*sizes, tuple(value.shape[2:]))
        layer.weight.data = value.clone()
        module = root
        for part in path[:-1]:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.add_module(path[-1], layer)
    return root


def as_trained(state: State, model: str) -> dict[str, State]:
    """The components as sd-scripts has them: SDXL's U-Net as published, and text encoders by their old names."""
    found: dict[str, State] = {}
    style = "published" if model == "sdxl" else "diffusers"
    for known in known_names({name: tuple(value.shape) for name, value in state.items()}):
        if style in known.styles:
            found.setdefault(known.component, {})[known.name] = state[known.rows[0].name]
    return found


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_lycoris_makes_the_sum_of_a_kohya_file(made: Made, tmp_path: Path, model: str) -> None:
    file = merge(made.pair(model, "dk"), tmp_path / "out", base=made.base(model), format="kohya")
    trees = {name: tree(state) for name, state in as_trained(made.before(model), model).items()}
    texts = [module for name, module in trees.items() if name.startswith("text")]
    with quietly():
        network, _ = create_network_from_weights(
            1.0, str(file), None, texts if model == "sdxl" else texts[0], trees["unet"]
        )
        assert len(network.unet_loras + network.text_encoder_loras) == len(modules(file))
        for each in network.unet_loras + network.text_encoder_loras:
            each.merge_to(1.0)
    wanted = as_trained(made.together(model, "dk"), model)
    for name, module in trees.items():
        got = {key: value for key, value in module.state_dict().items() if key.endswith("weight")}
        close(got, {key: wanted[name][key] for key in got})


# ---- what PEFT makes of them


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_peft_loads_one_component(made: Made, tmp_path: Path, component: str) -> None:
    """From both of the others' formats, as a folder of the portable profile."""
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[component]
    own = {name: each for name, each in kohya_modules("sd", 1).items() if name.startswith(prefix)}
    loras = [
        trained("sd", tmp_path / "a", parts=(component,), lora_alpha=3),
        factors(tmp_path / "b.safetensors", own, seed=2),
    ]
    file = merge(loras, tmp_path / "out", base=made.base("sd"), format="peft")
    before = made.before("sd")
    wanted = dict(before)
    for lora, weight in zip(loras, WEIGHTS, strict=True):
        after = fused(build("sd"), lora)
        wanted = {name: value + weight * (after[name] - before[name]) for name, value in wanted.items()}
    model = getattr(build("sd"), component)
    with quietly():
        loaded = PeftModel.from_pretrained(model, file.parent)
    names = {name.removeprefix("base_model.model.") for name in load_file(file)}
    assert names == {
        name.removeprefix("base_model.model.").replace(".default", "")
        for name in loaded.state_dict()
        if ".lora_" in name
    }
    merged = loaded.merge_and_unload().state_dict()
    close(dict(merged), {name: wanted[f"{component}.{name}"] for name in merged})
    portable(file.parent, rank=8)


def portable(folder: Path, rank: int) -> None:
    """What every server reads: one rank of those that all take, scales in the factors, no variants."""
    config = json.loads((folder / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "inference_mode": True,
    }
    assert {name: config[name] for name in wanted} == wanted
    state = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") and ".default" not in name for name in state)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in state)
    assert {value.shape["lora_B" in name] for name, value in state.items()} == {rank}
    assert metadata(folder / "adapter_model.safetensors")["format"] == "pt"


def test_language_models_keep_the_portable_profile(tmp_path: Path) -> None:
    with quiet():
        base = save_base(tmp_path / "base", "llama")
        one = train(tmp_path / "one", base, 1, ["q_proj", "up_proj"], r=6, use_rslora=True)
        two = train(tmp_path / "two", base, 2, ["q_proj"], r=3, lora_alpha=7, rank_pattern={"q_proj": 4})
    merge([one, two], tmp_path / "out")
    portable(tmp_path / "out", rank=16)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_from_peft(made: Made, tmp_path: Path, format: str) -> None:
    """What PEFT saves of a U-Net, which pipelines do not read, becomes what they do."""
    pipeline = build("sd")
    torch.manual_seed(3)
    model = get_peft_model(pipeline.unet, LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv1"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    model.save_pretrained(tmp_path / "peft")
    file = merge([tmp_path / "peft"], tmp_path / "out", base=made.base("sd"), format=format, weights=1.0)
    wanted = made.before("sd") | {f"unet.{name}": each for name, each in model.merge_and_unload().state_dict().items()}
    close(fused(build("sd"), file), wanted)


# ---- what they are called, and what they say of themselves


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
    with pytest.raises(InputError, match=r"beyond the range of F16: set a wider --dtype"):
        merge([tmp_path / "large.safetensors"], tmp_path / "other.safetensors", format=format, weights=1e6)
    assert not (tmp_path / "other.safetensors").exists()


# ---- what a format cannot hold, or cannot say


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
    "flat names": (norms, "diffusers", None, {}, r"do not tell those of the model's modules: give it with --base"),
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
        lambda folder: trained("sd", folder / "a"), "kohya", "sd", {"kind": "model"}, "--format is that of a merged ad"
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


# ---- the command line


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
