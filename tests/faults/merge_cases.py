"""The kinds of merges that tests/faults/merges.py stops: every command that writes a model, on tiny inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import run_undisturbed

from support.tiny import adapters, checkpoint

__all__ = ["Case", "make_cases"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A command that writes an output.

    Attributes:
        name: the kind.
        words: the words of the command.
        output: its output, in a folder of its own.
        old: the old output that it replaces.
        resumes: whether it goes on where it stopped.
        exchanges: whether the disk can exchange two names.
    """

    name: str
    words: list[str]
    output: Path
    old: Path | None = None
    resumes: bool = True
    exchanges: bool = True


def make_cases(folder: Path, only: Sequence[str] = ()) -> list[Case]:
    """Return all kinds of merges, or those of some names; their inputs are made in a folder."""
    found: list[Case] = []
    for case in (each for make in (_merges, _other_commands) for each in make(folder)):
        found += [case] if not only or case.name in only else []
        if only and len(found) == len(only):
            return found
    return found


def _merges(folder: Path) -> Iterator[Case]:
    """Models and adapters by ``merge``, ``run`` and ``bake``, in all forms of outputs."""
    root, tuned = checkpoint(folder / "models", 3, layers=2)
    origin, changes = adapters(folder / "adapters", 2)
    models, factored = [str(path) for path in tuned], [str(path) for path in changes]
    out = folder / "work" / "out"
    file, lora, old, old_file = (
        out.with_suffix(".safetensors"), out.with_suffix(".gguf"), folder / "old", folder / "old.safetensors"
    )  # fmt: skip
    recipe = folder / "stages.yml"
    stage = {"models": models, "method": "ties", "base": str(root)}
    recipe.write_text(json.dumps({"models": [stage, models[0]], "method": "karcher"}))
    full = [*models, "--base", str(root), "-o", str(out)]
    over = ["--method", "ties", *full, "--overwrite"]
    joined = ["--method", "linear", *factored, "-o"]
    run_undisturbed(["--method", "linear", *models, "-o", str(old), "--quiet"])
    run_undisturbed([*joined, str(old_file), "--weights", "1,2", "--quiet"])
    yield Case(name="a model", words=["--method", "linear", *full], output=out)
    shards = ["--method", "task_arithmetic", *full, "--shard-size", "3000"]
    yield Case(name="shards", words=shards, output=out)
    yield Case(name="statistics", words=["--method", "ties", *full], output=out)
    yield Case(name="set aside", words=["--method", "lines+tsv", *full], output=out)
    yield Case(name="quantized", words=["--method", "linear", *full, "--quantize", "fp8-channel"], output=out)
    yield Case(name="an adapter", words=["--method", "ties", *factored, "-o", str(out)], output=out)
    yield Case(name="ranks", words=[*joined, str(out), "--energy", "0.9"], output=out)
    yield Case(name="a file", words=[*joined, str(file)], output=file)
    gguf = [*joined, str(lora), "--base", str(origin), "--format", "gguf"]
    yield Case(name="gguf", words=gguf, output=lora)
    yield Case(name="baked", words=["bake", factored[0], "--base", str(origin), "-o", str(out)], output=out)
    yield Case(name="stages", words=["run", str(recipe), "-o", str(out)], output=out)
    yield Case(name="over a model", words=over, output=out, old=old)
    yield Case(name="over a model, no exchange", words=over, output=out, old=old, exchanges=False)
    yield Case(name="over a file", words=[*joined, str(file), "--overwrite"], output=file, old=old_file)


def _other_commands(folder: Path) -> Iterator[Case]:
    """The commands that write a model by other means, after the inputs of :func:`_merges`."""
    from support.dense_models import save_dense  # imports transformers, which takes seconds
    from support.moe_recipes import two_experts
    from support.tokenized import save_tokenized

    root, factored = folder / "models/base", folder / "adapters/adapter1"
    out, file = folder / "work/out", folder / "work/out.safetensors"
    to = ["-o", str(out)]
    tuned = [str(folder / f"models/tuned{number}") for number in range(3)]
    extract = ["extract", tuned[0], "--base", str(root), *to]
    yield Case(name="extract", words=[*extract, "--rank", "2"], output=out)
    yield Case(name="extract by energy", words=[*extract, "--energy", "0.5"], output=out)
    yield Case(name="resize", words=["resize", str(factored), "--rank", "1", *to], output=out)
    yield Case(name="soup", words=["soup", *tuned, *to], output=out)
    yield Case(name="stack", words=["stack", tuned[0], "0:2", "1:2", *to], output=out)
    yield Case(name="rerun", words=["rerun", str(folder / "old"), *to], output=out)
    small, large = (str(save_tokenized(folder / "tokens" / name, name)) for name in "ab")
    yield Case(name="tokens", words=["tokens", small, large, *to], output=out)
    for number, name in enumerate(("base", "a", "b")):
        save_dense(folder / "dense" / name, "llama", number)
    mixture = folder / "mixture.yml"
    mixture.write_text(json.dumps(two_experts(folder / "dense", "cheap_embed")))
    yield Case(name="moe", words=["moe", str(mixture), *to], output=out, resumes=False)
    recipe = folder / "work/out.yml"
    convert = ["convert", str(folder / "stages.yml"), "-o", str(recipe)]
    yield Case(name="convert", words=convert, output=recipe, resumes=False)
    pack = folder / "pack.safetensors"
    run_undisturbed(["compress", str(factored), "-o", str(pack), "--quiet"])
    yield Case(name="compress", words=["compress", str(factored), "-o", str(file)], output=file, resumes=False)
    yield Case(name="decompress", words=["decompress", str(pack), *to], output=out, resumes=False)
