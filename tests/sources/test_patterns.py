"""Patterns of configs match as in PEFT, and whatever they are, in bounded time."""

from __future__ import annotations

import random
import re
from itertools import product
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from merging.serving.peft import _targeted
from merging.serving.subject import Subject
from merging.sources.peft.patterns import PatternError, Patterns

PATHS = [
    *(
        f"{start}layers.{block}.{part}"
        for start, block, part in product(
            ("", "model.", "model.language_model.", "base.h."),
            (0, 1, 11),
            ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.3.down_proj", "norm"),
        )
    ),
    "q_proj", "xq_proj", "model.q_proj.linear", "lm_head", "layers_1_self_attn_q_proj", "h.0.attn.c_attn", "a.b", "a_b",
    "visual.blocks.2.attn.qkv", "transformer.single_transformer_blocks.1.proj_out", "Ünïcode.wörd_1.q_proj", "",
]  # fmt: skip

KEYS = [
    "q_proj", "layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj", "self_attn.q_proj", "a.b", "b",
    "^model.layers.1.mlp.up_proj", r"layers\.0\..*q_proj", r".*\.layers\.[01]\..*", r"layers\.(?:1|11)\.mlp\..+",
    r"self_attn\.(q|k)_proj", "q_proj|k_proj", r"(q|k)_proj$", r"\w+_proj", r"experts\.\d+\.down_proj", "[qk]_proj",
    r".*(?<!xq)_proj", r"(?!.*visual).*(qkv|proj)", r"^(model\.language_model(?=\.).*\.(q_proj|up_proj))$", "Q_PROJ",
    r"(?i:Q_PROJ)", r"layers\.\d{1,2}\.norm", r"(\w)\w*\.\1", r"layers_1.self.attn.q.proj", r"", r".", r"[^.]+",
    r"(?:.*?(?:visual|layers).*?(?:attn|mlp).*?(?:q_proj|qkv).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
    "layers.1.self_attn.q_proj.", ".q_proj", "proj_out", "single_transformer_blocks.1.proj_out", "a{1,3}.b",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_every_key_as_peft_has_it(key: str) -> None:
    patterns = Patterns()
    for path in PATHS:
        expected = re.match(rf"(.*\.)?({key})$", path)
        assert (patterns.first("f", [key], path) is not None) == bool(expected), path
        whole, start = re.fullmatch(key, path), re.match(key, path)
        for ours, theirs in ((patterns.match(key, path, whole=True), whole), (patterns.match(key, path), start)):
            assert (ours and (ours.span(), ours.groups())) == (theirs and (theirs.span(), theirs.groups())), path


def test_the_first_key_counts() -> None:
    """Names and expressions mixed, in any order."""
    generator = random.Random(5)
    for _ in range(150):
        keys = generator.sample(KEYS, generator.randint(1, len(KEYS)))
        patterns = Patterns()
        for path in PATHS:
            ours = patterns.first("rank_pattern", keys, path)
            assert (path if ours is None else ours) == get_pattern_key(keys, path), (keys, path)


def test_many_names_compile_nothing() -> None:
    """A dot in them matches any character, as in PEFT."""
    names = [
        f"model.layers.{block}.{part}" for block in range(80) for part in ("q", "k", "v", "o", "up", "gate", "down")
    ]
    patterns = Patterns()
    for name in names:
        assert patterns.first("rank_pattern", names, f"base.{name}") == name
        assert patterns.first("rank_pattern", names, name.replace(".", "_")) == name
        assert patterns.first("rank_pattern", names, f"x{name}") is None
    assert not patterns._compiled


HOSTILE = [
    "((a+))+[bc]",
    "(a|a)*[bc]",
    ".*a" * 25 + "[bc]",
    "(a?a?)" * 40 + "[bc]",
    r"(a|aa)*\1[bc]",
    "(a*)*(a|a)*[bc]",
]


@pytest.mark.parametrize("expression", HOSTILE)
def test_hostile_expressions_end(expression: str) -> None:
    """With the answer, or with a refusal; and once one is refused, all others of the same config are."""
    patterns = Patterns()
    try:
        for path in ["a" * 60, *(f"model.{'a' * count}" for count in (40, 60))] * 3:
            assert patterns.match(expression, path) is None
            assert patterns.first("f", [expression], path) is None
    except PatternError as error:
        assert "takes too long to match: write the names out" in str(error)
        with pytest.raises(PatternError):
            patterns.match("q_proj", "q_proj")


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("q_proj(", "is not a regular expression"),
        ("(?P<a", "is not a regular expression"),
        ("(" * 4000 + ")" * 4000, "is not a regular expression"),
        ("[[:alpha:]]", "is not a regular expression"),
        ("(q){e<=2}", "a brace that is not a count"),
        ("a{1000}{1000}", "too long"),
        ("(?:(?:(?:a{1000}){1000}){1000}){1000}b", "too long"),
        ("a{99999999999999999999}", "too long"),
        ("a+" * 6000, "too long"),
    ],
)
def test_expressions_that_are_refused(expression: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason):
        Patterns().match(expression, "aaaa")


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": r".*layers\.1\..*(q|down)_proj"},
    {"target_modules": r"^(model\.language_model(?=\.).*\.(q_proj|up_proj))$"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["self_attn.q_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0.*"},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 3]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [3], "layers_pattern": ["experts", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": r"lay\w+"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h|layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [11], "layers_pattern": []},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=repr)
def test_targets_as_peft_finds_them(fields: dict[str, Any]) -> None:
    config = LoraConfig(**fields)
    subject = Subject(
        name="a",
        pinned="a",
        kind="adapter",
        tensors={},
        metadata={},
        config={"peft_type": "LORA", **fields},
        files=frozenset(),
        weights=None,
        folder=None,
    )
    for path in PATHS:
        found = check_target_module_exists(config, path)
        theirs = bool(found) and type(found).__name__ != "_ExcludedModule"
        assert _targeted(path, subject) == theirs, path
