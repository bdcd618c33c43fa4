"""Predictions follow the work, the machines and the rates."""

from __future__ import annotations

from pathlib import Path

import pytest

import merging
from merging.api.calibrate import load_rates, rates_path, save_rates
from merging.api.predict import format_flops, format_seconds, predict_plan
from merging.errors import FormatError, OptionError
from merging.plan import Plan
from merging.plan.prediction.cluster import Cluster
from merging.plan.prediction.rates import DEFAULT, MethodRates, Rates
from support.tiny import fine_tune, model, save


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = model(0, width=32)
    paths = [save(tmp_path / str(number), fine_tune(base, number)) for number in range(2)]
    return merging.preview(paths, method="tsv", base=save(tmp_path / "base", base))


def test_default_rates_are_named_until_a_machine_is_measured(plan: Plan) -> None:
    assert "default rates: merge plan on the command line" in merging.predict(plan).notices[0]
    mine = Rates(machine="mine", methods={"tsv": MethodRates(item=1.0, element=0.0)})
    assert save_rates(mine) == rates_path()
    assert load_rates() == mine
    found = merging.predict(plan)
    assert (found.machine, found.notices) == ("mine", ())
    assert found.processor_seconds == pytest.approx(len(plan.items), rel=0.01)
    rates_path().write_text('{"methods": {"tsv": {"itm": 1}}}')
    with pytest.raises(FormatError, match="holds no rates of this version: calibrate again"):
        load_rates()


def test_a_method_from_elsewhere_has_rates() -> None:
    assert DEFAULT.of("mine") == DEFAULT.of("ties")
    assert set(DEFAULT.methods) == set(merging.METHODS)


def test_nodes_share_the_work(plan: Plan) -> None:
    slow = {"disk": 1e3, "price": 3600.0, "cores": 2}
    one, two = (predict_plan(plan, Cluster(nodes=nodes, **slow), DEFAULT) for nodes in (1, 2))
    assert one.bound == two.bound == "disk"
    assert two.seconds == one.seconds / 2
    assert one.cost == two.cost == pytest.approx(one.seconds)
    many = predict_plan(plan, Cluster(nodes=1000, disk=1e15), DEFAULT)
    assert many.bound == "largest tensor"
    assert many.seconds > many.processor_seconds / 1000


def test_later_sweeps_read_what_the_memory_does_not_keep(plan: Plan) -> None:
    ties = merging.preview([model.path for model in plan.models], method="ties", base=plan.base and plan.base.path)
    kept = predict_plan(ties, Cluster(), DEFAULT)
    again = predict_plan(ties, Cluster(memory=ties.memory(1), nodes=1), DEFAULT)
    assert kept.disk_bytes * 4 == kept.read_bytes == again.read_bytes
    assert again.disk_bytes == kept.disk_bytes  # small models stay in any memory
    with pytest.raises(OptionError, match="of a node is too little: this merge needs"):
        predict_plan(ties, Cluster(memory=1000), DEFAULT)


def test_gpus_are_by_assumed_rates(plan: Plan) -> None:
    found = predict_plan(plan, Cluster(gpus=2, disk=1e15), DEFAULT)
    assert (found.workers, found.bound in ("GPUs", "largest tensor")) == (2, True)
    assert "no GPU was measured" in found.notices[-1]


def test_a_recipe_is_predicted(plan: Plan) -> None:
    found = merging.predict(plan.recipe, cluster="nodes=2,price=1")
    assert found.write_bytes == plan.out_bytes
    assert found.to_dict()["nodes"] == 2
    assert "nodes" in repr(found)


def test_times_and_operations_are_written_for_people() -> None:
    assert [format_seconds(each) for each in (0.123, 12.4, 300, 3 * 3600, 10 * 86400)] == [
        "0.12 s", "12 s", "5 min", "3 h", "10 days",
    ]  # fmt: skip
    assert [format_flops(each) for each in (0, 12, 3e6, 2.5e15)] == ["0 FLOP", "12 FLOP", "3.0 MFLOP", "2.5 PFLOP"]
