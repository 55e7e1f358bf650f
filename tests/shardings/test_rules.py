import pytest
from jax.sharding import PartitionSpec

from shardings.rules import DEFAULT_RULES, partition_spec


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("kv_heads", None, None), PartitionSpec("tensor", None, None)),
        ((None, "heads"), PartitionSpec(None, "tensor")),
        ((None, "mlp", None), PartitionSpec(None, "tensor", None)),
        (("vocab", None), PartitionSpec(("pipe", "tensor"), None)),
        (("experts", "mlp"), PartitionSpec("expert", "tensor")),
        ((None,), PartitionSpec(None)),
    ],
)
def test_default_rules(axes, expected):
    assert partition_spec(axes) == expected


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("vocab", "heads")])
def test_two_dimensions_on_one_mesh_axis_are_refused(axes):
    with pytest.raises(ValueError, match=f"{axes[0]}.*{axes[1]}.*'tensor'"):
        partition_spec(axes)


def test_axis_without_rule_is_refused():
    with pytest.raises(ValueError, match="no rule for logical axis 'haeds'"):
        partition_spec(("haeds",))


def test_rules_can_be_replaced():
    rules = {**DEFAULT_RULES, "mlp": ()}
    assert partition_spec(("heads", "mlp"), rules) == PartitionSpec("tensor", None)
