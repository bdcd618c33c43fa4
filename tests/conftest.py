"""What every test lives with: one thread, and no Hub but the project's own, for those that ask for it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hub_fixture import hub

__all__ = ["hub"]

torch.set_num_threads(1)
