"""Remarks on decomposed changes."""

from __future__ import annotations

from pathlib import Path

import pytest

import merging
from merging.engine.decomposition import Decomposition
from merging.engine.spool import Spool
from merging.maths.spectra import SingularValues
from merging.plan.rank_settings import RankSettings
from support.tiny import adapters


@pytest.mark.parametrize(("rough", "said"), [(1, "1 change was"), (2, "2 changes were")])
def test_changes_that_were_decomposed_approximately_are_counted(tmp_path: Path, rough: int, said: str) -> None:
    _, changes = adapters(tmp_path, 2)
    plan = merging.preview(changes, method="linear", rank=RankSettings(energy=0.9))
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    spectra = {
        name: SingularValues((2.0, 1.0), total=5.0, full=3, excess=0.5 if number < rough else 0.0)
        for number, name in enumerate(names)
    }
    remarks = Decomposition(plan, Spool(tmp_path), spectra=spectra).describe(dict.fromkeys(names, 2))
    assert remarks == [
        f"{said} decomposed approximately: exact factors keep at most 10.00% more of the energy of any (exact=True)"
    ]
