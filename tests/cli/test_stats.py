"""``merge stats``, and a merge with its files, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from merging.cli.main import cli
from support.example_statistics import save_runnable, write_texts


def test_statistics_and_a_merge(tmp_path: Path) -> None:
    base, tuned = save_runnable(tmp_path, "bert")
    files = []
    for number, model in enumerate(tuned):
        data = write_texts(tmp_path / f"{number}.jsonl", seed=number)
        files.append(str(tmp_path / f"{number}.safetensors"))
        words = ["stats", str(model), "--data", str(data), "--fisher", "sampled", "-o", files[-1]]
        done = CliRunner().invoke(cli, [*words, "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["examples"] == 6
        again = CliRunner().invoke(cli, words)
        assert again.exit_code == 1
        assert "--overwrite" in again.output
    for method in ("regmean", "fisher"):
        words = ["-m", method, "--base", str(base), *map(str, tuned), "-o", str(tmp_path / method)]
        refused = CliRunner().invoke(cli, words)
        assert refused.exit_code == 1
        assert f"{method} needs statistics of examples" in refused.output
        assert "--stats" in refused.output
        done = CliRunner().invoke(cli, [*words, "--stats", files[1], "--stats", files[0]])
        assert done.exit_code == 0, done.output
    recipe = CliRunner().invoke(cli, [*words, "--stats", files[0], "--recipe-only"]).stdout
    assert f"stats:\n- {files[0]}\n" in recipe


def test_statistics_through_the_merge(tmp_path: Path) -> None:
    base, tuned = save_runnable(tmp_path, "bert")
    data = [str(write_texts(tmp_path / f"{number}.jsonl", seed=number)) for number in range(2)]
    words = ["stats", *map(str, tuned), "--data", data[0], "--data", data[1], "-o", str(tmp_path / "stats")]
    for more, message in (
        ([], "2 models and 2 files of examples: gather statistics of one model at a time, or of all"),
        (["--through-merge", "--fisher", "sampled"], "--fisher goes with statistics of one model alone"),
        (["--exclude", "pooler"], "--exclude is for statistics of several models: use it with --through-merge"),
        (["--through-merge"], "give --base"),
    ):
        refused = CliRunner().invoke(cli, [*words, *more])
        assert refused.exit_code == 1
        assert message in refused.output
    done = CliRunner().invoke(cli, [*words, "--through-merge", "--base", str(base), "--exclude", "cls.*", "--json"])
    assert done.exit_code == 0, done.output
    files = [each["path"] for each in json.loads(done.stdout)]
    assert files == [str(tmp_path / "stats" / f"{model.name}.safetensors") for model in tuned]
    again = CliRunner().invoke(cli, [*words, "--through-merge", "--base", str(base)])
    assert again.exit_code == 1
    assert "--overwrite" in again.output
