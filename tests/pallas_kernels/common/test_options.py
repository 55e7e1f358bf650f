"""Bounds of the options of attention; tuned sizes."""

import json

import jax.numpy as jnp
import pytest

from pallas_kernels.common import tuning
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ScoreOptions(1.0, window=0), "window=0 must be at least 1"),
        (ScoreOptions(1.0, soft_cap=0.0), "soft_cap=0.0 must be positive"),
        (ScoreOptions(1.0, sinks=jnp.zeros(3)), r"sinks has shape \(3,\), expected"),
        (ScoreOptions(1.0, alibi_slopes=jnp.zeros(5)), r"alibi_slopes .*\(4,\)"),
    ],
)
def test_options_out_of_bounds_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        options.check(num_heads=4)


def test_tuned_sizes_replace_the_defaults(tmp_path, monkeypatch):
    folder = tmp_path / "some_op" / "tuning"
    folder.mkdir(parents=True)
    (folder / "h200.json").write_text(json.dumps({"bf16": {"tile_k": 128}}))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    default = {"tile_k": 64, "num_warps": 4}
    h200 = Target("gpu", "sm_90", "h200", 132)
    found = tuning.tuned_sizes("some_op", h200, "bf16", default)
    assert found == {"tile_k": 128, "num_warps": 4}
    assert tuning.tuned_sizes("some_op", h200, "f32", default) == default
    other = Target("gpu", "sm_80", "a100", 108)
    assert tuning.tuned_sizes("some_op", other, "bf16", default) == default


def test_sizes_under_trial_replace_the_stored_ones_and_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    (tmp_path / "some_op").mkdir()
    h200 = Target("gpu", "sm_90", "h200", 132)
    default = {"tile_k": 64, "num_warps": 4}
    tuning.store_sizes("some_op", "h200", "bf16", {"tile_k": 128})
    with tuning.try_sizes({("some_op", "bf16"): {"num_warps": 8}}) as trial:
        found = tuning.tuned_sizes("some_op", h200, "bf16", default)
    assert found == {"tile_k": 128, "num_warps": 8}
    assert trial.asked == {("some_op", "bf16"): found}
    stored = {"tile_k": 128, "num_warps": 4}
    assert tuning.tuned_sizes("some_op", h200, "bf16", default) == stored
