"""Models on the Hub: the real commands and the real client against a Hub of the project's own, on loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

from merging.errors import InputError
from merging.hub.address import Address, hub_address
from merging.output.licences import licence_sentence, strictest
from support import tiny
from support.hub_fixture import Hub, Request, serve
from support.paths import EXAMPLES, ROOT
from support.systems import POSIX

pytestmark = pytest.mark.exhaustive

SHAPE = {"layers": 6, "width": 32, "vocab": 64}


@dataclass
class Site:
    """A Hub that holds a base, a fine-tune in one file and one in shards, and where they lie locally."""

    hub: Hub
    local: dict[str, Path]
    shas: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    base, (one, _) = tiny.checkpoint(folder, 2, **SHAPE)
    sharded = tiny.save(folder / "sharded", tiny.fine_tune(tiny.model(**SHAPE), 5), shards=3)
    (base / "tokenizer.json").write_text('{"model": {}}')
    with serve(folder / "root") as running:
        found = Site(running, {"org/base": base, "org/one": one, "org/sharded": sharded})
        for name, path in found.local.items():
            card = {"license": {"org/base": "mit", "org/one": "apache-2.0", "org/sharded": "cc-by-nc-4.0"}[name]}
            found.shas[name] = running.put(name, path, card=card)
        for name in ("bbc", "spam"):
            files = {path.name: path for path in (EXAMPLES / name).iterdir() if path.name != "README.md"}
            found.shas[f"org/{name}"] = running.put(f"org/{name}", files, card={"license": "mit"})
        yield found


@dataclass
class Shell:
    """Runs the command line as a user of the Hub would, each in a home of its own."""

    site: Site
    folder: Path
    home: str = "home"
    token: str | None = None

    def environment(self, **more: str) -> dict[str, str]:
        token = {"HF_TOKEN": self.token} if self.token else {}
        return self.site.hub.environment(self.folder / self.home) | {"OMP_NUM_THREADS": "1"} | token | more

    def __call__(self, *words: str, code: int = 0, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "merging", *words],
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            cwd=self.folder,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    def merge(self, output: str, *words: str, code: int = 0, **environment: str) -> str:
        words = ("-m", "task_arithmetic", "--base", "org/base", "org/one", "org/sharded", "-o", output, *words)
        return self(*words, code=code, **environment)

    def expected(self, method: str = "task_arithmetic", *words: str) -> tiny.Tensors:
        local = self.site.local
        paths = [str(local[name]) for name in ("org/one", "org/sharded")]
        if not (self.folder / "expected").exists():
            self("-m", method, "--base", str(local["org/base"]), *paths, *words, "-o", "expected")
        return tiny.load(self.folder / "expected")

    def cached(self) -> list[Path]:
        return [p for p in (self.folder / self.home).rglob("*") if p.is_file() and p.stat().st_size > 10_000]


@pytest.fixture
def shell(site: Site, tmp_path: Path) -> Shell:
    site.hub.clear()
    return Shell(site, tmp_path)


def weights(log: list[Request], name: str = "safetensors") -> list[Request]:
    """The requests for the bytes of weights."""
    return [each for each in log if each.path.startswith("/storage/") and name in each.path and each.method == "GET"]


def test_a_dry_run_downloads_kilobytes(site: Site, shell: Shell, tmp_path: Path) -> None:
    header = {"w": {"dtype": "BF16", "shape": [20_000, 4096], "data_offsets": [0, 20_000 * 4096 * 2]}}
    text = json.dumps(header).encode()
    for name in ("base", "tuned"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(tiny.CONFIG))
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + 20_000 * 4096 * 2)
        site.hub.put(f"big/{name}", folder)
    site.hub.clear()
    facts = json.loads(shell("-m", "linear", "--base", "big/base", "big/tuned", "--dry-run", "--json"))
    assert facts["write_bytes"] == 20_000 * 4096 * 2
    assert 0 < sum(each.sent for each in site.hub.log()) < 200_000
    site.hub.clear()
    shown = json.loads(shell("inspect", "big/tuned", "--json"))[0]
    assert shown["parameters"] == 20_000 * 4096
    assert sum(each.sent for each in site.hub.log()) < 100_000


def test_a_merge_from_the_hub_is_the_merge_of_the_same_files(site: Site, shell: Shell, tmp_path: Path) -> None:
    shell.merge("out")
    assert tiny.identical(tiny.load(tmp_path / "out"), shell.expected())
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"model": {}}
    # pinned: in the recipe, in the header and in the card
    card = (tmp_path / "out" / "README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert recipe["models"] == [f"org/{name}@{site.shas['org/' + name]}" for name in ("one", "sharded")]
    assert recipe["base"] == f"org/base@{site.shas['org/base']}"
    facts = yaml.safe_load(card.split("---")[1])
    assert facts["base_model"] == ["org/one", "org/sharded", "org/base"]
    assert facts["base_model_relation"] == "merge"
    assert facts["license"] == "cc-by-nc-4.0"
    # all of it is in the cache now: one question a model, and none at all offline
    site.hub.clear()
    shell.merge("again")
    assert [each.path for each in site.hub.log()] == [f"/api/models/org/{name}" for name in ("one", "sharded", "base")]
    site.hub.clear()
    shell.merge("offline", HF_HUB_OFFLINE="1")
    assert site.hub.log() == []
    for name in ("again", "offline"):
        assert tiny.identical(tiny.load(tmp_path / name), shell.expected())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shell("run", "recipe.yaml", "-o", "rerun")
    assert tiny.identical(tiny.load(tmp_path / "rerun"), shell.expected())


def test_streaming_keeps_nothing_and_fetches_each_file_once(site: Site, shell: Shell, tmp_path: Path) -> None:
    shape = {"layers": 6, "width": 128, "vocab": 512}  # matrices of more than the bytes that are asked for alone
    base, (one, _) = tiny.checkpoint(tmp_path / "local", 2, **shape)
    other = tiny.save(tmp_path / "local" / "other", tiny.fine_tune(tiny.model(**shape), 5), shards=3)
    for name, path in (("base", base), ("one", one), ("other", other)):
        site.hub.put(f"wide/{name}", path)
    site.hub.clear()
    dare = ("-m", "dare", "--seed", "3", "--base")
    shell(*dare, "wide/base", "wide/one", "wide/other", "-o", "out", "--stream", "--threads", "1")
    shell(*dare, str(base), str(one), str(other), "-o", "expected")
    assert tiny.identical(tiny.load(tmp_path / "out"), tiny.load(tmp_path / "expected"))
    assert shell.cached() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "home", "local", "out"]
    whole = [each.path for each in weights(site.hub.log()) if each.range is None]
    assert len(whole) == len(set(whole)) == 5


def test_failures_that_pass_are_waited_for(site: Site, shell: Shell, tmp_path: Path) -> None:
    hub = site.hub
    hub.fail(r"GET /api/models/org/one", [503, 429], retry_after=1)
    hub.fail(r"GET /storage/org/one", [503])
    hub.fail(r"GET /org/sharded/resolve/.*model-00001", [500])
    hub.cut(r"GET /storage/org/base/.*model.safetensors", 35_000, times=2)
    hub.corrupt(r"GET /storage/org/sharded/.*model-00002")
    began = time.monotonic()
    shell.merge("out")
    assert time.monotonic() - began > 2  # Retry-After, twice
    assert tiny.identical(tiny.load(tmp_path / "out"), shell.expected())
    statuses = [each.status for each in hub.log()]
    assert {503, 429, 500} <= set(statuses)


def test_what_arrives_damaged_is_caught(site: Site, shell: Shell) -> None:
    site.hub.corrupt(r"GET /storage/org/one/.*model.safetensors", offset=-9, times=50)
    told = shell.merge("out", code=1)
    assert "has another hash than the Hub states" in told
    assert "org/one" in told
    assert not (shell.folder / "out").exists()
    good = site.hub.files("org/one")["model.safetensors"]
    assert not list((shell.folder / "home").rglob(f"**/blobs/{good}*"))
    site.hub.clear()
    shell.merge("out")
    assert tiny.identical(tiny.load(shell.folder / "out"), shell.expected())


@POSIX
def test_a_download_that_was_killed_goes_on(site: Site, shell: Shell, tmp_path: Path) -> None:
    big = {"w": torch.randn(10_000_000, generator=torch.Generator().manual_seed(1))}
    site.hub.put("big/one", tiny.save(tmp_path / "one", big))
    site.hub.clear()
    site.hub.throttle(r"GET /storage/big/one", 25_000_000)
    with subprocess.Popen(
        [sys.executable, "-m", "merging", "-m", "passthrough", "big/one", "-o", "out"],
        env=shell.environment(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and not _arrived(tmp_path):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    held = _arrived(tmp_path)
    assert 0 < held < 40_000_000 and not (tmp_path / "out").exists()
    site.hub.clear()
    site.hub.cut(r"GET /storage/big/one", 25_000_000)
    shell("-m", "passthrough", "big/one", "-o", "out")
    assert tiny.identical(tiny.load(tmp_path / "out"), big)
    assert f"bytes={held}-" in [each.range for each in weights(site.hub.log())]


def _arrived(folder: Path) -> int:
    """The bytes of a download that is under way."""
    return sum(path.stat().st_size for path in (folder / "home").rglob("*.part"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("org/nothing", "is neither a local path nor a model on the Hub"),
        ("org/gated", "is gated: ask for access on"),
        ("org/hidden", "is neither a local path nor a model on the Hub"),
        ("org/base@v9", "the model has no such revision"),
        ("hf://org/base/model.safetensor", "holds no such file or folder (did you mean 'model.safetensors'?)"),
        ("https://example.com/org/base", "is not on the Hub"),
    ],
)
def test_what_cannot_be_had_is_said(site: Site, shell: Shell, name: str, told: str) -> None:
    if name in ("org/gated", "org/hidden"):
        site.hub.put(name, site.local["org/one"], gated=name == "org/gated", private=name == "org/hidden")
    assert told in shell("inspect", name, code=1)


def test_a_hub_that_is_down_is_said_in_seconds(tmp_path: Path, hub: Hub) -> None:
    hub.put("org/base", {"config.json": b"{}"})
    hub.stop()
    done = subprocess.run(
        [sys.executable, "-m", "merging", "inspect", "org/base"],
        env=hub.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert "org/base: there is no such file or folder here, and the Hub" in done.stderr
    assert "cannot be reached" in done.stderr and "HF_HUB_OFFLINE=1" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "loras/count"),
        ("verify", "loras/count"),
        ("-m", "linear", "loras/count", "loras/counts"),
        ("compare", "loras/count", "loras/counts"),
        ("continual", "init", "store", "--base", "loras/count"),
        ("pool", "build", "pool", "--base", "org/base", "loras/count"),
    ],
    ids=" ".join,
)
def test_a_name_in_a_folder_that_is_here_is_not_asked_of_the_hub(
    site: Site, shell: Shell, words: tuple[str, ...]
) -> None:
    """A typing error in a local name: the folder is here, and has a name that is near."""
    (shell.folder / "loras" / "counts").mkdir(parents=True)
    site.hub.clear()
    told = shell(*words, code=1)
    assert "loras/count: there is no such file or folder (did you mean 'counts'?)" in told
    assert not site.hub.log()


def test_a_token_opens_gated_models_and_goes_to_no_other_host(site: Site, shell: Shell) -> None:
    site.hub.put("org/gated", site.local["org/one"], gated=True)
    site.hub.clear()
    shell.token = site.hub.token
    shell("-m", "linear", "--base", "org/base", "org/gated", "org/one", "-o", "out")
    log = site.hub.log()
    assert all(each.authorization for each in log if each.host == site.hub.url)
    assert {each.host for each in log} == {site.hub.url, site.hub.storage}
    assert not any(each.authorization for each in log if each.host == site.hub.storage)


def test_adapters_of_the_hub(site: Site, shell: Shell, tmp_path: Path) -> None:
    url = f"{site.hub.url}/org/spam/tree/main"
    shell("-m", "lines", "org/bbc", url, "-o", "out")
    shell("-m", "lines", str(EXAMPLES / "bbc"), str(EXAMPLES / "spam"), "-o", "local")
    assert tiny.identical(tiny.load(tmp_path / "out"), tiny.load(tmp_path / "local"))
    assert "adapter (PEFT" in shell("inspect", "org/bbc")
    file = f"hf://org/bbc@{site.shas['org/bbc']}/adapter_model.safetensors"
    assert json.loads(shell("inspect", file, "--json"))[0]["rank"] == 8


def test_what_is_published_comes_back_equal(site: Site, shell: Shell, tmp_path: Path) -> None:
    told = shell.merge("out", "--push", "me/merged", code=1)
    assert "log in first" in told
    shell.token = site.hub.token
    printed = json.loads(shell.merge("out", "--push", "me/merged", "--private", "--json"))
    assert printed["published"].startswith("me/merged@")
    shell.home = "elsewhere"
    shell("-m", "passthrough", "me/merged", "-o", "back")
    assert tiny.identical(tiny.load(tmp_path / "back"), tiny.load(tmp_path / "out"))
    assert site.hub.files("me/merged")["README.md"]
    # it holds a model now: not replaced in silence, and with --overwrite by one commit
    told = shell.merge("out2", "--push", "me/merged", code=1)
    assert "me/merged: holds" in told and not (tmp_path / "out2").exists()
    again = json.loads(shell("push", "out", "me/merged", "--overwrite", "--json"))
    assert again["published"].startswith("me/merged@")
    assert "--push publishes a folder" in shell.merge("x.safetensors", "--push", "me/merged", code=1)


def test_a_repository_that_someone_else_changes_meanwhile_is_left_alone(
    site: Site, shell: Shell, tmp_path: Path
) -> None:
    shell.token = site.hub.token
    shell("-m", "linear", str(site.local["org/one"]), str(site.local["org/base"]), "-o", "out")
    site.hub.put("me/shared", {"README.md": b"first\n"})
    site.hub.clear()
    site.hub.delay(r"POST /api/models/me/shared/preupload", 1.5)
    with subprocess.Popen(
        [sys.executable, "-m", "merging", "push", "out", "me/shared"],
        env=shell.environment(),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not any("preupload" in each.path for each in site.hub.log()) and process.poll() is None:
            time.sleep(0.05)
        site.hub.put("me/shared", {"other.txt": b"mine\n"})
        _, told = process.communicate()
    assert process.returncode == 1
    assert "was changed by someone else meanwhile: nothing was published" in told
    assert set(site.hub.files("me/shared")) == {"README.md", "other.txt"}


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("org/name", Address("org/name")),
        ("org/name@v1.0", Address("org/name", "v1.0")),
        ("org/name@refs/pr/3", Address("org/name", "refs/pr/3")),
        ("org/name@abc/sub/x.safetensors", Address("org/name", "abc", "sub/x.safetensors")),
        ("hf://org/name/sub", Address("org/name", None, "sub")),
        ("hf://org/name@refs/pr/3/sub", Address("org/name", "refs/pr/3", "sub")),
        ("https://huggingface.co/org/name", Address("org/name")),
        ("https://huggingface.co/org/name/blob/main/a/b.safetensors", Address("org/name", "main", "a/b.safetensors")),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3", Address("org/name", "refs/pr/3")),
        ("name", None),
        ("./org/name", None),
        ("/org/name", None),
        ("org/name/more", None),
        ("org/name.safetensors", None),
        ("tests/nothing", None),
        ("examples/adapters", None),
    ],
)
def test_what_an_address_is(name: str, address: Address | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert hub_address(name) == address
    if address is not None and not name.startswith("http"):
        assert hub_address(f"hf://{address}") == address


@pytest.mark.parametrize("name", ["hf://name", "hf://org/name/../x", "hf://", "https://huggingface.co/org"])
def test_what_begins_as_an_address_and_is_none(name: str) -> None:
    with pytest.raises(InputError):
        hub_address(name)


@pytest.mark.parametrize(
    ("licences", "strictest_of_them"),
    [
        (["mit", "mit"], "mit"),
        (["mit", "cc-by-nc-4.0", "apache-2.0"], "cc-by-nc-4.0"),
        (["llama3.1", "llama3.1"], "llama3.1"),
        (["mit", "llama3.1"], None),
        (["mit", None], None),
        (["gpl-3.0", "cc-by-nc-4.0"], None),
        ([], None),
    ],
)
def test_the_strictest_licence_wins_and_none_is_invented(
    licences: list[str | None], strictest_of_them: str | None
) -> None:
    assert strictest(licences) == strictest_of_them
    assert (strictest_of_them or "none is stated") in licence_sentence(strictest_of_them)


def test_recipes_in_recipes_are_pinned(site: Site, shell: Shell, tmp_path: Path) -> None:
    """A tree of stages reads each model once, and its recipe names every model by its commit."""
    stage = {"models": ["org/one", "org/sharded"], "method": "ties", "base": "org/base"}
    layers = {"stack": [{"model": "org/one", "layers": "0:4"}, {"model": "org/sharded", "layers": "4:6"}]}
    tree = {"models": [stage, layers], "method": "dare+task_arithmetic", "base": "org/base"}
    (tmp_path / "tree.yml").write_text(json.dumps(tree))
    shell("run", "tree.yml", "-o", "out")
    card = (tmp_path / "out" / "README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    pins = {name: f"{name}@{site.shas[name]}" for name in ("org/one", "org/sharded", "org/base")}
    assert recipe == json.loads(json.dumps(tree).replace('"org/one"', f'"{pins["org/one"]}"')
                                .replace('"org/sharded"', f'"{pins["org/sharded"]}"')
                                .replace('"org/base"', f'"{pins["org/base"]}"'))  # fmt: skip
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-nc-4.0"
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"model": {}}
    local = json.loads(json.dumps(tree))
    text = json.dumps(local)
    for name, path in site.local.items():
        text = text.replace(f'"{name}"', json.dumps(str(path)))
    (tmp_path / "local.yml").write_text(text)
    shell("run", "local.yml", "-o", "by-files")
    assert tiny.identical(tiny.load(tmp_path / "out"), tiny.load(tmp_path / "by-files"))


def test_errors_about_models_of_the_hub_have_their_line(shell: Shell, tmp_path: Path) -> None:
    for text in (
        "models:\n- org/one\n- org/none\nmethod: linear\n",
        "models:\n- org/one\n- {models: [org/none], method: linear}\nmethod: linear\n",
    ):
        (tmp_path / "recipe.yml").write_text(text)
        said = shell("run", "recipe.yml", "--dry-run", code=1)
        assert said.startswith("Error: recipe.yml, line 3: ")
        assert "org/none" in said
    (tmp_path / "recipe.yml").write_text("models:\n- org/one@\nmethod: linear\n")
    assert shell("run", "recipe.yml", "--dry-run", code=1).startswith("Error: recipe.yml, line 2: org/one@")
