"""Common to all tests: one thread, no Hub but the project's own for those that ask for it, and few random examples.

``pytest --hypothesis-profile many`` draws more examples of the laws that hold of every method, other ones each time.
"""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch
from hypothesis import settings

from support.hub_fixture import hub

__all__ = ["hub"]

torch.set_num_threads(1)
settings.register_profile("few", max_examples=3, deadline=None, derandomize=True)
settings.register_profile("many", max_examples=12, deadline=None)
settings.load_profile("few")
