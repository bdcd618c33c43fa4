"""Addresses, queries and recipes that were harmed."""

from __future__ import annotations

import warnings
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fuzzing.corpus import Corpus
from fuzzing.mutation import STRANGE, dumped, json_harmed, text_harmed
from fuzzing.sample import Sample
from merging.hub.address import hub_address
from merging.hub.open_model import open_model
from merging.hub.query import parse_query
from merging.plan.recipe_files import load_recipe

# --- words


_NAMES = (
    "org/name", "org/name@main", "hf://org/name", "hf://org/name@abc123/folder/file.safetensors",
    "org/name@refs/pr/3", "https://huggingface.co/org/name", "https://huggingface.co/org/name/tree/main",
    "https://hf.co/org/name/blob/main/a.safetensors", "http://localhost/org/name", "model", "./model", "/abs/model",
    "a/b/c", "~/x",
)  # fmt: skip


_MARKS = (
    "@",
    "/",
    "//",
    "hf://",
    "https://",
    ":",
    "..",
    "%2f",
    "%00",
    "%",
    "[",
    "]",
    "[::1]",
    "#",
    "?",
    "@@",
    "~root/",
    "~nobody",
    "\\",
    *STRANGE,
)


def make_address(random: Random, corpus: Corpus) -> Sample:
    return Sample(words={"name": text_harmed(random, random.choice(_NAMES), _MARKS)})


def read_address(folder: Path, words: dict[str, Any], corpus: Corpus) -> None:
    address = hub_address(words["name"])
    if address is not None:
        assert hub_address(f"hf://{address}") == address  # what it prints means the same
        assert ".." not in address.path.split("/") and not address.path.startswith("/")
    else:
        open_model(words["name"])


def make_query(random: Random, corpus: Corpus) -> Sample:
    texts = (
        "hub:base=org/name,limit=5",
        "hub:author=me",
        "hub:tag=lora,sort=downloads",
        "hub:search=word,limit=100000",
    )
    marks = ("=", ",", "hub:", "limit=", "base=", "٣", "²", "1e3", "-1", "0", "9" * 5000, *STRANGE)
    return Sample(words={"query": text_harmed(random, random.choice(texts), marks)})


def read_query(folder: Path, words: dict[str, Any], corpus: Corpus) -> None:
    query = parse_query(words["query"])
    if query is not None:
        assert 0 < query.limit <= 100_000
        str(query)


_RECIPES = (
    "models: [a, b]\nmethod: linear\nparameters:\n  weights: [0.3, 0.7]\n",
    "models: [a]\nmethod: lines+ties\nbase: base\nparameters: {density: {mlp: 0.3, '*': 0.1:0.4}, lines.alpha: 0.5}\n",
    "models:\n- a\n- b\nmethod: slerp\nparameters:\n  t: 0.5\ndtype: bfloat16\nexclude: ['*norm*']\nshard_size: 1000\n",
    "models: [a, b]\nmethod: dare+ties\nbase: base\nas: model\nparameters: {drop: 0.5, seed: 3}\non_mismatch: base\n",
    "merge_method: ties\nbase_model: b\nmodels:\n- {model: b}\n- model: a+l\n  parameters: "
    "{weight: [1, 0.5], density: 1}\n",
    "merge_method: slerp\nbase_model: a\nslices:\n- sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: "
    "[0, 4]}]\nparameters:\n  t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]\ntokenizer: {source: union, tokens: {x: "
    "{source: {kind: zero}, force: true}}}\n",
    "merge_method: passthrough\nmodules:\n  default:\n    slices:\n    - sources: [{model: {path: a}, layer_range: [0, "
    "4], parameters: {scale: 2}}]\ndtype: float16\n",
)


_YAML = (
    ": ", "- ", "\n", "  ", "&a ", "*a", "<<: *a", "!!python/object/apply:os.system ['true']", "!!binary x",
    "!!set {a}", "!!timestamp 2001-99-99", "2001-99-99", "0o9", "0b2", "0x", "1:2:3", ".inf", ".nan", "~", "[", "]",
    "{", "}", "?", "|", ">", "!!int x", "!!float x", "--- ", "...", "%YAML 9.9", "'", '"', "\t", "1e400", "9" * 5000,
    "[" * 2000, "{a: " * 500, "? [a]\n: b", *STRANGE,
)  # fmt: skip


def make_recipe_text(random: Random, corpus: Corpus) -> Sample:
    if random.random() < 0.5:
        text = text_harmed(random, random.choice(_RECIPES), _YAML)
    else:
        words = (
            "models", "method", "base", "parameters", "dtype", "rank", "exclude", "layers", "kind", "as", "format",
            "weights", "density", "ties", "linear", "lines.alpha", "components", "shard_size", "vocabulary",
            "lora_alpha", "merge_method", "base_model", "slices", "modules", "sources", "layer_range", "model",
            "filter", "value", "weight", "tokenizer", "tokens", "name", "stack", "lora", "path",
        )  # fmt: skip
        tree = json_harmed(random, yaml.safe_load(random.choice(_RECIPES)), words)
        text = dumped(random, tree).decode("utf-8", "replace")
    return Sample(words={"recipe": text})


def read_recipe(folder: Path, words: dict[str, Any], corpus: Corpus) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = load_recipe(words["recipe"], lenient=len(words["recipe"]) % 2 == 0)
    assert load_recipe(recipe.to_yaml()) == recipe
    recipe.method.check(len(recipe.models))
