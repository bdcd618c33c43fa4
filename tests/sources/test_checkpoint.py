"""Full checkpoints as they are found: files, shards, PyTorch's pickles, and all that must be refused by name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merging
from merging.errors import FormatError, InputError
from merging.hub.open_model import open_model
from merging.sources.checkpoint import Checkpoint, content_key, open_checkpoint
from merging.sources.quantized_weights import QUANTIZED
from support.tiny import CONFIG, checkpoint, fine_tune, identical, load, model, save

INDEX = "model.safetensors.index.json"


def edit_index(folder: Path, **fields: Any) -> None:
    """Replace fields of a folder's index; None removes one."""
    index = json.loads((folder / INDEX).read_text()) | fields
    (folder / INDEX).write_text(json.dumps({key: value for key, value in index.items() if value is not None}))


def weight_map(folder: Path) -> dict[str, str]:
    """What a folder's index says lies where."""
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def values(opened: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors of an opened checkpoint."""
    return {name: stored.read() for name, stored in opened.tensors.items()}


# ---- one file, several files


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_it_was_saved(tmp_path: Path, shards: int) -> None:
    tensors = model(1)
    opened = open_checkpoint(save(tmp_path / "m", tensors, shards=shards))
    assert identical(values(opened), tensors)
    assert len(opened.files) == shards
    assert opened.config == CONFIG
    assert not opened.tied


def test_file_and_index_are_opened_like_their_folder(tmp_path: Path) -> None:
    single, sharded = save(tmp_path / "one", model(1)), save(tmp_path / "two", model(2), shards=2)
    for path in (single / "model.safetensors", sharded / INDEX):
        opened = open_model(path)
        assert isinstance(opened, Checkpoint)
        assert (opened.folder, opened.config) == (path.parent, CONFIG)


def test_a_bare_file_has_no_config(tmp_path: Path) -> None:
    save_file(model(1), tmp_path / "weights.safetensors")
    opened = open_checkpoint(tmp_path / "weights.safetensors")
    assert (opened.folder, opened.config, opened.layers) == (None, {}, None)


def test_single_file_wins_over_index(tmp_path: Path) -> None:
    """As in transformers, where both lie side by side."""
    folder = save(tmp_path / "m", model(1), shards=2)
    save(folder, model(2))
    assert identical(values(open_checkpoint(folder)), model(2))


def test_pieces_of_a_tensor_are_read_at_their_place(tmp_path: Path) -> None:
    tensors = model(1)
    stored = open_checkpoint(save(tmp_path / "m", tensors)).tensors["lm_head.weight"]
    piece = torch.empty(7)
    stored.read_into(piece, 20)
    assert torch.equal(piece, tensors["lm_head.weight"].flatten()[20:27])


def test_shard_with_a_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    listed = weight_map(folder)
    shard = listed.pop("model.norm.weight")
    edit_index(folder, weight_map=listed)
    with pytest.raises(FormatError, match=rf"{shard}: holds model\.norm\.weight, which the index does not list"):
        open_checkpoint(folder)


def test_index_that_lists_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    listed = weight_map(folder)
    edit_index(folder, weight_map=listed | {"model.extra.weight": listed["model.norm.weight"]})
    with pytest.raises(FormatError, match=r"lacks model\.extra\.weight.*different saves"):
        open_checkpoint(folder)


def test_tensor_listed_in_the_wrong_shard(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    listed = weight_map(folder)
    other = next(shard for shard in listed.values() if shard != listed["model.norm.weight"])
    edit_index(folder, weight_map=listed | {"model.norm.weight": other})
    with pytest.raises(FormatError, match=r"model\.norm\.weight"):
        open_checkpoint(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(1), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match=r"its shard model-00002-of-00003\.safetensors is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shard", ["../m/model.safetensors", "/etc/passwd", "a\\b", "", ".", "..", 7, None])
def test_shards_must_be_plain_file_names(tmp_path: Path, shard: object) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    edit_index(folder, weight_map=weight_map(folder) | {"model.norm.weight": shard})
    with pytest.raises(FormatError, match=re.escape(f"said to be in {shard!r}, which is not a plain file name")):
        open_checkpoint(folder)


@pytest.mark.parametrize("given", [None, {}, [1], "all"])
def test_index_without_weight_map(tmp_path: Path, given: object) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    edit_index(folder, weight_map=given)
    with pytest.raises(FormatError, match="has no weight_map"):
        open_checkpoint(folder)


def test_index_without_metadata_is_read(tmp_path: Path) -> None:
    """Nothing in it is needed, although transformers stumbles over its absence."""
    folder = save(tmp_path / "m", model(1), shards=2)
    edit_index(folder, metadata=None)
    assert identical(values(open_checkpoint(folder)), model(1))


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "not valid JSON"), ("[1]", "holds a list"), ("[" * 99999, "not valid JSON")]
)
def test_index_and_config_that_are_no_json_object(tmp_path: Path, text: str, reason: str) -> None:
    folder = save(tmp_path / "m", model(1), shards=2)
    (folder / INDEX).write_text(text)
    with pytest.raises(FormatError, match=f"{INDEX}.*{reason}"):
        open_checkpoint(folder)
    single = save(tmp_path / "n", model(1))
    (single / "config.json").write_text(text)
    with pytest.raises(FormatError, match=f"config.json.*{reason}"):
        open_checkpoint(single)


def test_folder_with_no_weights_or_several(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no weights: none of model.safetensors"):
        open_checkpoint(tmp_path / "empty")
    for name in ("x.safetensors", "y.safetensors"):
        save_file(model(1), tmp_path / "empty" / name)
    with pytest.raises(InputError, match=r"holds x\.safetensors, y\.safetensors: name the file"):
        open_checkpoint(tmp_path / "empty")


def test_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="holds no tensors"):
        open_checkpoint(tmp_path / "none.safetensors")


def test_missing_path_and_hub_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder, and no such model in the Hub"):
        open_model("org/name")
    with pytest.raises(InputError, match=r"no such file or folder$"):
        open_model(tmp_path / "nothing.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match="is not a weights file"):
        open_model(tmp_path / "notes.txt")


# ---- PyTorch's files


def torch_folder(folder: Path, state: Any, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """A folder with pytorch_model.bin."""
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin", **options)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def tied_state() -> dict[str, torch.Tensor]:
    """A state dict whose head is its embedding, as torch saves it."""
    state = model(1)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def test_pickled_tensors_are_read(tmp_path: Path) -> None:
    tensors = model(1, dtype=torch.bfloat16)
    assert identical(values(open_checkpoint(torch_folder(tmp_path / "m", tensors))), tensors)
    assert identical(values(open_checkpoint(torch_folder(tmp_path / "n", {"state_dict": tensors}))), tensors)


def test_tied_weights_are_dropped_when_tied(tmp_path: Path) -> None:
    opened = open_checkpoint(torch_folder(tmp_path / "m", tied_state(), {"tie_word_embeddings": True}))
    assert opened.tensors.keys() == tied_state().keys() - {"lm_head.weight"}
    assert opened.lookup("lm_head.weight") is opened.tensors["model.embed_tokens.weight"]


def test_tied_weights_are_kept_when_the_config_unties_them(tmp_path: Path) -> None:
    """Otherwise the head would be missing, and transformers would draw it at random."""
    opened = open_checkpoint(torch_folder(tmp_path / "m", tied_state(), {"tie_word_embeddings": False}))
    assert opened.tensors.keys() == tied_state().keys()
    assert opened.shared == {"lm_head.weight": "model.embed_tokens.weight"}


def test_views_of_one_storage_that_differ_are_not_tied(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    state = {"a": whole[:6], "b": whole[6:], "c": whole.view(3, 4)}
    assert identical(values(open_checkpoint(torch_folder(tmp_path / "m", state))), state)


def test_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    state = {"x.weight": torch.arange(12.0).view(3, 4).mT}
    opened = open_checkpoint(torch_folder(tmp_path / "m", state))
    assert torch.equal(opened.tensors["x.weight"].read(), state["x.weight"])


def test_pickled_shards(tmp_path: Path) -> None:
    tensors = model(1)
    parts = {"a.bin": dict(list(tensors.items())[:3]), "b.bin": dict(list(tensors.items())[3:])}
    for name, part in parts.items():
        torch.save(part, tmp_path / name)
    listed = {key: name for name, part in parts.items() for key in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    assert identical(values(open_checkpoint(tmp_path)), tensors)


class Payload:
    """Leaves a file behind if it is unpickled without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    folder = torch_folder(tmp_path / "m", {**model(1), "x": Payload(tmp_path / "trace")})
    with pytest.raises(FormatError, match="holds more than tensors, and nothing in it is run"):
        open_model(folder)
    assert not (tmp_path / "trace").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists(), "the payload is armed"


@pytest.mark.parametrize("keep", [0, 100, -1, -200])
def test_truncated_pickle(tmp_path: Path, keep: int) -> None:
    folder = torch_folder(tmp_path / "m", model(1))
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: is (not|a damaged)"):
        open_model(folder)


def test_pickle_of_the_old_format(tmp_path: Path) -> None:
    folder = torch_folder(tmp_path / "m", model(1), _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="cannot be read lazily: load and save it as safetensors first"):
        open_model(folder)


@pytest.mark.parametrize("state", [[1, 2], {"epoch": 3, "x": torch.zeros(2)}, torch.zeros(3)])
def test_pickle_of_something_else(tmp_path: Path, state: object) -> None:
    with pytest.raises(FormatError, match="not a state dict"):
        open_model(torch_folder(tmp_path / "m", state))


def test_pickles_merge_like_safetensors(tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path)
    pickled = [torch_folder(tmp_path / f"bin{i}", load(path), CONFIG) for i, path in enumerate(tuned)]
    merging.merge(tuned, method="linear", base=base, output=tmp_path / "one")
    merging.merge(pickled, method="linear", base=base, output=tmp_path / "other")
    assert identical(load(tmp_path / "one"), load(tmp_path / "other"))


# ---- quantised

CODES = torch.zeros(4, dtype=torch.uint8)
NAMES = {
    key: f"model.layers.0.mlp{key}" if key.startswith(".") else f"model.layers.0.mlp.gate{key}" for key in QUANTIZED
}


@pytest.mark.parametrize("ending", QUANTIZED)
def test_quantised_by_the_name_of_a_tensor(tmp_path: Path, ending: str) -> None:
    folder = save(tmp_path / "m", {**model(1), NAMES[ending]: CODES})
    with pytest.raises(FormatError, match=re.escape(f"is quantised ({QUANTIZED[ending]}, says {NAMES[ending]})")):
        open_model(folder)


ON_DISK = {
    "bitsandbytes 4-bit": ("mlp.weight", "mlp.weight.absmax", "mlp.weight.quant_state.bitsandbytes__nf4"),
    "bitsandbytes 8-bit": ("mlp.weight", "mlp.SCB", "mlp.weight_format"),
    "GPTQ or AWQ": ("mlp.qweight", "mlp.qzeros", "mlp.scales", "mlp.g_idx"),
    "block FP8": ("mlp.weight_scale_inv",),
    "compressed-tensors": ("mlp.weight_packed", "mlp.weight_shape"),
    "MXFP4": ("experts.gate_up_proj_blocks", "experts.gate_up_proj_scales"),
    "HQQ": ("mlp.W_q",),
    "AQLM": ("mlp.codes", "mlp.codebooks"),
}


@pytest.mark.parametrize("kind", ON_DISK)
def test_quantised_by_what_such_files_hold_together(tmp_path: Path, kind: str) -> None:
    folder = save(tmp_path / "m", {f"model.layers.0.{name}": CODES.clone() for name in ON_DISK[kind]})
    with pytest.raises(FormatError, match=re.escape(kind)):
        open_model(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_quantised_by_type(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save(tmp_path / "m", {"layer.weight": torch.zeros(4, 4).to(dtype)})
    with pytest.raises(FormatError, match=r"layer\.weight holds F8_.* codes, so the model is quantised"):
        open_model(folder)


@pytest.mark.parametrize("inner", [False, True])
def test_quantised_by_config(tmp_path: Path, inner: bool) -> None:
    stated: dict[str, Any] = {"quantization_config": {"quant_method": "gptq"}}
    folder = save(tmp_path / "m", model(1), {"text_config": stated} if inner else stated)
    with pytest.raises(FormatError, match=r"is quantised \(gptq, says its config\): merge the model it was made from"):
        open_model(folder)


def test_ordinary_names_are_not_taken_for_quantised(tmp_path: Path) -> None:
    tensors = {
        f"model.{name}": torch.zeros(2) for name in ("transformer_blocks.0.scale", "blocks", "absmax_pool.weight")
    }
    assert len(open_checkpoint(save(tmp_path / "m", tensors)).tensors) == 3


# ---- what checkpoints of one model may differ in


def merged(paths: list[Path], output: Path, **options: Any) -> dict[str, torch.Tensor]:
    """A linear merge, loaded."""
    merging.merge(paths, method="linear", output=output, **options)
    return load(output)


def mean(*models: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The average, tensor by tensor, in the first model's types."""
    return {
        name: (sum(each[name].double() for each in models) / len(models)).to(value.dtype)
        for name, value in models[0].items()
    }


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal names, shapes and types, and values equal but for rounding."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.allclose(value.double(), other[name].double(), atol=1e-6, rtol=1e-2)
        for name, value in one.items()
    )


def test_mixed_dtypes_are_the_first_models(tmp_path: Path) -> None:
    one, two = model(1, dtype=torch.bfloat16), model(2, dtype=torch.float16)
    one["model.norm.weight"] = one["model.norm.weight"].double()
    got = merged([save(tmp_path / "a", one), save(tmp_path / "b", two)], tmp_path / "out")
    assert close(got, mean(one, two))


@pytest.mark.parametrize("differs", [False, True])
def test_integers_are_the_bases_with_a_notice_if_they_differ(tmp_path: Path, differs: bool) -> None:
    base = {**model(0), "position_ids": torch.arange(5), "mask": torch.tensor([True, False])}
    tuned = fine_tune(base, 1)
    if differs:
        tuned["position_ids"] = tuned["position_ids"] + 1
    paths = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    done = merging.merge([paths[1]], method="task_arithmetic", base=paths[0], output=tmp_path / "out")
    got = load(tmp_path / "out")
    assert torch.equal(got["position_ids"], base["position_ids"])
    assert torch.equal(got["mask"], base["mask"])
    said = [notice for notice in done.notices if "integers are not merged" in notice]
    assert len(said) == differs
    assert all("position_ids of" in notice and str(paths[1]) in notice for notice in said)


def untied(seed: int) -> dict[str, torch.Tensor]:
    return model(seed)


def without_head(seed: int) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model(seed).items() if name != "lm_head.weight"}


TIED = CONFIG | {"tie_word_embeddings": True}


@pytest.mark.parametrize("first_is_tied", [False, True])
def test_tied_and_untied_heads(tmp_path: Path, first_is_tied: bool) -> None:
    """A tied head is its embedding, and the result has a head of its own, which its config says."""
    paths = [save(tmp_path / "untied", untied(1)), save(tmp_path / "tied", without_head(2), TIED)]
    got = merged(paths[::-1] if first_is_tied else paths, tmp_path / "out")
    tied = without_head(2)
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"]
    assert close(got, mean(untied(1), tied))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"tied{seed}", without_head(seed), TIED) for seed in (1, 2)]
    assert close(merged(paths, tmp_path / "out"), mean(without_head(1), without_head(2)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_missing_head_of_an_untied_model(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a", untied(1)), save(tmp_path / "b", without_head(2))]
    with pytest.raises(InputError, match=r"b lacks lm_head\.weight"):
        merged(paths, tmp_path / "out")


@pytest.mark.parametrize("more_first", [False, True])
@pytest.mark.parametrize("prefix", ["model.", "language_model."])
def test_prefix_drift(tmp_path: Path, more_first: bool, prefix: str) -> None:
    """The same network, saved with and without a wrapper: the names of the first come out."""
    one, two = model(1), model(2)
    paths = [
        save(tmp_path / "a", {prefix + name if more_first else name: value for name, value in one.items()}),
        save(tmp_path / "b", {name if more_first else prefix + name: value for name, value in two.items()}),
    ]
    want = {prefix + name if more_first else name: value for name, value in mean(one, two).items()}
    assert close(merged(paths, tmp_path / "out"), want)


BERT = {
    "bert.encoder.layer.0.output.dense.weight": (4, 4),
    "bert.encoder.layer.0.output.LayerNorm.weight": (4,),
    "bert.encoder.layer.0.output.LayerNorm.bias": (4,),
}
OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def bert(seed: int, old: bool, prefix: str = "bert.") -> dict[str, torch.Tensor]:
    """A block of BERT, with the names of 2018 or today's."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in BERT.items():
        for new, legacy in OLD.items() if old else ():
            name = name.replace(new, legacy)
        tensors[prefix + name.removeprefix("bert.")] = torch.randn(shape, generator=random)
    return tensors


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("first_is_old", [False, True])
def test_old_names_of_norms(tmp_path: Path, first_is_old: bool, prefix: str) -> None:
    """bert-base-uncased still has them, and its fine-tunes do not."""
    paths = [save(tmp_path / "a", bert(1, first_is_old)), save(tmp_path / "b", bert(2, not first_is_old, prefix))]
    got = merged(paths, tmp_path / "out")
    assert close(got, mean(bert(1, first_is_old), bert(2, first_is_old)))


def spoiled(tmp_path: Path, kind: str) -> tuple[list[Path], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two models the second of which does not fit in one tensor."""
    one, two = model(1), model(2)
    if kind == "shape":
        two["lm_head.weight"] = torch.zeros(13, 8)
    elif kind == "missing":
        del two["model.layers.1.mlp.up_proj.weight"]
    elif kind == "type":
        two["model.norm.weight"] = torch.zeros(8, dtype=torch.int64)
    else:
        two["model.layers.1.mlp.up_proj.bias"] = torch.zeros(16)
    return [save(tmp_path / "a", one), save(tmp_path / "b", two)], one, two


MISMATCHES = {
    "shape": ("lm_head.weight", r"lm_head\.weight of \S*b has the shape \(13, 8\) instead of \(12, 8\)"),
    "missing": ("model.layers.1.mlp.up_proj.weight", r"b lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "type": ("model.norm.weight", r"model\.norm\.weight of \S*b has the type I64"),
    "extra": ("", r"b has model\.layers\.1\.mlp\.up_proj\.bias, which the other lacks"),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_mismatch_is_an_error_that_names_tensor_and_file(tmp_path: Path, kind: str) -> None:
    paths, _, _ = spoiled(tmp_path, kind)
    with pytest.raises(InputError, match=f"{MISMATCHES[kind][1]}.*--on-mismatch base"):
        merged(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", MISMATCHES)
def test_mismatch_can_keep_the_bases(tmp_path: Path, kind: str) -> None:
    paths, one, two = spoiled(tmp_path, kind)
    odd = MISMATCHES[kind][0]
    got = merged(paths, tmp_path / "out", on_mismatch="base")
    kept = {name: one[name] if name == odd else two[name] for name in one}
    assert close(got, mean(one, kept))


@pytest.mark.parametrize("first", ["smaller", "larger"])
def test_tensors_left_to_the_base_are_counted_and_named(tmp_path: Path, first: str) -> None:
    """Whichever model comes first: the tensors of blocks that the other lacks are not dropped in silence."""
    larger = model(1)
    odd = sorted(name for name in larger if ".layers." in name)
    smaller = {name: value for name, value in larger.items() if name not in odd}
    paths = {"smaller": save(tmp_path / "smaller", smaller), "larger": save(tmp_path / "larger", larger)}
    order = [first, *({"smaller", "larger"} - {first})]
    plan = merging.preview([paths[name] for name in order], method="linear", on_mismatch="base")
    lines = "\n".join([*plan.matched, *plan.notices])
    assert f"{order[1]}: {len(smaller)} of {len(larger)} tensors matched" in lines
    what = f"differ are {order[0]}'s" if first == "larger" else f"{paths['smaller']} lacks are left out"
    assert f"{len(odd)} tensors that {what} (--on-mismatch base" in lines
    assert all(name in lines for name in odd[:3])
    assert f"and {len(odd) - 3} more" in lines
    assert len(plan.items) == len(larger if first == "larger" else smaller)


def test_a_single_shard_is_no_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", model(1), shards=3)
    shard = folder / "model-00001-of-00003.safetensors"
    with pytest.raises(
        InputError, match=rf"is one of several shards of a model by its name: name their folder, {folder}"
    ):
        open_checkpoint(shard)
    assert open_checkpoint(folder).tensors.keys() == model(1).keys()


def test_unrelated_models_are_refused(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a", model(1)), save(tmp_path / "b", bert(1, False))]
    with pytest.raises(InputError, match=r"do not hold the same tensors as \S*a: .* more"):
        merged(paths, tmp_path / "out")


def test_content_keys_tell_models_apart(tmp_path: Path) -> None:
    """Also two that differ only in the middle of a large file, as fine-tunes of a few layers do."""
    tensors = {f"layers.{i}.weight": torch.zeros(64, 1024) for i in range(4)}
    other = tensors | {"layers.2.weight": torch.ones(64, 1024)}
    keys = [
        content_key(open_checkpoint(save(tmp_path / f"m{i}", t)).tensors)
        for i, t in enumerate([tensors, other, tensors])
    ]
    assert keys[0] == keys[2] != keys[1]
