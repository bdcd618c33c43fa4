"""The workflows run parts of .ci/run that exist, with actions pinned to a commit, on the Pythons that are claimed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.paths import ROOT

RUN = ROOT / ".ci" / "run"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PARTS = re.search(r'^PARTS="(.*)"$', RUN.read_text(encoding="utf-8"), re.MULTILINE)[1].split()  # type: ignore[index]
PINNED = re.compile(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")


def read_jobs(workflow: Path) -> dict[str, Any]:
    return yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]


def find_commands(job: dict[str, Any]) -> Iterator[str]:
    """Yield each command of a job, once for each value of the matrix that it names."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for step in job["steps"]:
        command = step.get("run", "")
        named = re.search(r"\$\{\{ matrix\.(\w+) \}\}", command)
        if named is None:
            yield command
        else:
            values = [*matrix.get(named[1], []), *(row[named[1]] for row in matrix.get("include", []))]
            assert values, f"no values of {named[1]}"
            yield from (command.replace(named[0], value) for value in values)


def find_parts(workflow: Path) -> list[str]:
    commands = [command for job in read_jobs(workflow).values() for command in find_commands(job)]
    return [part for command in commands if command.startswith(".ci/run") for part in command.split()[1:]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_parts_that_exist(workflow: Path) -> None:
    if workflow.stem != "release":
        assert find_parts(workflow)
    assert set(find_parts(workflow)) <= set(PARTS)


def test_each_part_runs_in_a_workflow() -> None:
    """But for `pythons`: there the matrix is."""
    run = {part for workflow in WORKFLOWS for part in find_parts(workflow)}
    assert run == set(PARTS) - {"pythons"}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_rights_are_few(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    used = [line.strip().removeprefix("- ") for line in text.splitlines() if "uses:" in line]
    assert used
    assert not [line for line in used if not PINNED.fullmatch(line)]
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    for job in read_jobs(workflow).values():
        assert set(job.get("permissions", {})) <= {"id-token", "pages"}


def test_the_matrix_has_every_python_that_is_claimed() -> None:
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    (workflow,) = (path for path in WORKFLOWS if path.stem == "tests")
    matrix = read_jobs(workflow)["tests"]["strategy"]["matrix"]
    assert set(claimed) <= set(matrix["python"])
    assert {os.partition("-")[0] for os in matrix["os"]} == {"ubuntu", "macos", "windows"}


def test_the_hooks_run_the_ruff_that_is_pinned() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (version,) = (repo["rev"].removeprefix("v") for repo in hooks if repo["repo"].endswith("/ruff-pre-commit"))
    assert f"\nruff=={version}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="`bash` is another system's on Windows")
def test_an_unknown_part_is_refused_before_anything_runs() -> None:
    done = subprocess.run(["bash", RUN, "lint", "lnit"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lnit: no such part")
    for part in PARTS:
        assert part in done.stderr
