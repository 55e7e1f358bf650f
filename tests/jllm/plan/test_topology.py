"""Slices, layouts, and what is refused."""

import pytest

from jllm.errors import ConfigError
from jllm.plan.hardware import devices
from jllm.plan.topology import (
    all_layouts,
    gpu_topology,
    known_topologies,
    make_layout,
    tpu_topology,
)


@pytest.mark.parametrize(
    ("name", "num_devices"),
    [("v5e:2x2", 4), ("v6e:16x16", 256), ("tpu7x:2x2x1", 8), ("tpu7x:4x4x4", 128)],
)
def test_number_of_devices(name, num_devices):
    assert tpu_topology(name).num_devices == num_devices


def test_every_known_topology_can_be_made():
    assert len(known_topologies()) == 23
    for name in known_topologies():
        topology = tpu_topology(name)
        assert topology.name == name
        for layout in all_layouts(topology):
            assert layout.num_devices == topology.num_devices


@pytest.mark.parametrize("name", ["v6e:3x3", "v9:2x2", "v6e", "", "v6e:2x2x1"])
def test_an_unknown_topology_is_refused_with_those_there_are(name):
    with pytest.raises(
        ConfigError, match=r"is not known; there are v5e: .*v6e: .*16x16"
    ):
        tpu_topology(name)


def test_an_unknown_gpu_and_too_many_are_refused():
    with pytest.raises(ConfigError, match="gpu='h900' is not known; there are h200"):
        gpu_topology("h900", 1)
    with pytest.raises(ConfigError, match="devices=9 must be 1 to 8"):
        gpu_topology("h200", 9)


def test_replicas_take_what_is_left():
    layout = make_layout(tpu_topology("v6e:4x4"), tensor=4, pipeline=2)
    assert (layout.tensor, layout.data, layout.pipeline) == (4, 2, 2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 8, "data": 3}, "takes 24 devices, but v6e:4x4 has 16"),
        ({"tensor": 3}, "takes 15 devices, but v6e:4x4 has 16"),
        ({"tensor": 32}, "takes 32 devices, but v6e:4x4 has 16"),
        ({"tensor": 0}, "tensor=0 must be at least 1"),
        ({"tensor": 8, "pipeline": 4}, "takes 32 devices, but v6e:4x4 has 16"),
    ],
)
def test_a_layout_that_is_not_the_topology_is_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_layout(tpu_topology("v6e:4x4"), **sizes)


def test_every_figure_has_a_source():
    for device in devices().values():
        assert device.source
        assert device.price is None or (device.price.source and device.price.date)
