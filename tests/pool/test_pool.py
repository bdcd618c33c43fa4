"""A pool of adapters: what the audit finds, what it lets through, and that nothing is lost on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from merging import merge
from merging.cli.main import cli
from merging.errors import InputError, OptionError, OutputError
from merging.hub.open_model import open_model
from merging.pool import Pool
from merging.pool.candidates import candidates_in
from merging.sources import Adapter
from support.adapters import LLAMA, QUIRKS, deep_base, edit_config, edit_tensors, train
from support.hub_fixture import Hub
from support.systems import POSIX

pytestmark = QUIRKS

HEALTHY = {
    "plain": {},
    "wide": {"r": 8, "lora_alpha": 16},
    "rslora": {"use_rslora": True},
    "patterned": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "loha": None,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = deep_base(tmp_path_factory.mktemp("bases") / "tiny-base", layers=2)
    # so large that what the tests' adapters change is as small beside it as a fine-tune's
    tensors = {name: value * 40 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value * float("nan") if "layers.1" in name else value for name, value in tensors.items()}


def _zero(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value * 0 if "lora_B" in name else value for name, value in tensors.items()}


def _narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[:, :-1].contiguous() if "lora_A" in name else value for name, value in tensors.items()}


def _elsewhere(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("q_proj", "attn_qq"): value for name, value in tensors.items()}


DEFECTS = {
    "nan": (_nan, {}, "rejected", "NaN"),
    "zero": (_zero, {}, "quarantined", "changes nothing"),
    "narrow": (_narrow, {}, "rejected", "shape"),
    "elsewhere": (_elsewhere, {}, "rejected", "is not a tensor of the base"),
    "wrong base": (None, {"base_model_name_or_path": "someone/another-base"}, "rejected", "was trained on"),
    "wrong alpha": (None, {"lora_alpha": 6000}, "quarantined", "times its norm"),
    "random start": (None, {"init_lora_weights": "pissa_niter_4"}, "rejected", "cannot be repeated"),
    "prompt": (None, {"peft_type": "PROMPT_TUNING"}, "rejected", "PROMPT_TUNING"),
}


@pytest.fixture(scope="module")
def incoming(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of healthy adapters of several kinds, and of one with every defect."""
    from support import adapters
    from support.adapters import peft

    folder = tmp_path_factory.mktemp("incoming")
    for seed, (name, config) in enumerate(HEALTHY.items()):
        if config is not None:
            train(folder / name, base, seed, LLAMA, **config)
        else:
            model = peft.get_peft_model(adapters.reload(base), peft.LoHaConfig(r=4, alpha=4, target_modules=LLAMA))
            random = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for value in (value for value in model.parameters() if value.requires_grad):
                    value.copy_(0.3 * torch.randn(value.shape, generator=random))
            model.save_pretrained(folder / name)
    for name, (tensors, config, _, _) in DEFECTS.items():
        broken = Path(shutil.copytree(folder / "plain", folder / name))
        # each is an adapter of its own, and not the first one again
        edit_tensors(broken, lambda t, name=name: {n: v * (1 + len(name) / 50) + 0.01 for n, v in t.items()})
        if tensors is not None:
            edit_tensors(broken, tensors)
        edit_config(broken, **config)
    shutil.copytree(folder / "plain", folder / "the same")
    twice = Path(shutil.copytree(folder / "wide", folder / "wide, twice as strong"))
    edit_config(twice, lora_alpha=32)
    gauge = Path(shutil.copytree(folder / "rslora", folder / "rslora, other factors"))
    edit_tensors(gauge, lambda t: {n: v * 4 if "lora_A" in n else v / 4 for n, v in t.items()})
    (folder / "cut").mkdir()
    shutil.copyfile(folder / "plain" / "adapter_config.json", folder / "cut" / "adapter_config.json")
    data = (folder / "plain" / "adapter_model.safetensors").read_bytes()
    (folder / "cut" / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    train(folder / "pickle", base, 50, LLAMA, pickle=True)
    (folder / "full").symlink_to(base)
    return folder


@pytest.fixture(scope="module")
def built(base: Path, incoming: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    pool = Pool.create(tmp_path_factory.mktemp("pools") / "pool", base)
    pool.build([*candidates_in(incoming), *candidates_in(incoming / "full" / "model.safetensors")])
    return pool


def verdict(pool: Pool, name: str) -> tuple[str, str]:
    entry = next(entry for entry in pool.index.entries() if Path(entry.name).name == name)
    return entry.verdict, "; ".join(finding.reason for finding in entry.findings if finding.verdict == entry.verdict)


@pytest.mark.parametrize("name", HEALTHY)
def test_no_healthy_adapter_is_held_back(built: Pool, name: str) -> None:
    found, reason = verdict(built, name)
    assert found in ("ok", "repaired"), reason
    # what is put right is said
    told = {"rslora": "rsLoRA", "dora": "with the base", "pissa": "with the base"}.get(name, "")
    assert told in reason


@pytest.mark.parametrize("name", DEFECTS)
def test_every_planted_defect_is_found(built: Pool, name: str) -> None:
    _, _, expected, told = DEFECTS[name]
    found, reason = verdict(built, name)
    assert found == expected
    assert told in reason


def test_damage_pickles_and_models_are_rejected(built: Pool) -> None:
    assert verdict(built, "cut")[0] == "rejected"
    assert verdict(built, "pickle") == (
        "rejected",
        "is a pickle (adapter_model.bin): only safetensors come into a pool",
    )
    assert verdict(built, "model.safetensors") == ("rejected", "is a full model, and the pool is for adapters")


def test_repeats_are_found_by_content_and_by_cosine(built: Pool) -> None:
    assert "has the same content as" in verdict(built, "the same")[1] + verdict(built, "plain")[1]
    for pair in (("wide, twice as strong", "wide"), ("rslora, other factors", "rslora")):
        told = [verdict(built, name) for name in pair]
        assert sorted(found == "quarantined" for found, _ in told) == [False, True]
        assert "again (cosine" in "".join(reason for _, reason in told)


def test_what_is_kept_merges(built: Pool, base: Path, tmp_path: Path) -> None:
    kept = [str(path) for _, path in built.usable()]
    assert len(kept) == len(HEALTHY)
    merged = merge(kept, method="linear", base=base, kind="model", output=tmp_path / "out")
    assert merged.kind == "model"


def test_figures_are_those_of_the_changes(built: Pool, base: Path) -> None:
    weights = open_model(base)
    entry = next(entry for entry in built.index.entries() if entry.name.endswith("/wide"))
    adapter = open_model(built.path / str(entry.folder))
    assert isinstance(adapter, Adapter) and not isinstance(weights, Adapter)
    squares = norms = largest = 0.0
    for change in adapter.changes.values():
        stored = weights.tensors[change.target]
        value = change.read(stored.shape, stored.read, torch.float64).dense()
        squares += float(value.square().sum())
        norms += float(stored.read().double().square().sum())
        largest = max(largest, float(value.norm() / stored.read().double().norm()))
    assert entry.norm == pytest.approx(squares**0.5, rel=1e-5)
    assert entry.figures["relative_norm"] == pytest.approx((squares / norms) ** 0.5, rel=1e-5)
    assert entry.relative == pytest.approx(largest, rel=1e-5)
    assert entry.rank == 8


def test_what_is_known_is_not_audited_again(built: Pool, incoming: Path) -> None:
    before = [entry.to_dict() for entry in built.index.entries()]
    assert built.build(candidates_in(incoming)).audited == 0
    assert [entry.to_dict() for entry in built.index.entries()] == before
    assert built.build(candidates_in(incoming / "plain"), again=True).audited == 1
    after = [{**entry.to_dict(), "time": ""} for entry in built.index.entries()]
    assert after == [{**entry, "time": ""} for entry in before]


def _run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["pool", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


def _quietly(*words: object) -> str:
    """What a command prints without what it tells on stderr."""
    return str(CliRunner().invoke(cli, ["pool", *map(str, words)]).stdout)


def test_commands(base: Path, incoming: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    assert "say with --base" in _run("build", pool, incoming, code=1)
    assert "there is no such" in _run("build", pool, incoming / "none", "--base", base, code=1)
    assert not pool.exists()
    told = _run("build", pool, incoming / "plain", incoming / "wide", incoming / "nan", "--base", base)
    assert "2 ok" in told and "1 rejected" in told
    listed = json.loads(_run("list", pool, "--json"))
    assert [Path(entry["name"]).name for entry in listed] == ["nan", "plain", "wide"]
    assert "NaN" in _run("list", pool, "--verdict", "rejected")
    assert "NaN" in _run("show", pool, "nan")
    assert json.loads(_run("stats", pool, "--json"))["usable"] == 2
    shutil.copytree(incoming / "plain", tmp_path / "twin")
    told = _run("build", pool, tmp_path / "twin")
    assert told.index("ok") < told.index("quarantined") and "has the same content as" in told
    assert told.endswith("2 ok, 0 repaired, 1 quarantined, 1 rejected\n")
    removed = json.loads(_quietly("remove", pool, "plain", listed[1]["name"], "--json"))["removed"]
    assert removed == [listed[1]["name"]]
    assert json.loads(_run("stats", pool, "--json"))["usable"] == 2, "what repeated the one that is gone is free"
    _run("remove", pool, os.path.relpath(tmp_path / "twin"))
    assert len(list((pool / "adapters").iterdir())) == 1
    assert "is not in the pool" in _run("remove", pool, "nothing", code=1)
    assert json.loads(_quietly("audit", pool, "--json"))["verdicts"]["ok"] == 1
    assert json.loads(_run("dedupe", pool, "--json"))["verdicts"]["ok"] == 1
    _run("plot", pool, "-o", tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    assert "is not a pool" in _run("list", tmp_path, code=1)
    shutil.rmtree(pool / "adapters")
    assert "its files are no longer in the pool" in _run("dedupe", pool)
    assert json.loads(_run("stats", pool, "--json"))["usable"] == 0
    assert "1 ok" in _run("audit", pool)
    assert len(list((pool / "adapters").iterdir())) == 1
    assert "begins with hub:" in _run("build", tmp_path / "other", "--base", base, "--query", "x", code=1)
    assert not (tmp_path / "other").exists()
    assert "already" in _run("build", pool, incoming, "--base", incoming, code=1)


def test_owners_have_so_many_places_and_licences_are_asked_for(
    base: Path, incoming: Path, hub: Hub, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"base_model": "me/tiny-base", "license": "mit"}
    for number, name in enumerate(("plain", "wide", "patterned", "rslora")):
        owner = "me" if number < 3 else "you"
        card = config if number < 3 else {"base_model": "me/tiny-base"}
        files = {path.name: path for path in (incoming / name).iterdir() if path.name != "README.md"}
        hub.put(f"{owner}/{name}", files, card=card, tags=["base_model:adapter:me/tiny-base", "peft"])
    hub.put("they/gated", incoming / "wide", tags=["base_model:adapter:me/tiny-base"], gated=True)
    command = [sys.executable, "-m", "merging", "pool", "build", "pool", "--base", str(base), "--hub"]
    command += ["--base-name", "me/tiny-base", "--owner-cap", "2", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {entry.name.partition("@")[0]: entry for entry in Pool(tmp_path / "pool").index.entries()}
    assert sum(found[f"me/{name}"].usable for name in ("plain", "wide", "patterned")) == 2
    assert [f.stage for f in found["you/rslora"].findings if f.verdict == "quarantined"] == ["licence"]
    assert found["they/gated"].verdict == "rejected"
    assert "is gated" in found["they/gated"].findings[0].reason
    assert Pool(tmp_path / "pool").index.entry("you/rslora") == found["you/rslora"]


@POSIX
@pytest.mark.exhaustive
def test_a_build_that_is_killed_goes_on(base: Path, incoming: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    command = [sys.executable, "-m", "merging", "pool", "build", str(pool), str(incoming), "--base", str(base)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for _ in range(3):
            process.stderr.readline()
        process.send_signal(signal.SIGKILL)
    done = len(Pool(pool).index.names())
    assert 0 < done < len(list(incoming.iterdir()))
    opened = Pool(pool)
    built = opened.build(candidates_in(incoming))
    assert built.audited == len(candidates_in(incoming)) - done
    folders = {Path(entry.folder).name for entry in opened.index.entries() if entry.folder}
    assert {path.name for path in (pool / "adapters").iterdir()} == folders


def test_a_pool_whose_making_was_killed_is_made(base: Path, incoming: Path, tmp_path: Path) -> None:
    """By the same command, whatever it had come to; what else lies there is nobody's to take for a pool."""
    pool = tmp_path / "pool"
    (pool / "adapters").mkdir(parents=True)
    (pool / ".pool.sqlite.new").write_bytes(b"half an index")
    (pool / ".pool.sqlite.new-journal").write_bytes(b"and its journal")
    made = Pool.create(pool, base)
    assert (made.base, made.index.names()) == (str(base), set())
    assert sorted(path.name for path in pool.iterdir()) == ["adapters", "pool.sqlite"]
    (pool / "pool.sqlite").unlink()
    (pool / "adapters" / "mine").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        Pool.create(pool, base)


def test_one_writer_at_a_time(base: Path, incoming: Path, tmp_path: Path) -> None:
    pool = Pool.create(tmp_path / "pool", base)
    with pool._writing(), pytest.raises(OutputError, match="another process is writing"):
        Pool(pool.path).build(candidates_in(incoming / "plain"))
    assert pool.index.names() == set()


def test_what_cannot_be_a_pool(base: Path, incoming: Path, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "x").touch()
    with pytest.raises(OutputError, match="exists already"):
        Pool.create(tmp_path / "held", base)
    with pytest.raises(InputError, match="is an adapter"):
        Pool.create(tmp_path / "new", incoming / "plain")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="holds no adapter"):
        candidates_in(tmp_path / "held")
    pool = Pool.create(tmp_path / "pool", base)
    with pytest.raises(OptionError, match="owner_cap"):
        pool.build([], owner_cap=0)
    (pool.path / "pool.sqlite").write_bytes(b"not a database, but something else" * 100)
    with pytest.raises(Exception, match="is not an index of a pool"):
        Pool(pool.path)
