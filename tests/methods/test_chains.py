"""Chains of methods from files to files, against flat references in float64: full checkpoints, adapters, and both."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merging
from merging.engine.resources import workers_within
from merging.maths.randomness import draw_mask
from merging.methods import links, method_class, parameters_of
from merging.plan import estimates, items
from support.commands import ok
from support.references import (
    balanced,
    dare,
    decoupled,
    do_merging,
    flatten,
    opcm,
    orthogonalized,
    pcb,
    ties,
    unflatten,
)
from support.systems import POSIX
from support.tiny import load, model, save

Change = dict[str, Tensor]
EMBEDDING = "model.embed_tokens.weight"
LAYERS = {f"model.layers.{i}.{part}.weight": i for i in range(3) for part in ("mlp.up_proj", "input_layernorm")}
CHAINS: dict[str, dict[str, Any]] = {
    "lines+ties": {"density": 0.4, "beta": 0.3}, "pcb": {"ratio": 0.3}, "lines+opcm": {"beta": 0.3}, "opcm": {},
    "dare+ties": {"drop": 0.5, "seed": 3, "density": 0.4}, "decouple+ties": {"density": 0.4}, "do": {},
    "orthogonalize+lines+task_arithmetic": {"beta": 0.3}, "dare": {"drop": 0.5, "seed": 3},
}  # fmt: skip
ROUNDED = {"pcb": 1e-4, "decouple+ties": 1e-4}  # in float32 another few entries may be the last that count


class Inputs(NamedTuple):
    """A base, models on the disk, and what each changes: of adapters also the factors, scales folded in."""

    base: Path
    paths: list[Path]
    changes: list[Change]
    pairs: list[dict[str, tuple[Tensor, Tensor]]]


def grid(seed: int, shape: tuple[int, ...], size: float, bits: int = 14) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random) * size * 2**bits).round() / 2**bits


def turned(name: str, matrix: Tensor) -> Tensor:
    return matrix.mT if name == EMBEDDING else matrix


def full(folder: Path, base: Change, seed: int) -> tuple[Any, ...]:
    change = {name: grid(seed * 100 + i, tuple(value.shape), 0.1) for i, (name, value) in enumerate(base.items())}
    path = save(folder / f"full{seed}", {name: value + change[name] for name, value in base.items()})
    return path, {name: value.double() for name, value in change.items()}, {}


def adapter(folder: Path, base: Change, seed: int, lacks: str = "none") -> tuple[Any, ...]:
    """A PEFT folder with factors for all matrices but those whose name has ``lacks`` in it."""
    tensors, pairs, rank, scale = {}, {}, 2 + seed % 2, seed
    for i, (name, value) in enumerate(base.items()):
        if value.dim() == 2 and lacks not in name:
            out, into = turned(name, value).shape
            up, down = (grid(seed * 100 + i + j, shape, 0.5, 5) for j, shape in ((0, (out, rank)), (50, (rank, into))))
            sides = ("embedding_A", "embedding_B") if name == EMBEDDING else ("A.weight", "B.weight")
            module = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            tensors |= {module + sides[0]: down, module + sides[1]: up}
            pairs[name] = up.double() * scale, down.double()
    path = folder / f"adapter{seed}"
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale, "target_modules": ["up_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path, {name: turned(name, up @ down) for name, (up, down) in pairs.items()}, pairs


def inputs(folder: Path, kind: str, base: Change) -> Inputs:
    """Three models of a kind, or one adapter beside a full checkpoint; the second adapter lacks a layer."""
    base = {name: (value * 2**14).round() / 2**14 for name, value in base.items()}
    made = [full(folder, base, seed) for seed in (1, 2, 3)] if kind == "dense" else []
    made = [adapter(folder, base, 1), full(folder, base, 2)] if kind == "mixed" else made
    made = made or [adapter(folder, base, 1), adapter(folder, base, 2, "layers.1"), adapter(folder, base, 3)]
    return Inputs(save(folder / "base", base), *map(list, zip(*made, strict=True)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Inputs]:
    return {kind: inputs(tmp_path_factory.mktemp(kind), kind, model()) for kind in ("dense", "adapter", "mixed")}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Inputs]:
    """A tensor of more than one tile, by elements and by rows of factors, and small ones."""
    rows = items.TILE // 32 + 3000, 40
    base = {f"model.layers.{i}.mlp.up_proj.weight": grid(i, (rows[i], 32), 1.0) for i in range(2)}
    base["model.norm.weight"] = torch.ones(5)
    return {kind: inputs(tmp_path_factory.mktemp(kind), kind, base) for kind in ("dense", "adapter", "mixed")}


def merge(given: Inputs, chain: str, out: Path, **options: Any) -> merging.Merged:
    """Into a model, unless a rank makes an adapter of adapters, which needs no base."""
    own: dict[str, Any] = {} if "rank" in options else {"base": given.base, "kind": "model"}
    return merging.merge(given.paths, method=chain, output=out, **{**CHAINS.get(chain, {}), **own, **options})


def change_of(given: Inputs, out: Path) -> Change:
    """What is in an output: its adapter's products, or its differences from the base."""
    if not (out / "adapter_config.json").exists():
        return {name: load(out)[name].double() - value.double() for name, value in load(given.base).items()}
    found, tensors = {}, {key: value.double() for key, value in load_file(out / "adapter_model.safetensors").items()}
    for key in filter(lambda key: "_A" in key, tensors):
        name = key.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"
        found[name] = turned(name, tensors[key.replace("_A", "_B")] @ tensors[key])
    return found


def expected(given: Inputs, chain: str) -> Change:
    """A model that lacks a tensor changes it by 0."""
    like = {name: torch.zeros_like(value) for change in given.changes for name, value in change.items()}
    keys = merging.preview(given.paths, method=chain, base=given.base, **CHAINS[chain]).keys
    return merged(chain.split("+"), [like | change for change in given.changes], given, keys, CHAINS[chain])


def merged(chain: list[str], models: list[Change], given: Inputs, keys: tuple[str, ...], own: dict[str, Any]) -> Change:
    (head, *inside), like, tau = chain, models[0], flatten(models)
    brought = {name: [i for i, change in enumerate(given.changes) if name in change] for name in like}
    pairs = {n: [given.pairs[i].get(n) for i in there] for n, there in brought.items()}
    pairs = {name: each for name, each in pairs.items() if all(each)}
    if head == "do":
        decoupled_alone = merged(["decouple", "mean"], models, given, keys, own)
        return decoupled_alone | {name: turned(name, do_merging(each)) for name, each in pairs.items()}
    if head == "mean":
        return {name: sum(each[name] for each in models) / len(there) for name, there in brought.items()}
    if head == "orthogonalize":
        for name, each in pairs.items():
            ups, downs = zip(*(balanced(*pair) for pair in each), strict=True)
            ups, downs = orthogonalized([up.T for up in ups]), orthogonalized(downs)
            for i, up, down in zip(brought[name], ups, downs, strict=True):
                models[i] = models[i] | {name: turned(name, up.T @ down)}
        return merged(inside, models, given, keys, own)
    if head == "dare":
        masks = [{n: draw_mask(0.5, 0, v.numel(), v.device, 3, key, n) for n, v in like.items()} for key in keys]
        thinned = [unflatten(row, like) for row in dare(tau, flatten(masks), 0.5)]
        return merged(inside or ["task_arithmetic"], thinned, given, keys, own)
    if head == "decouple":
        sizes, directions = {}, [dict(each) for each in models]
        for name, value in like.items():
            columns = [turned(name, each[name]) if value.dim() == 2 else each[name][:, None] for each in models]
            lengths, units = decoupled(torch.stack(columns))
            mean = lengths[brought[name]].mean(0)
            sizes[name] = turned(name, mean[None]) if value.dim() == 2 else mean
            for each, unit in zip(directions, units, strict=True):
                each[name] = turned(name, unit) if value.dim() == 2 else unit[:, 0]
        inner = merged(inside, directions, given, keys, own)
        return {name: value * sizes[name] for name, value in inner.items()}
    if head == "lines":
        inner, layer = merged(inside, models, given, keys, own), {name: LAYERS.get(name, 0) for name in like}
        nu, growth = tau.sum(0).abs().sum() / flatten([inner]).abs().sum(), own["beta"] / max(layer.values())
        return {name: nu * (1 / len(models) + growth * layer[name]) * value for name, value in inner.items()}
    if head == "opcm":  # tall matrices in an orthonormal basis of all their columns
        bases = {n: torch.linalg.qr(torch.cat([m[n] for m in models], 1))[0] for n, v in like.items() if len(v) > 1000}
        reduced = [{n: bases[n].T @ v if n in bases else v for n, v in each.items()} for each in models]
        matrices = {name for name, value in like.items() if value.dim() == 2 and name != EMBEDDING}
        return {n: bases[n] @ v if n in bases else v for n, v in opcm(reduced, matrices).items()}
    flat = {"ties": ties, "pcb": pcb, "task_arithmetic": lambda tau: tau.sum(0)}[head]
    return unflatten(flat(tau, **{key: value for key, value in own.items() if key in ("density", "ratio")}), like)


def assert_close(got: Change, want: Change, within: float = 5e-6, but: float = 0.0) -> None:
    """All entries but that share of each tensor; tensors that no model has are exactly the base's."""
    assert got.keys() >= want.keys()
    for name, value in got.items():
        wanted = want.get(name, torch.zeros_like(value))
        off = (value - wanted).abs() > (within * (1 + float(wanted.abs().max())) if name in want else 0)
        assert float(off.double().mean()) <= but, name
    assert any(float(value.abs().max()) > 0.01 for value in want.values())


@pytest.mark.parametrize("kind", ["dense", "adapter", "mixed"])
@pytest.mark.parametrize("chain", CHAINS)
def test_chain_of_files(small: dict[str, Inputs], tmp_path: Path, chain: str, kind: str) -> None:
    """As an adapter, too: a full rank loses nothing, a lower one is the best there is and tells what it discards."""
    given, want, shares = small[kind], expected(small[kind], chain), {}
    assert merge(given, chain, tmp_path / "out").kind == "model"
    assert_close(change_of(given, tmp_path / "out"), want)
    if kind == "adapter":
        done = merge(given, chain, tmp_path / "full", rank=8)
        assert_close(change_of(given, tmp_path / "full"), want)
        assert all(share < 1e-6 for share in done.discarded.values())
        done = merge(given, chain, tmp_path / "low", rank=3)
        for name, value in want.items():
            u, s, vh = torch.linalg.svd(value, full_matrices=False)
            want[name], shares[name] = (u[:, :3] * s[:3]) @ vh[:3], float(s[3:].square().sum() / s.square().sum())
        assert_close(change_of(given, tmp_path / "low"), want, 2e-5)
        assert done.discarded == pytest.approx(shares, rel=1e-4)
        assert (done.kind, done.rank, min(shares.values()) > 1e-3) == ("adapter", 3, True)


@pytest.mark.parametrize(
    "kind", [*(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("dense", "adapter")), "mixed"]
)
@pytest.mark.parametrize("chain", [chain for chain in CHAINS if chain not in ("opcm", "dare")])
def test_tensors_of_several_tiles(large: dict[str, Inputs], tmp_path: Path, chain: str, kind: str) -> None:
    """Against the reference, and the same bytes for three threads and in the least memory that is enough."""
    plan = merging.preview(large[kind].paths, method=chain, base=large[kind].base, kind="model", **CHAINS[chain])
    least = plan.memory(1)
    with pytest.raises(merging.OptionError, match="is too little: this merge needs"):
        workers_within(plan, 1, least - 1)
    for number, how in enumerate(({"threads": 1}, {"threads": 3}, {"threads": 3, "max_memory": least})):
        merge(large[kind], chain, tmp_path / f"{number}", **how)
    assert len({(tmp_path / f"{number}" / "model.safetensors").read_bytes() for number in range(3)}) == 1
    assert_close(change_of(large[kind], tmp_path / "0"), expected(large[kind], chain), 2e-5, ROUNDED.get(chain, 0))


def test_facts(small: dict[str, Inputs], tmp_path: Path) -> None:
    facts = merge(given := small["adapter"], "orthogonalize+lines+task_arithmetic", tmp_path / "turned", rank=8).facts
    for side in ("down", "up"):
        before, after = (facts[f"orthogonalize: overlap of {side} factors {when}"] for when in ("before", "after"))
        assert before > 2 * after > 0
    tau = flatten([{name: torch.zeros_like(v) for name, v in given.changes[0].items()} | c for c in given.changes])
    nu = float(tau.sum(0).abs().sum() / ties(tau, 0.4).abs().sum())
    facts = merge(given, "lines+ties", tmp_path / "lines").facts
    assert facts == {"lines: nu": pytest.approx(nu)}
    # of equal matrices the second adds nothing, of equal tables all
    twice = Inputs(given.base, [given.paths[0]] * 2, given.changes, given.pairs)
    squares = {name: float(value.square().sum()) for name, value in given.changes[0].items()}
    factor = (sum(squares.values()) / (sum(squares.values()) + 3 * squares[EMBEDDING])) ** 0.5
    facts = merge(twice, "opcm", tmp_path / "opcm", alpha=1.0).facts
    assert facts == {"opcm: what the sum is multiplied by": pytest.approx(factor)}


@pytest.mark.parametrize("kind", ["dense", "adapter"])
def test_spool(small: dict[str, Inputs], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its space is planned for, and it leaves nothing behind."""
    given, out, names, usage = small[kind], tmp_path / "out.safetensors", set(), namedtuple("Usage", "total used free")
    options: dict[str, Any] = {"rank": 8} if kind == "adapter" else {"base": given.base}
    plan = merging.preview(given.paths, method="lines+opcm", output=out, **options)
    assert plan.spool_bytes > 0 == merging.preview(given.paths, method="lines", **options).spool_bytes
    for missing in (1, 0):
        free = plan.out_bytes + plan.spool_bytes - missing
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(free, 0, free))
        if missing:
            with pytest.raises(merging.OutputError, match=r"needs \d+\.\d MB"):
                merge(given, "lines+opcm", out, **options)
    look = lambda done, total: names.update(path.name for path in tmp_path.rglob("*") if path.is_file())  # noqa: E731
    merge(given, "lines+opcm", out, progress=look, **options)
    assert names == {path.name for path in tmp_path.iterdir()} == {"out.safetensors"}


@POSIX
def test_disk_that_is_full_while_spooling(tmp_path: Path) -> None:
    """The output fits, what is set aside for it does not."""
    for seed, name in enumerate(("base", "one", "two")):
        save(tmp_path / name, {f"layers.{i}.weight": grid(9 * seed + i, (128, 80), 1.0) for i in range(8)})
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
    words = ["-m", "opcm", "--base", "base", "--dtype", "bfloat16", "one", "two"]
    command = [sys.executable, "-c", limit + "from merging.cli.main import main; main()", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.fullmatch(r"Error: \S*: merged changes cannot be set aside: File too large\n", done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "two"]


@pytest.mark.parametrize("chain", ["decouple+ties", "orthogonalize+decouple+pcb", "decouple+lines+ties"])
def test_kept_wrappers(small: dict[str, Inputs], tmp_path: Path, chain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, wrapper, entered, files = small["adapter"], method_class("decouple"), Counter(), []
    unwrap = wrapper.unwrap
    for most in (estimates.KEPT, 0):
        monkeypatch.setattr(wrapper, "unwrap", lambda *args, most=most: entered.update([most]) or unwrap(*args))
        monkeypatch.setattr(estimates, "KEPT", most)
        plan = merging.preview(given.paths, method=chain, base=given.base, kind="model")
        assert (plan.kept_bytes > 0) == (most > 0)
        files.append((merge(given, chain, tmp_path / f"{most}").path / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert entered.most_common()[1][1] == len(given.changes[0]) < entered[0] / 2


def place(given: Inputs, density: dict[str, float]) -> Change:
    """TIES tensor by tensor of two models: density by a part of the name, else 0.2:0.8 over three layers."""
    (one, two), out = given.changes[:2], {}
    for name, value in one.items():
        share = 0.2 + 0.3 * LAYERS[name] if name in LAYERS else 0.2 if name == EMBEDDING else 0.8
        share = next((stated for part, stated in density.items() if part in name), share)
        out[name] = ties(torch.stack([value.flatten(), two[name].flatten()]), share).view(value.shape)
    return out


def test_parameters_by_place(small: dict[str, Inputs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line, in a recipe (also the one it prints) and in Python; what is excluded is the base's."""
    given, parameters = small["dense"], {"density": {"mlp": 0.3, "*": "0.2:0.8"}, "scope": "tensor"}
    monkeypatch.chdir(tmp_path)
    recipe = {"models": list(map(str, given.paths[:2])), "base": str(given.base), "method": "ties"}
    words = ["-m", "ties", "--base", given.base, *given.paths[:2]]
    Path("recipe.yaml").write_text(json.dumps(recipe | {"parameters": parameters}))  # JSON is YAML
    ok("run", "recipe.yaml", "-o", "recipe")
    assert_close(change_of(given, Path("recipe")), place(given, {"mlp": 0.3}))
    merging.merge(given.paths[:2], base=given.base, method="ties", output="python", **parameters)
    ok(*words, "--density", "0.2:0.8", "--scope", "tensor", "-o", "words")
    assert_close(change_of(given, Path("words")), place(given, {}))
    printed = ok(*words, "--density", "0.2:0.8", "--scope", "tensor", "--recipe-only").stdout
    assert merging.load_recipe(printed).to_yaml() == printed
    assert merging.load_recipe(printed).to_dict() == recipe | {"parameters": {"density": "0.2:0.8", "scope": "tensor"}}
    Path("printed.yaml").write_text(printed)
    ok("run", "printed.yaml", "-o", "printed")
    for one, other in (("recipe", "python"), ("words", "printed")):
        assert Path(one, "model.safetensors").read_bytes() == Path(other, "model.safetensors").read_bytes()
    ok(*words, "--exclude", "mlp", "--exclude", "*norm*", "-o", "some")  # and counts in no threshold
    rest = [{n: v for n, v in each.items() if "mlp" not in n and "norm" not in n} for each in given.changes[:2]]
    assert_close(change_of(given, Path("some")), unflatten(ties(flatten(rest)), rest[0]))


def test_methods_and_options_are_shown_in_full() -> None:
    for cls in map(method_class, merging.METHODS):
        shown = ok("methods", cls.name).stdout
        assert shown.startswith(f"{cls.name}: {cls.summary}\n{cls.paper}\n")
        for field in parameters_of(cls):
            flag = field.replace("_", "-")
            assert re.search(rf"--{flag} +{re.escape(str(cls.model_fields[field].description))}", shown)
    shown = " ".join(ok("--method", "decouple+ties", "--help").stdout.split())
    assert (
        all(f"--{field.replace('_', '-')} " in shown for field in parameters_of(links("decouple+ties")[1]))
        and "--drop" not in shown
    )
    assert "[ties] share of each model's change that is kept" in shown
