"""The folder of an unfinished run: who may use it, what is resumed, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from merging.errors import FormatError, OptionError
from merging.recycling.data import read_examples
from merging.recycling.input_states import input_states
from merging.recycling.run_checkpoint import RunCheckpoint
from merging.searches.settings import make_search_settings
from merging.searches.trials import show_score
from merging.soups.scoring import make_scorer
from support.systems import POSIX
from support.tiny import checkpoint as make_model


@POSIX
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_one_run_at_a_time_uses_the_folder(tmp_path: Path, options: dict[str, bool]) -> None:
    with closing(RunCheckpoint(tmp_path / "run", {})) as first:
        first.keep("a stage", 1)
        with pytest.raises(OptionError, match="another run makes this output now"):
            RunCheckpoint(tmp_path / "run", {}, **options)
        assert first.get("a stage") == 1
    with closing(RunCheckpoint(tmp_path / "run", {}, resume=True)) as second:
        assert second.get("a stage") == 1
        second.remove()
    assert not any(tmp_path.iterdir())


def test_a_refused_run_gives_up_the_folder(tmp_path: Path) -> None:
    RunCheckpoint(tmp_path / "run", {"seed": 1}).close()
    for _ in range(2):
        with pytest.raises(OptionError, match="had another seed"):
            RunCheckpoint(tmp_path / "run", {"seed": 2}, resume=True)


def test_a_resumed_run_removes_models_in_hand(tmp_path: Path) -> None:
    with closing(RunCheckpoint(tmp_path / "run", {})) as first:
        first.keep("a stage", 1)
        make_model(tmp_path / "run" / "in-hand", 1)
    with closing(RunCheckpoint(tmp_path / "run", {}, resume=True)):
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a-stage.pt", "plan.json"]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:40], lambda data: b"hello" * 9])
def test_a_damaged_stage_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    with closing(RunCheckpoint(tmp_path / "run", {})) as run:
        run.keep("a stage", {"step": 1})
        file = tmp_path / "run" / "a-stage.pt"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(FormatError, match=r"a-stage\.pt: is damaged: remove this file, and resume=True"):
            run.get("a stage")


def test_weights_of_the_same_size_are_another_input(tmp_path: Path) -> None:
    names = [str(path) for path in make_model(tmp_path, 2)[1]]
    before = input_states(names)
    assert before == input_states(names) != input_states(names[::-1])
    file = next(Path(names[1]).glob("*.safetensors"))
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    after = input_states(names)
    assert after[0] == before[0]
    assert after[1] != before[1]


# --- values that a run is given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a \\ud83d", "label": "x"}', "text holds half a character"),
        ('{"text": "a", "label": "\\ud83d"}', "label holds half a character"),
        ('{"text": "a", "label": %s}' % ("9" * 5000), "holds a number that is too long"),
    ],
)
def test_examples_that_no_tokenizer_takes(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(f'{{"text": "fine \\ud83d\\ude00", "label": "x"}}\n{line}\n')
    with pytest.raises(FormatError, match=f"line 2: {message}|line 2 {message}"):
        read_examples(tmp_path / "data.jsonl")


@pytest.mark.parametrize("options", [{"seed": 1 << 63}, {"budget": 10**9}])
def test_settings_beyond_their_range(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="should be"):
        make_search_settings(options)


@POSIX
def test_a_timeout_beyond_the_clock_of_the_system_is_no_limit(tmp_path: Path) -> None:
    assert make_scorer("sh -c 'echo 3'", 1e300)(tmp_path) == 3


def test_minimized_scores_are_shown_as_printed() -> None:
    assert [show_score(-2.5, None, minimized) for minimized in (True, False)] == ["2.5", "-2.5"]
