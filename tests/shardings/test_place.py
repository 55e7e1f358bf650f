import dataclasses

import pytest
from jax.sharding import PartitionSpec

from shardings.mesh import make_mesh
from shardings.place import tree_shardings


@dataclasses.dataclass(frozen=True)
class Leaf:
    shape: tuple
    axes: tuple


def test_tree_keeps_its_structure_and_shares_equal_shardings():
    mesh = make_mesh(tensor=4)
    tree = {
        "layers": [{"a": Leaf((8, 3), ("heads", None))} for _ in range(2)],
        "norms": Leaf((5,), (None,)),
    }
    placed = tree_shardings(tree, mesh)
    first, second = (layer["a"] for layer in placed["layers"])
    assert first is second
    assert first.spec == PartitionSpec("tensor", None)
    assert first.shard_shape((8, 3)) == (2, 3)
    assert placed["norms"].is_fully_replicated
    assert first.mesh is mesh


def test_uneven_share_is_refused_with_name_and_numbers():
    tree = {"layers": [{"a": Leaf((3, 6), (None, "mlp"))}]}
    with pytest.raises(ValueError, match=r"layers\.0\.a: .*'mlp' of \(3, 6\).*by 4"):
        tree_shardings(tree, make_mesh(tensor=4))


def test_wrong_number_of_axes_is_refused():
    with pytest.raises(ValueError, match="do not name"):
        tree_shardings({"a": Leaf((3, 6), (None,))}, make_mesh())
