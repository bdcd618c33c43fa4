"""Common to all tests: one thread, no Hub but the project's own for those that ask for it, and few random examples.

``pytest --hypothesis-profile many`` draws more examples of the laws that hold of every method, other ones each time.
``pytest --one-in 3`` runs one case in three of each test with parameters, and tests with one or two cases whole.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from zlib import crc32

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings

from support.hub_fixture import hub

__all__ = ["hub"]

torch.set_num_threads(1)
settings.register_profile("few", max_examples=3, deadline=None, derandomize=True)
settings.register_profile("many", max_examples=12, deadline=None)
settings.load_profile("few")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run one case in N of tests with parameters")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases as ``--one-in`` says. The name of the test decides where it begins to count."""
    step = config.getoption("one_in")
    cases: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept: set[pytest.Item] = set()
    for test, found in cases.items():
        first = crc32(test.encode()) % min(step, len(found))
        kept.update(found[first::step] if len(found) > 2 else found)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
