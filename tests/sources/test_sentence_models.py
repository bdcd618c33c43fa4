"""Folders of sentence-transformers, saved, merged and loaded by it: the mean model gives the same outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

import merging
from merging.errors import FormatError
from merging.hub.open_model import open_model
from support.commands import ok

Model = SentenceTransformer | CrossEncoder | SparseEncoder
TEXTS = ["a b c", "d e f g"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **special)


def encoder(folder: Path, kind: Any = BertModel, **settings: Any) -> str:
    """A tiny encoder as transformers saves it."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    kind(BertConfig(**sizes, vocab_size=len(WORDS), **settings)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def plain(folder: Path) -> Model:
    return SentenceTransformer(modules=[modules.Transformer(encoder(folder)), modules.Pooling(16, "cls")])


def dense(folder: Path) -> Model:
    parts = [modules.Transformer(encoder(folder)), modules.Pooling(16), modules.Dense(16, 8), modules.Normalize()]
    prompts = {"query": "a b ", "document": "c "}
    return SentenceTransformer(modules=parts, prompts=prompts, default_prompt_name="query", similarity_fn_name="dot")


def layer_norm(folder: Path) -> Model:
    parts = [modules.Transformer(encoder(folder)), modules.Pooling(16), modules.LayerNorm(16), modules.Dropout(0.1)]
    return SentenceTransformer(modules=parts)


def static(folder: Path) -> Model:
    return SentenceTransformer(modules=[modules.StaticEmbedding(tokenizer(), embedding_dim=16)])


def router(folder: Path) -> Model:
    """Queries by a table, documents by an encoder."""
    documents = [modules.Transformer(encoder(folder)), modules.Pooling(16), modules.Dense(16, 16)]
    queries = [modules.StaticEmbedding(tokenizer(), embedding_dim=16)]
    return SentenceTransformer(modules=[modules.Router.for_query_document(queries, documents)])


def late_router(folder: Path) -> Model:
    """One encoder, and a dense module each for queries and documents."""
    routes = modules.Router.for_query_document([modules.Dense(16, 8)], [modules.Dense(16, 8)])
    return SentenceTransformer(modules=[modules.Transformer(encoder(folder)), modules.Pooling(16), routes])


def cross(folder: Path) -> Model:
    return CrossEncoder(encoder(folder, BertForSequenceClassification, num_labels=1))


def cross_classes(folder: Path) -> Model:
    return CrossEncoder(encoder(folder, BertForSequenceClassification, num_labels=3))


def sparse(folder: Path) -> Model:
    return SparseEncoder(modules=[MLMTransformer(encoder(folder, BertForMaskedLM)), SpladePooling()])


KINDS = (plain, dense, layer_norm, static, router, late_router, cross, cross_classes, sparse)


def save(make: Callable[[Path], Model], folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = make(folder.with_name(f"{folder.name}-encoder"))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return folder


def load(make: Callable[[Path], Model], folder: Path) -> Model:
    kind = {cross: CrossEncoder, cross_classes: CrossEncoder, sparse: SparseEncoder}.get(make, SentenceTransformer)
    return kind(str(folder), device="cpu")  # type: ignore[no-any-return]


def outputs(model: Model) -> torch.Tensor:
    """The scores of pairs, or what queries, documents and other texts are encoded to."""
    if isinstance(model, CrossEncoder):
        return torch.tensor(model.predict([("a b", "c d"), ("e", "f g h")]))
    calls: Any = (model.encode, model.encode_query, model.encode_document)
    found = [call(TEXTS, convert_to_tensor=True) for call in calls]
    return torch.stack([each.to_dense() if each.is_sparse else each for each in found])


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_the_mean_of_two(make: Callable[[Path], Model], tmp_path: Path) -> None:
    """Every file of the folder comes out, and the outputs equal those of the mean of all parameters in memory."""
    one, two = (save(make, tmp_path / f"m{seed}", seed) for seed in (1, 2))
    merged = merging.merge([one, two], method="linear", output=tmp_path / "out")
    assert not merged.notices
    assert files(tmp_path / "out") == files(one)
    wanted, other = load(make, one), load(make, two).state_dict()
    separate = outputs(wanted)
    state = wanted.state_dict()
    wanted.load_state_dict({name: (value + other[name]) / 2 for name, value in state.items()})
    got = load(make, tmp_path / "out")
    assert torch.allclose(outputs(got), outputs(wanted), rtol=0, atol=1e-5)
    assert not torch.allclose(outputs(got), separate, rtol=0, atol=1e-3)
    if not isinstance(got, CrossEncoder) and not isinstance(wanted, CrossEncoder):
        assert (got.prompts, got.similarity_fn_name) == (wanted.prompts, wanted.similarity_fn_name)


def test_a_router_is_replaced_and_merged_in_other_types(tmp_path: Path) -> None:
    """Its folders belong to it, so that the whole output can be replaced."""
    paths = [save(late_router, tmp_path / f"m{seed}", seed) for seed in (1, 2)]
    for dtype in ("float32", "bfloat16"):
        merging.merge(paths, method="linear", output=tmp_path / "out", dtype=dtype, overwrite=True)
        assert outputs(load(late_router, tmp_path / "out")).shape == (3, 2, 8)
    part = ["--component", "2_Router/query_0_Dense"]
    ok("-m", "linear", *part, *paths, "-o", tmp_path / "part")
    same = [tmp_path / "part", paths[0]]
    for name, equal in (("2_Router/document_0_Dense", True), ("2_Router/query_0_Dense", False)):
        one, other = ((path / name / "model.safetensors").read_bytes() for path in same)
        assert (one == other) is equal


def test_lists_of_routers_that_are_not_understood(tmp_path: Path) -> None:
    folder = save(router, tmp_path / "m", 1)
    listed = json.loads((folder / "router_config.json").read_text())
    for types, message in (
        ({"../out": "x.Dense"}, "'../out' is not a plain name of a folder"),
        ({"a/b/c": "x.Dense"}, "is not a plain name of a folder"),
        ([], "is not a router's list of modules"),
    ):
        (folder / "router_config.json").write_text(json.dumps({**listed, "types": types}))
        with pytest.raises(FormatError, match=message):
            open_model(folder)


def test_a_plain_base_gets_the_modules_of_the_first_model(tmp_path: Path) -> None:
    """Fine-tunes of an encoder that knows no pooling: without theirs, the mean would be taken instead of a token."""
    paths = [save(plain, tmp_path / f"m{seed}", seed) for seed in (1, 2)]
    base = tmp_path / "m1-encoder"
    merging.merge(paths, method="task_arithmetic", base=base, scale=0.5, output=tmp_path / "out")
    merging.merge(paths, method="linear", output=tmp_path / "mean")
    assert files(tmp_path / "out") >= files(tmp_path / "mean")
    got, wanted = (outputs(load(plain, tmp_path / name)) for name in ("out", "mean"))
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)


def test_other_modules_are_noticed(tmp_path: Path) -> None:
    """Pooling cannot be merged: the output has the first model's, and says so. Former versions' words mean the same."""
    one, two = (save(plain, tmp_path / f"m{seed}", seed) for seed in (1, 2))
    former = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (two / "1_Pooling" / "config.json").write_text(json.dumps(former))
    assert merging.merge([one, two], method="linear", output=tmp_path / "same").notices == ()
    former |= {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (two / "1_Pooling" / "config.json").write_text(json.dumps(former))
    (notice,) = merging.merge([one, two], method="linear", output=tmp_path / "other").notices
    assert notice == (
        f"{two} has Pooling (pooling_mode mean) where {one} has Pooling (pooling_mode cls): the output has the latter"
    )
    listed = json.loads((two / "modules.json").read_text())
    shutil.copy(one / "1_Pooling" / "config.json", two / "1_Pooling" / "config.json")
    normalize = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
    (two / "modules.json").write_text(json.dumps([*listed, normalize]))
    (notice,) = merging.merge([one, two], method="linear", output=tmp_path / "normalized").notices
    assert notice == f"{two} has a module Normalize where {one} has none: the output has the latter"
