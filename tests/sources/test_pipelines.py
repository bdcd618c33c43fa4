"""Models that are made of several: pipelines of diffusers and modules of sentence-transformers, folder by folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

import merging
from merging.errors import FormatError, InputError, OptionError, OutputError
from merging.hub.open_model import open_model
from merging.sources.checkpoint import Checkpoint
from support.hub_fixture import Hub
from support.pipelines import COMPONENTS, diffusion_pipeline, sentence_encoder
from support.tiny import identical, load

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return [diffusion_pipeline(folder / f"p{seed}", seed) for seed in range(3)]


def close(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    """Equal names, shapes and types, and values as close as float32 is to the truth."""
    return got.keys() == want.keys() and all(
        got[name].dtype == value.dtype and torch.allclose(got[name].double(), value.double(), rtol=1e-6, atol=1e-7)
        for name, value in want.items()
    )


def combined(base: dict[str, Tensor], models: list[dict[str, Tensor]], scale: float) -> dict[str, Tensor]:
    """Task arithmetic in float64."""
    return {
        name: (value.double() + scale * sum(each[name].double() - value.double() for each in models)).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in base.items()
    }


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_component_is_merged_and_the_pipeline_runs(pipelines: list[Path], tmp_path: Path) -> None:
    base, *tuned = pipelines
    out = merging.merge(tuned, method="task_arithmetic", scale=0.4, base=base, output=tmp_path / "out").path
    assert files(out) == files(base) | {"README.md"}
    assert "library_name: diffusers" in (out / "README.md").read_text()
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "unet/config.json"):
        assert (
            json.loads((out / name).read_text()).items()
            >= {
                key: value for key, value in json.loads((base / name).read_text()).items() if key != "_name_or_path"
            }.items()
        )
    loaded = [DiffusionPipeline.from_pretrained(path) for path in (base, *tuned, out)]
    for component in COMPONENTS:
        states = [dict(getattr(each, component).state_dict()) for each in loaded]
        assert close(states[-1], combined(states[0], states[1:-1], 0.4))
    image = loaded[-1]("a cat", num_inference_steps=2, output_type="np", height=16, width=16).images
    assert image.shape == (1, 16, 16, 3)


def test_the_mean_of_two_needs_no_base(pipelines: list[Path], tmp_path: Path) -> None:
    out = merging.merge(pipelines[:2], method="linear", output=tmp_path / "out").path
    loaded = [DiffusionPipeline.from_pretrained(path) for path in (*pipelines[:2], out)]
    for component in COMPONENTS:
        one, two, got = (dict(getattr(each, component).state_dict()) for each in loaded)
        assert close(
            got,
            {
                n: (v.double() + two[n].double()).div(2).to(v.dtype) if v.is_floating_point() else v
                for n, v in one.items()
            },
        )


def test_the_components_that_are_not_chosen_stay_byte_for_byte(pipelines: list[Path], tmp_path: Path) -> None:
    base, *tuned = pipelines
    out = merging.merge(
        tuned, method="task_arithmetic", base=base, components="unet", output=tmp_path / "out", shard_size=20_000
    ).path
    for component in ("vae", "text_encoder"):
        assert (out / component / WEIGHTS[component]).read_bytes() == (
            base / component / WEIGHTS[component]
        ).read_bytes()
    assert len(list((out / "unet").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 2
    loaded = [UNet2DConditionModel.from_pretrained(path, subfolder="unet") for path in (base, *tuned, out)]
    states = [dict(each.state_dict()) for each in loaded]
    assert close(states[-1], combined(states[0], states[1:-1], 1.0))
    assert isinstance(DiffusionPipeline.from_pretrained(out), DiffusionPipeline)


def test_one_unet_alone_merges_into_its_pipeline(pipelines: list[Path], tmp_path: Path) -> None:
    base, one, two = pipelines
    plan = merging.preview([one / "unet", two], method="task_arithmetic", base=base, components=["unet"])
    assert {item.site.name.partition(".")[0] for item in plan.items} == {"unet"}
    out = merging.merge([one / "unet", two], method="linear", base=base, components=["unet"], output=tmp_path / "out")
    states = [load_file(path / "unet" / WEIGHTS["unet"]) for path in (one, two, out.path)]
    assert close(states[2], {name: (states[0][name].double() + states[1][name]).div(2).float() for name in states[0]})


def test_a_model_of_diffusers_keeps_the_names_of_its_files(pipelines: list[Path], tmp_path: Path) -> None:
    out = merging.merge(
        [path / "unet" for path in pipelines[1:]], method="linear", output=tmp_path / "out", dtype="float16"
    )
    assert files(out.path) == {"README.md", "config.json", WEIGHTS["unet"]}
    assert next(UNet2DConditionModel.from_pretrained(out.path).parameters()).dtype == torch.float32
    assert {value.dtype for value in load(out.path).values()} == {torch.float16}
    assert "dtype" not in json.loads((out.path / "config.json").read_text())


def test_pipelines_must_have_the_same_components(pipelines: list[Path], tmp_path: Path) -> None:
    without = tmp_path / "without"
    shutil.copytree(pipelines[1], without)
    shutil.rmtree(without / "vae")
    with pytest.raises(InputError, match=r"without lacks the component vae, unlike .*components="):
        merging.preview([pipelines[2], without], method="linear")
    with pytest.raises(InputError, match=r"p2 has a component vae, unlike .*without: name those to merge"):
        merging.preview([without, pipelines[2]], method="linear")
    chosen = merging.preview([without, pipelines[2]], method="linear", components=["unet", "text_encoder"])
    assert not chosen.kept


def test_names_of_components(pipelines: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no component 'unett' \(did you mean 'unet'\?\): it has "):
        merging.preview(pipelines, method="linear", components="unett")
    with pytest.raises(OptionError, match=r"components= chooses among the models of a pipeline, and .*unet is none"):
        merging.preview([path / "unet" for path in pipelines], method="linear", components="unet")
    with pytest.raises(OutputError, match="made of several models, in a folder"):
        merging.merge(pipelines, method="linear", output=tmp_path / "out.safetensors")


# ---- variants


def variant(pipeline: Path, target: Path, *names: str, plain: bool = False) -> Path:
    """A pipeline whose weights are those of variants; ``plain``: beside the ordinary ones."""
    shutil.copytree(pipeline, target)
    for weights in target.rglob("*.safetensors"):
        for name in names:
            shutil.copyfile(weights, weights.with_suffix(f".{name}.safetensors"))
        if not plain:
            weights.unlink()
    return target


def test_the_only_variant_is_read(pipelines: list[Path], tmp_path: Path) -> None:
    """And written by the ordinary names, under which every reader finds it."""
    only = [variant(path, tmp_path / path.name, "fp16") for path in pipelines[1:]]
    merged = [
        merging.merge(paths, method="linear", output=tmp_path / name).path
        for paths, name in ((only, "variants"), (pipelines[1:], "plain"))
    ]
    assert files(merged[0]) == files(merged[1])
    assert all(load(merged[0] / c).keys() == load(merged[1] / c).keys() for c in COMPONENTS)
    saved = diffusion_pipeline(tmp_path / "saved", 1, variant="fp16", max_shard_size="20KB")
    tensors, want = (open_model(path / "unet") for path in (saved, pipelines[1] / ""))
    assert isinstance(tensors, Checkpoint) and isinstance(want, Checkpoint)
    assert len(tensors.files) > 2
    assert all(torch.equal(stored.read(), want.tensors[name].read()) for name, stored in tensors.tensors.items())


def test_several_variants_are_ambiguous_unless_there_is_a_plain_one(pipelines: list[Path], tmp_path: Path) -> None:
    several = variant(pipelines[1], tmp_path / "several", "fp16", "bf16")
    with pytest.raises(InputError, match=r"which weights\? The folder holds only the variants bf16, fp16"):
        open_model(several)
    beside = variant(pipelines[1], tmp_path / "beside", "fp16", "bf16", plain=True)
    opened = open_model(beside)
    assert sorted(file.name for file in opened.files) == sorted(WEIGHTS.values())


def test_damaged_lists_of_components(pipelines: list[Path], tmp_path: Path) -> None:
    for index, message in (
        ({"../unet": ["diffusers", "X"]}, "not a plain name of a folder"),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "none of its components has weights here"),
    ):
        copy = tmp_path / message.replace(" ", "")
        shutil.copytree(pipelines[0], copy)
        (copy / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(FormatError, match=message):
            open_model(copy)


# ---- sentence-transformers


def test_modules_of_sentence_transformers(tmp_path: Path) -> None:
    """The encoder and the dense module are merged, the whole folder comes out, and it loads and embeds."""
    from sentence_transformers import SentenceTransformer

    paths = [sentence_encoder(tmp_path / f"s{seed}", seed) for seed in (1, 2)]
    out = merging.merge(paths, method="linear", output=tmp_path / "out").path
    assert files(out) == files(paths[0]) | {"README.md"}
    assert "library_name: sentence-transformers" in (out / "README.md").read_text()
    models = [AutoModel.from_pretrained(path).state_dict() for path in (*paths, out)]
    dense = [load_file(path / "2_Dense" / "model.safetensors") for path in (*paths, out)]
    for one, two, got in (models, dense):
        assert close(
            dict(got), {name: (value.double() + two[name].double()).div(2).float() for name, value in one.items()}
        )
    assert SentenceTransformer(str(out), device="cpu").encode(["a b c"]).shape == (1, 8)
    encoder = merging.merge(paths, method="linear", components="2_Dense", output=tmp_path / "dense").path
    assert (encoder / "model.safetensors").read_bytes() == (paths[0] / "model.safetensors").read_bytes()
    assert close(load_file(encoder / "2_Dense" / "model.safetensors"), dense[2])


# ---- on the Hub


@pytest.mark.exhaustive
def test_a_pipeline_on_the_hub(pipelines: list[Path], hub: Hub, tmp_path: Path) -> None:
    """What is merged and what is kept comes, and lies as if the pipelines were local."""
    for path in pipelines:
        hub.put(f"org/{path.name}", path)
    words = ["-m", "task_arithmetic", "--component", "unet", "--base"]
    for output, names in (("far", [f"org/{path.name}" for path in pipelines]), ("near", [str(p) for p in pipelines])):
        done = subprocess.run(
            [sys.executable, "-m", "merging", *words, *names, "-o", output, "--quiet"],
            env=hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "far") == files(tmp_path / "near")
    for component in COMPONENTS:
        one, two = (load_file(tmp_path / name / component / WEIGHTS[component]) for name in ("far", "near"))
        assert identical(one, two)
