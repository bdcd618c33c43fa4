"""Every way out that a refusal names is one: taken on suitable inputs, it ends in a merge and in no other refusal."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import merging
from merging.errors import MergingError, command_line_words, option
from support.tiny import CONFIG, fine_tune, model, save

ROOT = Path(merging.__file__).parent
BASE = model(0)
Q, UP, EMBEDDING, HEAD = (
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.up_proj",
    "model.embed_tokens",
    "lm_head",
)
Options = dict[str, Any]
Case = Callable[[Path], tuple[Options, list[Options]]]
"""What is refused, and what the message says to do instead, each way by itself; both as arguments of merge."""


def base(folder: Path) -> Path:
    return folder / "base" if (folder / "base").exists() else save(folder / "base", BASE)


def tuned(folder: Path, seed: int = 1) -> Path:
    return save(folder / f"tuned {seed}", fine_tune(BASE, seed))


def adapter(folder: Path, name: str, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """An adapter of PEFT's: factors on one layer, unless it is given others, and ``tensors`` beside them."""
    (folder / name).mkdir()
    pair = {f"{Q}.lora_A.weight": torch.randn(2, 8), f"{Q}.lora_B.weight": torch.randn(len(BASE[f"{Q}.weight"]), 2)}
    held = {f"base_model.model.{key}": value for key, value in (tensors if tensors is not None else pair).items()}
    save_file(held, folder / name / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.0.mlp.up_proj"], **config}
    (folder / name / "adapter_config.json").write_text(json.dumps(settings))
    return folder / name


def flat(path: Path, modules: dict[str, tuple[int, ...]]) -> Path:
    """A LoRA file with factors under the names that it is given."""
    tensors = {}
    for name, (out, *inputs) in modules.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, *inputs)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, *(1 for _ in inputs[1:]))
    save_file(tensors, path)
    return path


def args(*models: Path, method: str = "linear", **options: Any) -> Options:
    return {"models": list(models), "method": method, **options}


def origin(tmp: Path) -> tuple[Options, list[Options]]:
    given = args(tuned(tmp), method="task_arithmetic")
    return given, [given | {"base": base(tmp)}]


def mixed(tmp: Path) -> tuple[Options, list[Options]]:
    given = args(tuned(tmp), adapter(tmp, "a"))
    return given, [given | {"base": base(tmp)}]


def baked(tmp: Path) -> tuple[Options, list[Options]]:
    given = args(adapter(tmp, "a"), kind="model")
    return given, [given | {"base": base(tmp)}]


def intruders(tmp: Path) -> tuple[Options, list[Options]]:
    given = args(adapter(tmp, "a"), reduce_intruders=True)
    return given, [given | {"base": base(tmp)}]


def weights(tmp: Path) -> tuple[Options, list[Options]]:
    given = args(adapter(tmp, "a"), adapter(tmp, "b"), method="slerp")
    return given, [given | {"base": base(tmp)}]


def base_values(tmp: Path) -> tuple[Options, list[Options]]:
    given = args(adapter(tmp, "a"), adapter(tmp, "b"), method="larv")
    return given, [given | {"base": base(tmp)}]


def ranks_of_a_model(tmp: Path) -> tuple[Options, list[Options]]:
    given = args(tuned(tmp), tuned(tmp, 2), base=base(tmp))
    rank = {"rank": {"energy": 0.5}}
    return given | rank, [given, given | rank | {"kind": "adapter"}]


def in_full(tmp: Path) -> tuple[Options, list[Options]]:
    saved = adapter(
        tmp, "a", {f"{UP}.weight": torch.randn(BASE[f"{UP}.weight"].shape)}, modules_to_save=["layers.1.mlp.up_proj"]
    )
    given = args(saved, kind="model")
    pair = args(saved)
    return pair, [given | {"base": base(tmp)}]


def unrelated(tmp: Path) -> tuple[Options, list[Options]]:
    other = {f"{UP}.lora_A.weight": torch.randn(2, 8), f"{UP}.lora_B.weight": torch.randn(len(BASE[f"{UP}.weight"]), 2)}
    given = args(adapter(tmp, "a"), adapter(tmp, "b", other, target_modules=["layers.1.mlp.up_proj"]))
    return given, [given | {"base": base(tmp)}, given | {"allow_different_bases": True}]


def two_bases(tmp: Path) -> tuple[Options, list[Options]]:
    pair = (adapter(tmp, each, base_model_name_or_path=each) for each in ("one", "two"))
    given = args(*pair)
    return given, [given | {"allow_different_bases": True}]


def other_tensors(tmp: Path) -> tuple[Options, list[Options]]:
    more = fine_tune(BASE, 1) | {"model.extra.weight": torch.ones(3)}
    given = args(tuned(tmp, 2), save(tmp / "more", more))
    return given, [given | {"on_mismatch": "base"}]


def vocabularies(tmp: Path) -> tuple[Options, list[Options]]:
    tables = {f"{name}.weight": torch.randn(15, 8) for name in (EMBEDDING, HEAD)}
    grown = save(tmp / "grown", fine_tune(BASE, 1) | tables, CONFIG | {"vocab_size": 15})
    given = args(tuned(tmp, 2), grown)
    return given, [given | {"vocabulary": "base"}, given | {"vocabulary": "largest"}]


def resized(tmp: Path) -> tuple[Options, list[Options]]:
    """The same of an adapter's tables."""
    tables = {f"{name}.weight": torch.randn(15, 8) for name in (EMBEDDING, HEAD)}
    pair = {f"{Q}.lora_A.weight": torch.randn(2, 8), f"{Q}.lora_B.weight": torch.randn(len(BASE[f"{Q}.weight"]), 2)}
    given = args(adapter(tmp, "a", pair | tables), base=base(tmp))
    return given, [
        given | {"vocabulary": rows, "kind": kind} for rows in ("base", "largest") for kind in ("adapter", "model")
    ]


def labels(tmp: Path) -> tuple[Options, list[Options]]:
    pair = {f"{Q}.lora_A.weight": torch.randn(2, 8), f"{Q}.lora_B.weight": torch.randn(len(BASE[f"{Q}.weight"]), 2)}
    config = {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
    given = args(*(adapter(tmp, f"a{n}", pair | {"score.weight": torch.randn(n, 8)}, **config) for n in (2, 3)))
    return given, [given | {"exclude": "score"} | more for more in ({}, {"base": base(tmp)})]


def biases(tmp: Path) -> tuple[Options, list[Options]]:
    shape = BASE[f"{Q}.weight"].shape
    with_biases = save(tmp / "base", BASE | {f"{Q}.bias": torch.randn(shape[0]), f"{UP}.bias": torch.randn(16)})
    pair = {f"{Q}.lora_A.weight": torch.randn(2, 8), f"{Q}.lora_B.weight": torch.randn(shape[0], 2)}
    given = args(adapter(tmp, "a", pair | {f"{UP}.bias": torch.randn(16)}, bias="all"), base=with_biases)
    return given, [given | {"kind": "model"}]


def full_rank(tmp: Path) -> tuple[Options, list[Options]]:
    scaled = adapter(tmp, "a", {f"{Q}.ia3_l": torch.randn(len(BASE[f"{Q}.weight"]), 1)}, peft_type="IA3")
    given = args(scaled, base=base(tmp))
    return given, [given | {"rank": 2}, given | {"kind": "model"}]


def no_factors(tmp: Path) -> tuple[Options, list[Options]]:
    saved = adapter(
        tmp, "a", {f"{UP}.weight": torch.randn(BASE[f"{UP}.weight"].shape)}, modules_to_save=["layers.1.mlp.up_proj"]
    )
    given = args(saved, base=base(tmp))
    return given, [given | {"kind": "model"}]


def tokens(tmp: Path) -> tuple[Options, list[Options]]:
    rows = {f"{name}.token_adapter.trainable_tokens_delta": torch.randn(2, 8) for name in (EMBEDDING, HEAD)}
    chosen = {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3, 4]}, "target_modules": []}
    given = args(adapter(tmp, "a", rows, **chosen), base=base(tmp))
    return given, [given | {"kind": "model"}]


def drifted(tmp: Path) -> tuple[Options, list[Options]]:
    shape = BASE[f"{Q}.weight"].shape
    short = {
        f"{Q.removeprefix('model.')}.lora_A.weight": torch.randn(2, 8),
        f"{Q.removeprefix('model.')}.lora_B.weight": torch.randn(shape[0], 2),
    }
    given = args(adapter(tmp, "a"), adapter(tmp, "b", short))
    return given, [given | {"base": base(tmp)}]


def an_adapter_as_base(tmp: Path) -> tuple[Options, list[Options]]:
    given = args(adapter(tmp, "a"), base=adapter(tmp, "b"))
    return given, [given | {"base": base(tmp)}]


def pipeline(folder: Path, seed: int) -> Path:
    """What diffusers calls a pipeline: models in folders of their own."""
    parts = {name: ["diffusers", "AutoencoderKL"] for name in ("unet", "vae")}
    for number, name in enumerate(parts):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
        save_file(model(seed + number), folder / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline", **parts}))
    return folder


def part_of_a_pipeline(tmp: Path) -> tuple[Options, list[Options]]:
    given = args(pipeline(tmp / "whole", 1), tuned(tmp))
    return given, [given | {"components": "unet"}]


def two_components(tmp: Path) -> tuple[Options, list[Options]]:
    names = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
    }
    given = args(flat(tmp / "a.safetensors", names))
    return given | {"format": "peft"}, [given | {"format": "diffusers"}, given | {"format": "kohya"}]


def text_encoders(tmp: Path) -> tuple[Options, list[Options]]:
    trained = {
        "transformer.transformer_blocks.0.img_mlp.net.2": (8, 8),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
    }
    denoiser = tmp / "denoiser.safetensors"
    save_file({"transformer_blocks.0.img_mlp.net.2.weight": torch.ones(8, 8)}, denoiser)
    given = args(flat(tmp / "a.safetensors", trained), base=denoiser, kind="model")
    return given, [given | {"exclude": "text_encoder"}]


def large(tmp: Path) -> tuple[Options, list[Options]]:
    wild = save(tmp / "wild", BASE | {f"{Q}.weight": BASE[f"{Q}.weight"] * 1e30})
    given = args(wild, tuned(tmp), method="model_stock", base=base(tmp))
    return given, [given | {"dtype": "float64"}, given | {"exclude": Q}]


HINTS: dict[str, Case] = {
    "full checkpoints need this model as --base": origin,
    "full checkpoints and adapters can be merged together only with --base": mixed,
    "a model can be made of adapters only with --base": baked,
    "--reduce-intruders compares with the base: give it with --base": intruders,
    "merges weights, which adapters have only with --base: give it": weights,
    "looks at the base's weights: give --base": base_values,
    ": give the base with --base": in_full,
    "leave this out, or make an adapter with --as adapter": ranks_of_a_model,
    "and do not state one base: are they adapters of the same model?": unrelated,
    "If they are the same model under two names, use --allow-different-bases": two_bases,
    "Use --on-mismatch base to keep": other_tensors,
    "the models have vocabularies of different sizes": vocabularies,
    "--vocabulary largest all there are": resized,
    "these heads are for different labels: leave them out with --exclude": labels,
    "PEFT's format carries biases only of all adapted modules": biases,
    "choose one with --rank, or make a model with --as model": full_rank,
    "the adapters hold tensors in full and no factors": no_factors,
    "the adapters hold rows of tokens and no factors": tokens,
    "these look like the same module under the names of two library versions": drifted,
    "say by --component which part of one it is": part_of_a_pipeline,
    "an adapter of PEFT's is of one model: use --format": two_components,
    "the base has no text encoder: give the whole pipeline with --base, or leave": text_encoders,
    "if all values are finite, their squares are not in float32: use --dtype float64": large,
    "wants the full model that the others were trained from": an_adapter_as_base,
}
"""A part of each message, and a case of it."""

ELSEWHERE = {
    "use fewer workers (--threads 1 takes the least), more GPUs, or --device cpu": "engine/test_devices.py",
    "is for the output of the whole recipe: give it there": "test_quantised_output.py",
    "does not write its format": "test_quantised_output.py",
    "does not understand this variant": "sources/test_packed.py",
    "files have names for single experts": "test_experts_apart.py",
    "the base keeps its experts together": "test_experts_apart.py",
    "was packed with another base than": "test_compress.py",
    "were packed with different bases": "test_compress.py",
    "name those to merge with --component": "test_pipelines.py",
    "which LoRA files in the format of {} do not hold": "test_exports.py",
    "is an embedding, or stored transposed": "test_exports.py",
    "whose kernel the file does not state": "test_exports.py",
    "is not known{}: {}{} --as model": "test_exports.py",
    "the names in Kohya's files do not give the names of the model's modules": "test_exports.py",
    "one of the two is a part of the other": "sources/test_one_naming.py",
    "is in several tensors of {}": "test_experts.py",
    "depend on the architecture: give the model with --base": "output/test_gguf_format.py",
    "llama.cpp stacks them: choose one rank with --rank": "output/test_gguf_format.py",
    "and llama.cpp's names are known here of": "output/test_gguf_format.py",
    "and llama.cpp has none: leave --format gguf out": "output/test_gguf_format.py",
    "use --dequantize to merge it as ordinary numbers": "sources/test_gguf_models.py",
    "give the right one with --lora-alpha": "sources/test_diffusion_lora.py",
    "or give an alpha with --lora-alpha": "sources/test_mlx.py",
    "or use --allow-nonfinite": "test_run.py",
    "the GPU has too little memory for it": "engine/test_devices.py",
    "--set {}": "test_recipe_files.py",
    "states no base: give it with --base": "test_bake.py",
    "bake that into its base first, and give the result with --base": "test_bake.py",
    "which is not found: give it with --base": "test_bake.py",
    "give the model that it was made from with --base": "test_bake.py",
    "adapters' tables are not matched by token": "test_tokens.py",
    "or with --base and --rank, which factor": "test_extract.py",
    "--reduce-intruders is for adapters of linear layers": "test_reduced_intruders.py",
    "With --on-mismatch base such tensors are left out": "test_extract.py",
    "and --chat-template names it": "test_tokens.py",
    "gather them of each model with merge stats, and give the files with --stats": "statistics/test_collect.py",
    "gather it by merge stats with --fisher sampled": "statistics/test_collect.py",
    "no file of --stats holds its statistics": "statistics/test_collect.py",
    "which only a merge of models in files reads, with --stats": "statistics/test_collect.py",
    "{}: {}: {}: give --base": "the same as the base's refusal in planning, for what is planned without it",
}
"""Messages whose cases need other models, and the tests that hold them."""


@pytest.mark.parametrize("hint", HINTS)
def test_a_way_out_ends_in_a_merge(hint: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    refused, ways = HINTS[hint](tmp_path)
    with command_line_words(), pytest.raises(MergingError, match=re.escape(hint)):
        merging.merge(output=tmp_path / "refused", **refused)
    for number, way in enumerate(ways):
        merging.merge(output=tmp_path / f"out {number}", **way)


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_formats_that_hold_no_pair_of_denoisers_are_not_advised(format: str, tmp_path: Path) -> None:
    """Flat names do not tell Wan's two models apart, and PEFT's adapters are of one: diffusers' format is left."""
    names = {f"{part}.blocks.0.self_attn.q": (8, 8) for part in ("transformer", "transformer_2")}
    given = args(flat(tmp_path / "a.safetensors", names))
    with pytest.raises(MergingError, match=r'use format="diffusers"(, or kind="model")?$'):
        merging.merge(**given, format=format, output=tmp_path / "refused")
    merging.merge(**given, format="diffusers", output=tmp_path / "out")


def messages() -> Iterator[str]:
    """What refusals of planning and loading say that name an option to use; one to leave out is its own way out."""
    files = [path for folder in ("plan", "sources") for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in [*files, *(ROOT / each for each in ("engine/tiles.py", "engine/unit.py", "hub/open_model.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args or not _makes_error(node.func):
                continue
            parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            text = "".join(_spell(part) for part in parts)
            named = "--" in text or " wants the full model" in text  # of the option that the caller names
            if named and not re.search(r"leave (it|--[\w-]+) out$", text):
                yield text


def _spell(part: ast.expr) -> str:
    """A part of a message as the command line prints it, with {} for values that are not known yet."""
    if isinstance(part, ast.FormattedValue):
        call = part.value
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "option":
            return "{}"
        with command_line_words():
            known = [each.value for each in call.args if isinstance(each, ast.Constant)]
            return option(*known) if known else "{}"
    return str(part.value) if isinstance(part, ast.Constant) else "{}"


def _makes_error(function: ast.expr) -> bool:
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    return name.lower().endswith("error")


def test_every_way_out_is_walked() -> None:
    """A new message with an option in it wants a case above; one that is gone takes its own along."""
    known = [*HINTS, *ELSEWHERE]
    found = list(messages())
    assert [text for text in found if not any(part in text for part in known)] == []
    assert [part for part in known if not any(part in text for text in found)] == []
