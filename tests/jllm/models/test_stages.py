"""Which layer each stage of a pipeline computes."""

import pytest

from jllm.models.stages import lay_out_stages


@pytest.mark.parametrize(
    ("kinds", "stages", "places"),
    [
        ("aaaa", 2, 2),
        ("aaa", 2, 2),
        ("aaaaa", 4, 2),
        ("abab", 2, 2),
        ("aaba" * 4, 2, 8),
        ("aaba" * 4, 4, 4),
        ("aaaaab" * 10 + "aa", 4, 18),  # the period divides 18, not 16
        ("aabb", 2, 3),
        ("ab", 2, 2),  # the second stage has nothing to do
    ],
)
def test_layers_keep_their_order_and_kind_in_few_places(kinds, stages, places):
    layout = lay_out_stages(kinds, stages)
    assert layout.num_places == places
    in_order = [
        layer for stage in layout.layers for layer in stage if layer is not None
    ]
    assert in_order == list(range(len(kinds)))
    assert layout.num_idle == places * stages - len(kinds)
    for stage in range(stages):
        held = [kinds[layer] for layer in layout.loaded(stage)]
        assert held == [kinds[layer] for layer in layout.first_layers]


@pytest.mark.parametrize("stages", [0, 3])
def test_more_stages_than_layers_are_refused(stages):
    with pytest.raises(ValueError, match=f"num_stages={stages} must be 1 to 2"):
        lay_out_stages("aa", stages)
