"""Names of version 0.1 that users import or write as keywords still work."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest

import merging
from merging.api.prototypes import export_prototypes
from merging.continual.watch import watch
from merging.errors import OptionError
from merging.pool import Entry, Pool
from merging.version import former_parameters

PUBLIC = {
    "merging": "METHODS ContinualStore Delta Dense FormatError InputError LowRank Merged MergingError OptionError "
    "OutputError Recipe Recycled __version__ chain compare compress decompress load_recipe merge merge_deltas "
    "merge_state_dicts peft_deltas peft_state_dict preview recycle",
    "merging.compression": "Compressed Decompressed compress decompress",
    "merging.continual": "Busy ContinualStore Damaged Unconfirmed Verdict",
    "merging.geometry": "Comparison Signs compare cosines gram sign_agreement spectra",
    "merging.hub": "address cards client download open_model remote repository",
    "merging.methods": "ALIASES Alias GROUPS Listed MERGEKIT METHODS aliases chain expanded links method_class "
    "owner_of parameters_of",
    "merging.pool": "Built Entry Finding Pool Verdict",
    "merging.recycling": "Recycled Report Row Settings Verdict recycle",
    "merging.serving": "Finding PROGRAMS Verdict verify",
}
"""The public names of version 0.1 by package."""


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_importable(package: str) -> None:
    module = import_module(package)
    assert [name for name in PUBLIC[package].split() if not hasattr(module, name)] == []


def test_former_attributes() -> None:
    assert Pool.also_called is Pool.add_base_names
    assert Entry.smoked is Entry.smoke_tested


def test_former_parameters_are_accepted_with_a_warning(tmp_path: Path) -> None:
    with pytest.deprecated_call(match="normalise= is called normalize="), pytest.raises(OptionError, match="length 1"):
        export_prototypes(["a", "b"], tmp_path / "p.safetensors", kind="arrow", normalise=True)  # type: ignore[call-arg]
    with pytest.deprecated_call(match="told= is called on_event="), pytest.raises(merging.MergingError):
        merging.recycle(tmp_path, base=tmp_path, train=[], told=print)  # type: ignore[call-arg]
    for function in (watch, Pool.build, Pool.dedupe, Pool.smoke, Pool.remove):
        assert "on_event" in inspect.signature(function).parameters
        with pytest.raises(TypeError, match="on_event is given twice"):
            function(tell=print, on_event=print)  # type: ignore[operator]


def test_the_function_receives_the_present_name() -> None:
    @former_parameters({"old": "new"})
    def function(*, new: int) -> int:
        return new

    with pytest.deprecated_call() as caught:
        assert function(old=3) == 3  # type: ignore[call-arg]
    assert [each.filename for each in caught] == [__file__]
    assert function(new=4) == 4
