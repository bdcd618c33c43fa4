"""What a rule about a program is, and the questions and ways out that several programs share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from merging.serving.subject import Subject, SubjectKind

__all__ = [
    "APART",
    "BAKE",
    "GRADIENTS",
    "ONE_SCALE",
    "PLAIN",
    "TABLES",
    "Program",
    "ProgramFinding",
    "Question",
    "Rule",
    "Severity",
    "absent",
    "convolutions",
    "lost_starts",
    "no_config",
    "no_tokenizer",
    "other_alphas",
    "other_ranks",
    "saved_tables",
    "starts",
    "stated_type",
    "states",
]

BAKE = "merge it into its base with --as model, and serve that"
ONE_SCALE = "merge it with --method passthrough, which writes one rank and one scale"
PLAIN = "merge it with --method passthrough if it is LoRA, else into its base with --as model"
"""What can be done about an adapter that a program does not take as it is."""

Severity = Literal["refuses", "ignores", "warns", "ok"]

Question = Callable[[Subject], Iterable[str]]
"""What is wrong, and where: nothing, where nothing is."""

GRADIENTS = "what LoRA-GA took off the base in training is not taken off, as in PEFT"
"""What programs do with an adapter whose start changed the base while it was trained, and not when it is loaded."""

TABLES = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
"""How the names of tables end that PEFT saves beside the factors on them."""

_HARMLESS: tuple[object, ...] = (None, False, {}, [], "", "none")

_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


@dataclass(frozen=True, slots=True)
class ProgramFinding:
    """What a program does with something: ``refuses`` it, ``ignores`` it in silence, ``warns`` at most, or all is ok.

    ``where`` are the fields of the config, modules or tensors concerned.
    """

    program: str
    severity: Severity
    what: str
    where: tuple[str, ...] = ()
    todo: str = ""
    source: str = ""
    """The version of the program, and the file or the run that the rule was taken from; empty for the files' own."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a program does where a question has answers, and what can be done about it.

    ``source`` is the program's file that the rule was read from; with ``, run`` behind it the program itself was also
    seen to do so.
    """

    severity: Severity
    what: str
    where: Question
    todo: str
    source: str = ""

    def findings(self, program: Program, subject: Subject) -> Iterator[ProgramFinding]:
        """The finding of this rule, if there is one."""
        where = tuple(self.where(subject))
        if where:
            source = f"{program.version}: {self.source}" if self.source else program.version
            yield ProgramFinding(program.name, self.severity, self.what, where, self.todo, source)


@dataclass(frozen=True, slots=True)
class Program:
    """A program that serves or loads: its rules by what it is given. What is not among them it does not take at all."""

    name: str
    rules: Mapping[SubjectKind, tuple[Rule, ...]]
    instead: Mapping[SubjectKind, str]
    """What to do with what it does not take."""
    version: str = ""
    """The version that the rules hold of; what older and newer ones do may differ."""

    def findings(self, subject: Subject) -> list[ProgramFinding]:
        """Everything that this program would refuse, ignore or warn of; where there is nothing, that all is ok."""
        if subject.kind not in self.rules:
            what = f"{self.name} loads no {subject.kind} of this format"
            instead = self.instead.get(subject.kind, "")
            return [ProgramFinding(self.name, "refuses", what, (subject.name,), instead, self.version)]
        found = [each for rule in self.rules[subject.kind] for each in rule.findings(self, subject)]
        return found or [ProgramFinding(self.name, "ok", "nothing is refused or ignored")]


def states(*fields: str) -> Question:
    """The fields of the config that state more than a harmless value."""

    def ask(subject: Subject) -> Iterator[str]:
        for name in fields:
            value = subject.stated.get(name)
            if not any(value is each or value == each for each in _HARMLESS):
                yield f"{name} = {value!r}"

    return ask


def absent(*fields: str) -> Question:
    """The fields that the config lacks, where there is a config."""

    def ask(subject: Subject) -> Iterator[str]:
        if subject.config is not None:
            yield from (f"{name} is missing" for name in fields if subject.config.get(name) is None)

    return ask


def no_config(subject: Subject) -> Iterator[str]:
    """What is no folder with a config."""
    if subject.folder is None:
        yield f"{subject.name} is a bare file"
    elif subject.config is None:
        yield f"no {'adapter_config.json' if subject.kind == 'adapter' else 'config.json'} in {subject.name}"


def no_tokenizer(subject: Subject) -> Iterator[str]:
    """A language model's folder without a tokenizer."""
    language = subject.folder is not None and "vocab_size" in subject.text_config
    if language and not any(name in subject.files for name in _TOKENIZERS):
        yield f"no {_TOKENIZERS[0]}, {_TOKENIZERS[1]} or the like in {subject.name}"


def lost_starts(subject: Subject) -> Iterator[str]:
    """A start that took something off the base: programs that know factors alone add them to the base as it is."""
    yield from starts("pissa", "olora", "corda", "loftq")(subject)


def starts(*names: str) -> Question:
    """A start of the factors whose name begins with one of these."""

    def ask(subject: Subject) -> Iterator[str]:
        start = subject.stated.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(names):
            yield f"init_lora_weights = {start!r}"

    return ask


def other_ranks(subject: Subject) -> Iterator[str]:
    """The modules whose rank is not the one that the config states for all."""
    stated = subject.stated.get("r")
    yield from (f"{path} has rank {rank}, r = {stated}" for path, rank in subject.ranks.items() if rank != stated)


def other_alphas(subject: Subject) -> Iterator[str]:
    """The entries of alpha_pattern that differ from the alpha for all."""
    pattern = subject.stated.get("alpha_pattern")
    for key, alpha in (pattern if isinstance(pattern, dict) else {}).items():
        if alpha != subject.stated.get("lora_alpha"):
            yield f"alpha_pattern: {key}: {alpha}"


def convolutions(subject: Subject) -> Iterator[str]:
    """The modules whose factors are those of a convolution."""
    for path, parts in subject.modules.items():
        if any(len(stored.shape) > 2 for stored in parts.values()):
            yield path


def saved_tables(subject: Subject) -> Iterator[str]:
    """The embeddings and heads of the base that were saved beside the factors on them."""
    yield from (name for name in subject.tensors if name.endswith(TABLES))


def stated_type(subject: Subject) -> Iterator[str]:
    """A type in a model's config that is not the type of most of its weights: loading them casts them."""
    stated = next((part[key] for part in (subject.text_config, subject.stated) for key in ("dtype", "torch_dtype")
                   if isinstance(part.get(key), str)), None)  # fmt: skip
    kinds: Counter[str] = Counter()
    for tensor in subject.tensors.values():
        if tensor.floating:
            kinds[tensor.dtype_name] += tensor.numel
    most = kinds.most_common(1)
    if stated in _TYPES and most and most[0][0] != _TYPES[stated]:
        yield f"most weights are {most[0][0]}, dtype = {stated!r}"


APART = f"give each expert its own names with --experts apart --base BASE, or {BAKE}"
"""What to do about factors of stacked experts where those of single ones are served."""
