"""Numbers that the authors of methods and others published, and the adapters that they hold for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["GOLDEN", "golden_adapters"]

# Name -> (Frobenius norm, sum, entry [0, 0], entry [5, 4]) of merges of the golden adapters, to six digits.
GOLDEN = {
    "D_0": (5.706084, 14.677922, 1.658983, -0.781183),
    "D_1": (4.140893, -1.184686, 1.311898, -0.644407),
    "D_2": (1.925398, -4.110180, 0.374543, 0.181613),
    "mean": (3.488067, 3.127685, 1.115141, -0.414659),
    "LoraHub w=(.5,-.3,.8) (factor sums)": (2.142913, -2.705226, 0.646092, -0.242253),
    "same w on deltas": (2.455880, 4.406223, 0.735557, -0.051979),
    "VaRM": (4.699230, 8.281669, 1.458414, -0.670452),
    "SCE t=1": (4.822058, 7.588995, 1.458414, -0.734000),
    "SCE t=0.1 deltas": (2.662664, 4.607494, 0.0, 0.0),
    "SCE t=0.1 weights": (5.275683, 9.887205, 1.579078, -0.750980),
    "SCE t=0.5 deltas": (4.635371, 15.683494, 1.564368, -0.749408),
    "SCE t=0.5 weights": (5.222199, 9.636454, 1.564368, -0.749408),
    "TIES keep 1": (3.802093, 3.401955, 1.115141, -0.712795),
    "TIES keep 0.2": (4.368347, 3.593080, 1.485440, 0.0),
    "KnOTS-TIES keep 1": (4.014578, 2.363031, 1.040800, -0.608824),
    "KnOTS-TIES keep 0.2": (4.128290, 0.222775, 1.023044, 0.0),
    "TSV-M, T=2 (i=0,1), k=2": (7.050276, 7.800810, 2.675110, 0.012477),
    "Iso-C on D_0+D_1, rank-restricted (R=4)": (5.004827, 4.777619, 1.679650, 1.304921),
    "Iso-C on D_0+D_1, mean over all 5 values": (4.476454, 3.822094, 1.293197, 1.013042),
    "ternary D_0, k=20%, alpha=1": (2.252910, 5.518479, 0.919747, 0.0),
}


def golden_adapters() -> list[tuple[Tensor, Tensor]]:
    """The three adapters `(up [6, 2], down [2, 5])` of the golden table; `D_i` is `up @ down`."""

    def up(i: int) -> list[list[float]]:
        return [[math.cos(0.5 + 0.4 * i + 0.23 * p * (q + 1) - 0.2 * q) for q in range(2)] for p in range(6)]

    def down(i: int) -> list[list[float]]:
        return [[math.sin(1 + 0.7 * i + 0.3 * a + 0.11 * b * (a + 1)) for b in range(5)] for a in range(2)]

    return [(torch.tensor(up(i), dtype=torch.float64), torch.tensor(down(i), dtype=torch.float64)) for i in range(3)]
