"""Gathering statistics of real models, and merging by the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.errors import FormatError, InputError, MergingError, OptionError, OutputError
from merging.maths.layer_statistics import InputGram
from merging.methods import chain
from merging.plan.inputs.statistics_files import attach_statistics
from merging.sources.statistics_file import REST, StatisticsFile, StoredStatistics, open_statistics
from merging.statistics.gram_accumulator import GramAccumulator
from merging.statistics.writing import round_gram
from support import references
from support.adapters import quiet, train
from support.example_statistics import save_runnable, write_texts
from support.tiny import load

KINDS = {"llama": "q_proj", "bert": "query", "gpt2": "c_attn"}
"""Architectures, and the end of the name of a module of attention."""


def gathered(folder: Path, architecture: str, **options: Any) -> tuple[Path, list[Path], list[Path]]:
    """A base, two fine-tunes, and their statistics on other texts each."""
    base, tuned = save_runnable(folder, architecture)
    files = []
    for number, model in enumerate(tuned):
        data = write_texts(folder / f"{number}.jsonl", seed=number)
        files.append(folder / f"{number}.safetensors")
        merging.collect_statistics(model, data, files[-1], **options)
    return base, list(tuned), files


def inputs_of(model: Path, data: Path, module: str) -> Tensor:
    """The inputs of a module on all texts, through transformers itself."""
    cls = getattr(transformers, json.loads((model / "config.json").read_text())["architectures"][0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    with quiet():
        network = cls.from_pretrained(model).eval()
    seen: list[Tensor] = []
    (found,) = [each for name, each in network.named_modules() if name.endswith(module)]
    found.register_forward_hook(lambda module, given, out: seen.append(given[0].detach().flatten(0, -2)))
    for line in data.read_text().splitlines():
        with torch.no_grad():
            network(**tokenizer(json.loads(line)["text"], return_tensors="pt"))
    return torch.cat(seen)


def layer(file: StatisticsFile, end: str) -> Tensor:
    (name,) = [name for name in file.layers(REST) if name.endswith(end)]
    gram = StoredStatistics(file, file.layers(REST)[name], None).read_inputs()
    assert gram is not None
    return gram.dense()


@pytest.mark.parametrize(
    "architecture", ["bert", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("gpt2", "llama"))]
)
def test_regmean_by_files(architecture: str, tmp_path: Path) -> None:
    """The whole way, against the reference on the inputs of every model."""
    base, tuned, files = gathered(tmp_path, architecture)
    merging.merge(tuned, method="regmean", base=base, stats=files[::-1], output=tmp_path / "out")
    states, start, got = [load(path) for path in tuned], load(base), load(tmp_path / "out")
    (name,) = [name for name in start if f".1.{'' if architecture != 'bert' else 'attention.self.'}" in name
               and name.endswith(f"{KINDS[architecture]}.weight")]  # fmt: skip
    module = name.removesuffix(".weight")
    turned = architecture == "gpt2"
    tau = torch.stack([state[name] - start[name] for state in states])
    x = [inputs_of(path, tmp_path / f"{i}.jsonl", module.split("transformer.")[-1]) for i, path in enumerate(tuned)]
    wanted = references.regmean(tau.mT if turned else tau, x)
    change = (got[name] - start[name]).double()
    close = torch.allclose(change.T if turned else change, wanted, atol=2e-4)
    assert close, float((change - (wanted.T if turned else wanted)).abs().max())
    vector = next(name for name, value in start.items() if value.dim() == 1)
    assert torch.allclose(got[vector], sum(state[vector] for state in states) / 2, atol=1e-6)


@pytest.mark.exhaustive
def test_shared_inputs_are_stored_once(tmp_path: Path) -> None:
    _, tuned, (file, _) = gathered(tmp_path, "llama")
    opened = open_statistics(file)
    shared = {name.split("layers.0.")[-1]: other.split("layers.0.")[-1] for name, other in opened.shared.items()
              if "layers.0." in name}  # fmt: skip
    assert shared == {
        "self_attn.k_proj.weight": "self_attn.q_proj.weight",
        "self_attn.v_proj.weight": "self_attn.q_proj.weight",
        "mlp.up_proj.weight": "mlp.gate_proj.weight",
    }
    data = tmp_path / "0.jsonl"
    for end in ("layers.0.self_attn.v_proj", "layers.1.mlp.down_proj"):
        x = inputs_of(tuned[0], data, end).double()
        assert torch.allclose(layer(opened, f"{end}.weight"), x.T @ x / len(x), atol=2e-3)
    assert opened.model == "tuned1"
    assert opened.facts["examples"] == 6
    assert opened.facts["tokens"] == 36
    with file.open("rb") as stream:
        assert str(tmp_path).encode() not in stream.read()


@pytest.mark.parametrize("outputs", ["labels", pytest.param("sampled", marks=pytest.mark.exhaustive)])
def test_fisher_by_files(outputs: Any, tmp_path: Path) -> None:
    base, tuned, files = gathered(tmp_path, "llama", fisher=outputs)
    merging.merge(tuned, method="fisher", base=base, stats=files, output=tmp_path / "out")
    states, start, got = [load(path) for path in tuned], load(base), load(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    stored = torch.stack([load_file(file)[f"fisher/{name}"].float() for file in files]) + 1e-6
    tau = torch.stack([(state[name] - start[name]).flatten() for state in states])
    wanted = references.fisher(tau, stored.flatten(1))
    assert torch.allclose((got[name] - start[name]).flatten().double(), wanted, atol=1e-5)
    if outputs == "labels":
        assert torch.allclose(stored[0], gradients(tuned[0], tmp_path / "0.jsonl", name), rtol=1e-2, atol=1e-3)


def gradients(model: Path, data: Path, wanted: str) -> Tensor:
    """Mean squared gradients of the loss on whole texts, over their root mean square over the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    with quiet():
        network = transformers.AutoModelForCausalLM.from_pretrained(model)
    sums = {name: torch.zeros_like(value) for name, value in network.named_parameters()}
    for line in data.read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        network.zero_grad()
        (network(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)).backward()
        for name, value in network.named_parameters():
            sums[name] += value.grad.square()
    every = torch.cat([each.flatten() for each in sums.values()])
    return sums[wanted] / every.square().mean().sqrt()


@pytest.mark.exhaustive
def test_an_adapter_is_run_in_its_base(tmp_path: Path) -> None:
    """Its statistics are of the model that it bakes into, and merges of adapters find them, also under LiNeS."""
    base, _ = save_runnable(tmp_path, "llama", tuned=0)
    loras, files = [], []
    with quiet():
        for seed in range(2):
            loras.append(tmp_path / f"lora{seed}")
            train(loras[-1], base, seed, ["q_proj", "up_proj"], r=2, lora_alpha=8)
            data = write_texts(tmp_path / f"{seed}.jsonl", seed=seed)
            files.append(tmp_path / f"{seed}.safetensors")
            merging.collect_statistics(loras[-1], data, files[-1], base=base)
    merging.bake([loras[0]], base=base, output=tmp_path / "baked")
    merging.collect_statistics(tmp_path / "baked", tmp_path / "0.jsonl", tmp_path / "baked.safetensors")
    own, baked = load_file(files[0]), load_file(tmp_path / "baked.safetensors")
    assert own.keys() == baked.keys()
    assert all(torch.equal(own[name], baked[name]) for name in own)
    low = merging.merge(loras, method="regmean", stats=files, output=tmp_path / "low")
    assert (low.kind, set(low.ranks.values()) | {low.rank}) == ("adapter", {8}), "the next rank that all programs serve"
    merging.merge(loras, method="regmean", base=base, kind="model", stats=files, output=tmp_path / "full")
    merging.bake([tmp_path / "low"], base=base, output=tmp_path / "lowbaked")
    full, again = load(tmp_path / "full"), load(tmp_path / "lowbaked")
    assert all(torch.allclose(full[name], again[name], atol=1e-5) for name in full)
    lines = merging.merge(loras, method="lines+regmean", stats=files, exclude="up_proj", output=tmp_path / "lines")
    assert lines.tensors < low.tensors


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    base, tuned, files = gathered(tmp_path, "llama")
    options: Any = {"base": base, "output": tmp_path / "out"}
    with pytest.raises(InputError, match=r"0\.safetensors: holds statistics of tuned1, whose content is none of"):
        merging.merge([base, tuned[1]], method="regmean", stats=files, **options)
    with pytest.raises(InputError, match="tuned2: no file of stats= holds its statistics"):
        merging.merge(tuned, method="regmean", stats=files[0], **options)
    with pytest.raises(OptionError, match="regmean needs statistics of examples: gather them of each model"):
        merging.merge(tuned, method="lines+regmean", **options)
    with pytest.raises(OptionError, match="which only a merge of models in files reads, with stats="):
        attach_statistics([], (), chain("lines+regmean"))
    with pytest.raises(OptionError, match="stats= is for methods that need statistics"):
        merging.merge(tuned, method="linear", stats=files, **options)
    with pytest.raises(InputError, match="holds no Fisher information, which fisher needs"):
        merging.merge(tuned, method="fisher", stats=files, **options)
    with pytest.raises(InputError, match="hold statistics of one model"):
        merging.merge(tuned, method="regmean", stats=[*files, files[0]], **options)
    with pytest.raises(FormatError, match="holds no statistics of a model's layers"):
        merging.merge(tuned, method="regmean", stats=[tuned[0] / "model.safetensors", files[1]], **options)
    damaged = load_file(files[0])
    damaged[next(name for name in damaged if name.startswith(REST))] *= float("nan")
    header = open_statistics(files[0])
    metadata = {"statistics": "merging statistics 1", "model": "m", "key": header.key, "fisher_size": "0"}
    metadata |= {"facts": "{}", "shared": json.dumps(dict(header.shared))}
    save_file(damaged, tmp_path / "damaged.safetensors", metadata)
    with pytest.raises(FormatError, match="are damaged: gather them again"):
        merging.merge(tuned, method="regmean", stats=[tmp_path / "damaged.safetensors", files[1]], **options)
    assert not (tmp_path / "out").exists()


BAD = {
    "no-json": ('{"text": "w1 w2"}\nw1\n', r"line 2: is not valid JSON", {}),
    "no-field": ('{"prompt": "w1"}\n', r"has no field 'text', and its fields are 'prompt': name one with column=", {}),
    "no-text": ('{"text": "  "}\n', r"line 1: text is '  ', and should be a text", {}),
    "a-list": ('{"text": ["w1"]}\n', r"line 1: text is .*should be a text", {}),
    "empty": ("\n\n", "holds no examples", {}),
    "no-tokens": ('{"text": "w1 w2"}\n', "max_tokens=0: should be at least 1", {"max_tokens": 0}),
    "dtype": ('{"text": "w1 w2"}\n', "dtype", {"dtype": "float8_e4m3fn"}),
    "csv": ("text\nw1 w2\n", r"is not valid JSON.*: give JSON lines, texts in a file that ends in \.txt", {}),
    "label": ('{"text": "w1 w2", "label": 7}\n', "one token|label", {"fisher": "labels", "max_length": 1}),
}


@pytest.mark.parametrize("name", BAD)
def test_data_that_are_no_examples(name: str, tmp_path: Path) -> None:
    text, message, options = BAD[name]
    base, _ = save_runnable(tmp_path, "llama", tuned=0)
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(MergingError, match=message):
        merging.collect_statistics(base, tmp_path / "data.jsonl", tmp_path / "s.safetensors", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "data.jsonl"}


@pytest.mark.exhaustive
def test_limits_and_outputs(tmp_path: Path) -> None:
    base, _ = save_runnable(tmp_path, "llama", tuned=0)
    data, output = write_texts(tmp_path / "data.jsonl"), tmp_path / "s.safetensors"
    found = merging.collect_statistics(base, data, output, examples=5, max_length=4, max_tokens=10)
    assert (found.examples, found.tokens) == (3, 10)
    with pytest.raises(OutputError, match="overwrite=True"):
        merging.collect_statistics(base, data, output)
    first = output.read_bytes()
    merging.collect_statistics(base, data, output, examples=5, max_length=4, max_tokens=10, overwrite=True)
    assert output.read_bytes() == first
    for options, message in (
        ({"examples": 0}, "examples=0"),
        ({"fisher": "both"}, "fisher"),
        ({"base": base}, "base="),
    ):
        with pytest.raises(OptionError, match=message):
            merging.collect_statistics(base, data, tmp_path / "t.safetensors", **options)
    with pytest.raises(OptionError, match=r"name it \.safetensors"):
        merging.collect_statistics(base, data, tmp_path / "t")
    with pytest.raises(InputError, match="no such file or folder"):
        merging.collect_statistics(base, tmp_path / "none.jsonl", tmp_path / "t.safetensors")


@pytest.mark.parametrize("directions", [2, 512], ids=["wide", "narrow"])
def test_inputs_that_are_not_finite_are_refused(directions: int, tmp_path: Path) -> None:
    base, _ = save_runnable(tmp_path, "llama", tuned=0)
    values = load_file(base / "model.safetensors")
    values["model.layers.0.self_attn.o_proj.weight"][0] = torch.nan
    save_file(values, base / "model.safetensors", {"format": "pt"})
    data, output = write_texts(tmp_path / "data.jsonl"), tmp_path / "s.safetensors"
    with pytest.raises(InputError, match=r"the inputs of model\.layers\.0\.mlp\.gate_proj\.weight are not finite"):
        merging.collect_statistics(base, data, output, directions=directions)
    assert not output.exists()


def test_a_limit_of_tokens_leaves_no_text_of_one_token(tmp_path: Path) -> None:
    """Such a text has no next token, whose likelihood could be differentiated."""
    base, _ = save_runnable(tmp_path, "llama", tuned=0)
    data, output = write_texts(tmp_path / "data.jsonl"), tmp_path / "s.safetensors"
    found = merging.collect_statistics(base, data, output, max_tokens=7, fisher="labels")
    assert (found.examples, found.tokens) == (1, 6)


@pytest.mark.parametrize("width", [20, 200], ids=["in full", "by directions"])
def test_a_gram_matrix_of_inputs_that_arrive_in_pieces(width: int) -> None:
    """Definite and with its own diagonal, after it is rounded too; few large directions are kept."""
    draw = torch.Generator().manual_seed(1)
    strong = torch.randn(5, width, generator=draw) * 30
    x = torch.randn(400, 5, generator=draw) @ strong + 0.1 * torch.randn(400, width, generator=draw)
    gathering = GramAccumulator(width, 16, torch.device("cpu"))
    for piece in x.split(37):
        gathering.add(piece)
    exact = x.double().T @ x.double() / len(x)
    found = gathering.result()
    assert found.directions.shape[1] <= 16
    assert torch.linalg.matrix_norm(found.dense() - exact) < 1e-4 * torch.linalg.matrix_norm(exact)
    leading, units, sizes, rest = round_gram(InputGram(found.directions.flip(1), found.rest))  # the largest ones last
    rounded = InputGram(torch.cat([leading.double(), units.double() * sizes], 1), rest.double()).dense()
    assert torch.allclose(rounded.diag(), exact.diag(), rtol=1e-3)
    assert bool((torch.linalg.eigvalsh(rounded) > -1e-9 * rounded.diag().max()).all())
    assert torch.linalg.matrix_norm(rounded - exact) < 1e-3 * torch.linalg.matrix_norm(exact)
