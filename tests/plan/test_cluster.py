"""Clusters as people write them."""

from __future__ import annotations

import pytest

from merging.errors import OptionError
from merging.plan.prediction.cluster import Cluster, parse_cluster

REFUSED = {
    "node=8": "cluster: there is no key 'node' (did you mean 'nodes'?)",
    "fun=8": "cluster: there is no key 'fun': the keys are nodes, cores, gpus, memory, disk, net, storage, price",
    "nodes=0": "cluster: nodes = '0': write a number of machines, as nodes=8",
    "nodes=2.5": "cluster: nodes = '2.5': write a number of machines, as nodes=8",
    "nodes": "cluster: nodes has no value: write a number of machines, as nodes=8",
    "nodes=1,nodes=2": "cluster: nodes is given twice: leave one of them out",
    "disk=2": "cluster: disk = '2': write bytes a second, as disk=2GB/s",
    "disk=2GB": "cluster: disk = '2GB': write bytes a second, as disk=2GB/s",
    "disk=0GB/s": "cluster: disk = '0GB/s': write bytes a second, as disk=2GB/s",
    "net=25Xb/s": "cluster: net = '25Xb/s': write bits or bytes a second, as net=25Gb/s or net=3GB/s",
    "memory=64": "cluster: memory = '64': write the memory of a node, as memory=64GB",
    "price=2EUR": "cluster: price = '2EUR': write the price of a node for an hour, as price=2.5",
    " , ": "cluster: ' , ' describes no machines: write nodes=8,gpus=1,disk=2GB/s,net=25Gb/s,price=2.5",
}


def test_units_are_read() -> None:
    found = parse_cluster("nodes=8, gpus=0, cores=4, memory=64GiB, disk=2GB/s, net=25Gb/s, storage=500MB/s, price=2.5")
    assert found == Cluster(
        nodes=8, cores=4, memory=64 << 30, disk=2e9, net=25e9 / 8, storage=500e6, price=2.5
    )  # bits and bytes
    assert parse_cluster("net=3GB/s").net == 3e9


@pytest.mark.parametrize("text", REFUSED)
def test_wrong_values_are_refused(text: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse_cluster(text)
    assert str(raised.value) == REFUSED[text]


def test_a_node_gets_the_slowest_of_its_ways_to_the_storage() -> None:
    assert Cluster().rate(1e9) == 1e9
    assert Cluster(disk=2e9, net=1e9).rate(1e9) == 2e9  # one node reads its own disk
    assert Cluster(nodes=2, disk=2e9, net=1e9).rate(1e9) == 1e9
    assert Cluster(nodes=8, disk=2e9, storage=4e9).rate(1e9) == 0.5e9
