import jax
import pytest
from jax.sharding import AxisType

from shardings.mesh import AXES, make_mesh, replica_meshes


def test_all_axes_exist_and_unused_ones_have_size_one():
    mesh = make_mesh(tensor=4, data=2)
    assert mesh.axis_names == AXES == ("pipe", "data", "expert", "tensor")
    assert dict(mesh.shape) == {"pipe": 1, "data": 2, "expert": 1, "tensor": 4}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_uses_the_first_of_the_given_devices():
    devices = jax.devices()[2:]
    mesh = make_mesh(tensor=3, devices=devices)
    assert list(mesh.devices.flat) == devices[:3]


def test_too_few_devices_names_both_numbers():
    count = len(jax.devices())
    with pytest.raises(ValueError, match=rf"needs {2 * count} devices.*are {count}"):
        make_mesh(tensor=count, data=2)


@pytest.mark.parametrize("size", [0, -1])
def test_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match=rf"expert={size} must be at least 1"):
        make_mesh(expert=size)


def test_replicas_own_disjoint_devices():
    parts = replica_meshes(make_mesh(tensor=2, data=4))
    assert [dict(part.shape)["data"] for part in parts] == [1] * 4
    assert [part.shape["tensor"] for part in parts] == [2] * 4
    owned = [device for part in parts for device in part.devices.flat]
    assert len(owned) == len(set(owned)) == 8
    assert all(set(part.axis_types) == {AxisType.Auto} for part in parts)
