"""The form of a rule about a program, and the questions and remedies that several programs share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from merging.display.tables import Displayed, Table, Tabular
from merging.errors import either, name_options
from merging.serving.subject import Subject, SubjectKind

__all__ = [
    "APART",
    "BAKE",
    "GRADIENTS",
    "ONE_SCALE",
    "PLAIN",
    "SAVE_AGAIN",
    "SMILE",
    "TABLES",
    "Program",
    "ProgramFinding",
    "Question",
    "Rule",
    "ServingVerdict",
    "Severity",
    "absent",
    "convolutions",
    "lost_starts",
    "no_config",
    "no_tokenizer",
    "other_alphas",
    "other_ranks",
    "saved_tables",
    "smile_experts",
    "starts",
    "stated_type",
    "states",
]

SMILE = "load it with transformers, with trust_remote_code=True"
"""Remedy for mixtures of low-rank experts."""

BAKE = "merge it into its base with {kind=model}, and serve that"
ONE_SCALE = "merge it with {method=passthrough}, which writes one rank and one scale"
PLAIN = "merge it with {method=passthrough} if it is LoRA, else into its base with {kind=model}"
"""Remedies for an adapter that a program does not take unchanged, with options as :func:`name_options` reads them."""

SAVE_AGAIN = "save it again, or get its files again together"
"""Remedy for files that do not belong together."""

Severity = Literal["refuses", "ignores", "differs", "warns", "ok"]

Question = Callable[[Subject], Iterable[str]]
"""A function that yields every place where something is wrong."""

GRADIENTS = "LoRA-GA took something off the base in training, and it is not taken off, as in PEFT"
"""The effect of loading an adapter whose start changed the base only in training."""

TABLES = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
"""Endings of the names of tables that PEFT saves with the factors on them."""

_HARMLESS: tuple[object, ...] = (None, False, {}, [], "", "none")

_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


@dataclass(frozen=True, slots=True, repr=False)
class ProgramFinding(Displayed):
    """One finding about a program.

    Attributes:
        program: The name of the program.
        severity: The program ``refuses`` something, silently ``ignores`` it, or ``warns`` at most; a part of an output
            ``differs`` from what its sources give; or all is ``ok``.
        what: The finding in words.
        where: The fields of the config, modules or tensors concerned.
        todo: The remedy.
        source: The version of the program, and the file or the run that the rule was taken from. It is empty for
            findings about the files themselves.
    """

    program: str
    severity: Severity
    what: str
    where: tuple[str, ...] = ()
    todo: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class ServingVerdict(Tabular):
    """The result of a check.

    Attributes:
        path: The path or address that was checked.
        kind: The kind of model there, such as ``"adapter"`` or ``"model"``.
        programs: The programs that it was checked for.
        findings: The findings, those about the files first.
        values_read: Whether the values were read too, and not only the headers.
    """

    path: str
    kind: str
    programs: tuple[str, ...]
    findings: tuple[ProgramFinding, ...]
    values_read: bool = False

    def _display_table(self) -> Table:
        state = "served" if self.served else "not served as it is"
        rows = [(e.program, e.severity, e.what, e.where[0] if e.where else "", e.todo) for e in self.findings]
        header = ("program", "severity", "finding", "where", "remedy")
        return Table(f"Verdict on {self.kind} {self.path}: {state}", header, rows=rows)

    @property
    def served(self) -> bool:
        """Whether nothing is refused or silently ignored, and nothing differs from what the sources give."""
        return not any(each.severity in ("refuses", "ignores", "differs") for each in self.findings)


@dataclass(frozen=True, slots=True)
class Rule:
    """A compatibility rule: severity, message, question, and remedy (``todo``), which may name options in braces.

    The rule applies if the question has answers. ``source`` is the program's file from which the rule was taken. With
    ``, run`` at its end, the program was also run.
    """

    severity: Severity
    what: str
    where: Question
    todo: str
    source: str = ""

    def findings(self, program: Program, subject: Subject) -> Iterator[ProgramFinding]:
        """Yield the finding of this rule, if it applies."""
        where = tuple(self.where(subject))
        if where:
            source = f"{program.version}: {self.source}" if self.source else program.version
            yield ProgramFinding(
                program=program.name,
                severity=self.severity,
                what=self.what,
                where=where,
                todo=name_options(self.todo),
                source=source,
            )


@dataclass(frozen=True, slots=True)
class Program:
    """A program that serves or loads models, with its rules by kind of model. It takes no other kinds."""

    name: str
    rules: Mapping[SubjectKind, tuple[Rule, ...]]
    instead: Mapping[SubjectKind, str]
    """Remedies for the kinds that it does not take."""
    version: str = ""
    """The version that the rules hold for. Other versions may differ."""
    takes_gguf: bool = False
    """Whether it takes GGUF files as they are."""
    takes_mlx: bool = False
    """Whether it takes adapters of MLX as they are."""

    def findings(self, subject: Subject) -> list[ProgramFinding]:
        """Return all findings of this program, or one that all is ok."""
        if subject.is_mlx and not self.takes_mlx:
            return [self._refuse(subject, "loads no adapters of MLX", _way_from_mlx(subject))]
        if subject.kind not in self.rules:
            instead = name_options(self.instead.get(subject.kind, ""))
            return [self._refuse(subject, f"loads no {subject.kind} of this format", instead)]
        converted = subject.weights is not None and subject.weights.suffix == ".gguf" and self.takes_gguf
        rules = () if converted else self.rules[subject.kind]
        found = [each for rule in rules for each in rule.findings(self, subject)]
        return found or [ProgramFinding(self.name, "ok", "nothing is refused or ignored")]

    def _refuse(self, subject: Subject, what: str, todo: str) -> ProgramFinding:
        return ProgramFinding(
            program=self.name,
            severity="refuses",
            what=f"{self.name} {what}",
            where=(subject.name,),
            todo=todo,
            source=self.version,
        )


def _way_from_mlx(subject: Subject) -> str:
    """Return the remedy for an adapter of MLX: other programs load it once it is converted."""
    kind = subject.stated.get("fine_tune_type")
    if kind == "full":
        return name_options(BAKE)
    dora = kind == "dora" or subject.stated.get("use_dora")
    return "convert it with " + either(
        f"merge resize ADAPTER{' --base BASE' if dora else ''} -o OUT",
        f"merging.resize(ADAPTER{', base=BASE' if dora else ''}, output=OUT)",
    )


def smile_experts(subject: Subject) -> Iterator[str]:
    """Yield the type of a mixture of low-rank experts, which ``merge moe`` makes and no server knows."""
    kind = subject.stated.get("model_type")
    if isinstance(kind, str) and kind.startswith("smile_"):
        yield f"model_type = {kind}"


def states(*fields: str) -> Question:
    """Return a question for the fields of the config that have more than a harmless value."""

    def ask(subject: Subject) -> Iterator[str]:
        for name in fields:
            value = subject.stated.get(name)
            if not any(value is each or value == each for each in _HARMLESS):
                yield f"{name} = {value!r}"

    return ask


def absent(*fields: str) -> Question:
    """Return a question for the fields that the config lacks, if there is a config."""

    def ask(subject: Subject) -> Iterator[str]:
        if subject.config is not None:
            yield from (f"{name} is missing" for name in fields if subject.config.get(name) is None)

    return ask


def no_config(subject: Subject) -> Iterator[str]:
    """Yield that a model is not a folder with a config."""
    if subject.folder is None:
        yield f"{subject.name} is a bare file"
    elif subject.config is None:
        yield f"no {'adapter_config.json' if subject.kind == 'adapter' else 'config.json'} in {subject.name}"


def no_tokenizer(subject: Subject) -> Iterator[str]:
    """Yield that a language model's folder has no tokenizer."""
    language = subject.folder is not None and "vocab_size" in subject.text_config
    if language and not any(name in subject.files for name in _TOKENIZERS):
        yield f"no {_TOKENIZERS[0]}, {_TOKENIZERS[1]} or the like in {subject.name}"


def lost_starts(subject: Subject) -> Iterator[str]:
    """Yield a start that took something off the base. Programs that know only factors add them to the whole base."""
    yield from starts("pissa", "olora", "corda", "loftq")(subject)


def starts(*names: str) -> Question:
    """Return a question for starts of the factors whose names begin with one of these."""

    def ask(subject: Subject) -> Iterator[str]:
        start = subject.stated.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(names):
            yield f"init_lora_weights = {start!r}"

    return ask


def other_ranks(subject: Subject) -> Iterator[str]:
    """Yield the modules whose rank differs from the config's rank."""
    stated = subject.stated.get("r")
    yield from (f"{path} has rank {rank}, r = {stated}" for path, rank in subject.ranks.items() if rank != stated)


def other_alphas(subject: Subject) -> Iterator[str]:
    """Yield the entries of alpha_pattern that differ from the alpha for all."""
    pattern = subject.stated.get("alpha_pattern")
    for key, alpha in (pattern if isinstance(pattern, dict) else {}).items():
        if alpha != subject.stated.get("lora_alpha"):
            yield f"alpha_pattern: {key}: {alpha}"


def convolutions(subject: Subject) -> Iterator[str]:
    """Yield the modules with factors of a convolution."""
    for path, parts in subject.modules.items():
        if any(len(stored.shape) > 2 for stored in parts.values()):
            yield path


def saved_tables(subject: Subject) -> Iterator[str]:
    """Yield the embeddings and heads of the base that were saved with the factors on them."""
    yield from (name for name in subject.tensors if name.endswith(TABLES))


def stated_type(subject: Subject) -> Iterator[str]:
    """Yield a dtype in a model's config that differs from most of its weights. Loading casts them."""
    stated = next((part[key] for part in (subject.text_config, subject.stated) for key in ("dtype", "torch_dtype")
                   if isinstance(part.get(key), str)), None)  # fmt: skip
    kinds: Counter[str] = Counter()
    for tensor in subject.tensors.values():
        if tensor.floating:
            kinds[tensor.dtype_name] += tensor.numel
    most = kinds.most_common(1)
    if stated in _TYPES and most and most[0][0] != _TYPES[stated]:
        yield f"most weights are {most[0][0]}, dtype = {stated!r}"


APART = f"give each expert its own names with {{experts=apart, base=BASE}}, or {BAKE}"
"""Remedy for factors of stacked experts, if a program serves factors of single experts."""
