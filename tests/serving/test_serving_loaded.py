"""What is said before serving is what happens: PEFT, transformers and diffusers load the same files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from merging.errors import OptionError
from merging.serving import Finding, verify
from support.adapters import QUIRKS, baked, base_state, edit_config, peft, reload
from support.architectures import ARCHITECTURES, build
from support.diffusion_models import fused, quietly, state_of
from support.peft_types import CASES, TYPES, make
from support.serving_cases import ADAPTERS, MODELS, PIPELINES, laid, stocked
from support.serving_edits import Edit
from support.serving_loras import LORAS, Expected, kohya

pytestmark = [
    pytest.mark.exhaustive,
    *QUIRKS,
    *TYPES,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:.*torchvision"),
]

SILENT = {"LoRA-GA", "fast PiSSA"}
"""What PEFT loads without a word, and wrongly: the tests below say how."""

UNLIKE = {
    "bare file": "there is no folder to load",
    "targets missing": "it depends on the model whether PEFT knows the modules that were adapted",
    "larger vocabulary": "the base's config is not that of its weights",
    "vision tower": "merge finds its modules under a drifted name, and only loading tells that PEFT does not",
    "base unnamed": "there is no base to load it on",
    "head": "there is no base to load it on",
    "base by a path": "there is no base to load it on",
    "stacked experts of an unknown base": "there is no base to load it on",
    "quantised base": "bitsandbytes is wanted",
    "repeated blocks": "factors of the blocks that repeat others are missing",
    "NaN": "only the values tell",
}
"""Cases of which loading says nothing, or alone says something."""

AT_ODDS = {
    "no class": "AutoModel, which has no head, is taken",
    "head of its own": "transformers 5 keeps the head; older ones do not",
    "copied head": "transformers 5 keeps the head; older ones do not",
    "not quantised": "transformers 5 takes what there is; servers do not",
    "quantised": "bitsandbytes is wanted",
    "two sets": "which of the two was meant, nobody can tell",
    "code": "transformers loads it if it may run that code, and a trial never may",
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stocked(tmp_path_factory.mktemp("shelf"))


def loaded(path: Path, program: str, base: Path | None = None) -> list[Finding]:
    """What the program itself says when it loads it."""
    from merging.serving.subject import open_subject
    from merging.serving.trial_load import load

    return load(open_subject(str(path), base=str(base) if base else None), program)


def wrong(findings: list[Finding] | tuple[Finding, ...]) -> bool:
    """Whether something is refused, left out, or not found."""
    return any(each.severity in ("refuses", "ignores") or "are missing" in each.what for each in findings)


def check_agreement(path: Path, program: str, case: str, base: Path | None = None) -> None:
    told = verify(str(path), [program], base=str(base) if base else None)
    assert wrong(told.findings) == (wrong(loaded(path, program, base)) or case in SILENT), told.findings


@pytest.mark.parametrize("program", ["peft", "transformers"])
@pytest.mark.parametrize("case", ["sound", *(case for case in ADAPTERS if case not in UNLIKE)])
def test_adapters(case: str, program: str, shelf: Path, tmp_path: Path) -> None:
    path = laid(shelf, tmp_path / "a", "adapter")
    check_agreement(path if case == "sound" else ADAPTERS[case][0](path), program, case)


@pytest.mark.parametrize("case", ["sound", *(case for case in MODELS if case not in {**UNLIKE, **AT_ODDS})])
def test_models(case: str, shelf: Path, tmp_path: Path) -> None:
    path = laid(shelf, tmp_path / "m", "llama")
    check_agreement(path if case == "sound" else MODELS[case][0](path), "transformers", case)


def by_diffusers() -> dict[str, tuple[str, Edit, Expected]]:
    found = {f"pipeline: {name}": ("pipeline", *case) for name, case in PIPELINES.items() if name != "NaN"}
    found |= {f"LoRA: {name}": ("lora", *case) for name, case in LORAS.items() if name not in ("NaN", "LoKr of Flux")}
    return found


@pytest.mark.parametrize("case", by_diffusers())
def test_pipelines_and_their_loras(case: str, shelf: Path, tmp_path: Path) -> None:
    kind, edit, _ = by_diffusers()[case]
    path = edit(tmp_path / "x" if kind == "lora" else laid(shelf, tmp_path / "x", kind))
    check_agreement(
        path, "diffusers", "LoRA-GA" if case == "LoRA: DoRA" else case, shelf / "pipeline" if kind == "lora" else None
    )


def test_sound_pipeline_and_lora(shelf: Path, tmp_path: Path) -> None:
    for path, base in ((shelf / "pipeline", None), (kohya(tmp_path / "lora"), shelf / "pipeline")):
        verdict = verify(str(path), ["diffusers"], base=str(base) if base else None, load=True)
        assert {each.severity for each in verdict.findings} == {"ok"}


# ---- what is silent


def test_lora_ga_leaves_the_base_as_it_is(shelf: Path, tmp_path: Path) -> None:
    """The start that was taken off the base in training is not taken off again: PEFT merges it like plain LoRA."""
    base = shelf / "llama"
    plain = laid(shelf, tmp_path / "plain", "adapter")
    started = edit_config(laid(shelf, tmp_path / "ga", "adapter"), init_lora_weights="lora_ga")
    one, other = baked(base, plain), baked(base, started)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fast_pissa_is_another_model_each_time(shelf: Path, tmp_path: Path) -> None:
    base = shelf / "llama"
    started = edit_config(laid(shelf, tmp_path / "p", "adapter"), init_lora_weights="pissa_niter_1")
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(baked(base, started))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_transformers_loses_magnitudes_that_peft_finds(shelf: Path, tmp_path: Path) -> None:
    adapter = ADAPTERS["DoRA"][0](laid(shelf, tmp_path / "a", "adapter"))
    saved = peft.load_peft_weights(str(adapter))
    name = "model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    model = reload(shelf / "llama")
    model.load_adapter(str(adapter))
    got = model.get_submodule(f"{name}.default").weight
    right = peft.PeftModel.from_pretrained(reload(shelf / "llama"), adapter)
    assert torch.equal(
        right.base_model.model.get_submodule(f"{name}.default").weight, saved[f"base_model.model.{name}"]
    )
    assert not torch.allclose(got, saved[f"base_model.model.{name}"], atol=1e-3)


def test_diffusers_leaves_magnitudes_out(shelf: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    states = []
    for path in (kohya(tmp_path / "plain"), LORAS["DoRA"][0](tmp_path / "dora")):
        with quietly():
            states.append(fused(StableDiffusionPipeline.from_pretrained(shelf / "pipeline"), path))
    with quietly():
        before = state_of(StableDiffusionPipeline.from_pretrained(shelf / "pipeline"))
    assert any(not torch.equal(before[name], states[0][name]) for name in before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in before)


def test_what_is_missing_in_transformers_stays_the_bases(shelf: Path, tmp_path: Path) -> None:
    adapter = ADAPTERS["modules not in the file"][0](laid(shelf, tmp_path / "a", "adapter"))
    model = reload(shelf / "llama")
    model.load_adapter(str(adapter))
    kept = model.state_dict()["lm_head.modules_to_save.default.weight"]
    assert torch.equal(kept, base_state(shelf / "llama")["lm_head.weight"])


def test_weights_are_cast_to_the_stated_type(shelf: Path, tmp_path: Path) -> None:
    model = reload(MODELS["another type"][0](laid(shelf, tmp_path / "m", "llama")))
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


# ---- there is no false alarm


@pytest.mark.parametrize("case", {config: case for case, (_, config, *_) in reversed(CASES.items())}.values())
def test_types_of_peft(case: str, tmp_path: Path) -> None:
    build(CASES[case][0], 0).save_pretrained(tmp_path / "base")
    adapter = make(tmp_path / "a", case)
    for program in ("peft", "transformers"):
        check_agreement(adapter, program, case, tmp_path / "base")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, tmp_path: Path) -> None:
    """Whatever the architecture, a model that transformers saved is served."""
    build(name, 0).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    verdict = verify(str(tmp_path / "m"), ["transformers", "vllm", "sglang", "llama.cpp"])
    assert {each.severity for each in verdict.findings} == {"ok"}


# ---- --load


def test_load_adds_what_the_program_says(shelf: Path, tmp_path: Path) -> None:
    assert [each.what for each in verify(str(shelf / "adapter"), load=True).findings] == [
        "nothing is refused or ignored",
        "it was loaded, with no tensor missing or unexpected",
    ]
    cut = ADAPTERS["fewer targets"][0](laid(shelf, tmp_path / "a", "adapter"))
    verdict = verify(str(cut), ["peft"], load=True)
    assert [each.what for each in verdict.findings if each.severity == "ignores"] == [
        "modules that the config does not target",
        "tensors are unexpected when it is loaded",
    ]


def test_load_needs_a_base(shelf: Path, tmp_path: Path) -> None:
    adapter = edit_config(laid(shelf, tmp_path / "a", "adapter"), base_model_name_or_path="org/gone")
    for program in ("peft", "transformers"):
        with pytest.raises(OptionError, match="load=True needs the base: say where it is with base="):
            verify(str(adapter), [program], load=True)
        assert verify(str(adapter), [program], base=str(shelf / "llama"), load=True).served
    with pytest.raises(OptionError, match="load=True needs the pipeline"):
        verify(str(kohya(tmp_path / "lora")), ["diffusers"], load=True)


def test_load_of_what_a_program_does_not_take(shelf: Path) -> None:
    (_, refusal) = verify(str(shelf / "llama"), ["peft"], load=True).findings
    assert (refusal.severity, refusal.todo) == ("refuses", "it is a full model: load it with transformers")


def test_a_component_of_a_pipeline(shelf: Path, tmp_path: Path) -> None:
    unet = Path(shutil.copytree(shelf / "pipeline" / "unet", tmp_path / "unet"))
    assert verify(str(unet), load=True).programs == ("diffusers",)
    assert verify(str(unet), load=True).served
