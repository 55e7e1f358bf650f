"""Activations by name: which there are, what edits do, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jllm
from jllm.models.probe import Probe

NAMES = ("embed", "layers.0.resid", "layers.0.mlp.out", "layers.1.resid", "final")


@pytest.fixture(scope="module")
def default():
    """Model, weights, cache and batch of the embedded model."""
    model, weights = jllm.load()
    batch = jllm.Batch.from_prompts([[3, 4, 5, 6], [7, 8]])
    return model, weights, model.init_kv(batch.block_tables.size, 16), batch


def test_patterns_choose_by_name():
    probe = Probe(NAMES, ["layers.*.resid", "final"])
    for name in NAMES:
        probe(name, jnp.zeros(2))
    assert sorted(probe.captured) == ["final", "layers.0.resid", "layers.1.resid"]
    assert probe.wants("final")
    assert not probe.wants("embed")


def test_an_activation_is_captured_as_it_is_used():
    probe = Probe(NAMES, ["embed"], {"embed": lambda x: x + 1, "*": lambda x: 2 * x})
    assert probe("embed", jnp.ones(2)).tolist() == [4, 4]
    assert probe.captured["embed"].tolist() == [4, 4]


@pytest.mark.parametrize("field", ["capture", "edit"])
def test_a_pattern_of_nothing_is_refused_with_what_there_is(field):
    patterns = {"layer.0.resid": lambda x: x}
    given = {"capture": list(patterns)} if field == "capture" else {"edit": patterns}
    with pytest.raises(
        ValueError, match=rf"{field}='layer.0.resid'.*layers.\*.mlp.out"
    ):
        Probe(NAMES, **given)


@pytest.mark.parametrize("edit", [lambda x: x[:1], lambda x: x.astype(jnp.int32)])
def test_an_edit_keeps_shape_and_type(edit):
    with pytest.raises(ValueError, match=r"edit\['embed'\].*expected float32\[2\]"):
        Probe(NAMES, edit={"embed": edit})("embed", jnp.ones(2))


def test_every_name_is_an_activation(default):
    model, weights, kv, batch = default
    seen = jax.eval_shape(lambda: model.forward(weights, kv, batch, capture=["*"]))[2]
    assert sorted(seen) == sorted(model.activations)


def test_capturing_changes_nothing_but_what_it_makes_explicit(default):
    model, weights, kv, batch = default
    run = jax.jit(model.forward, static_argnames="capture")
    plain, _ = run(weights, kv, batch)
    hidden, _, _ = run(weights, kv, batch, capture=("layers.*.resid", "final"))
    np.testing.assert_array_equal(hidden, plain)
    hidden, _, seen = run(weights, kv, batch, capture=("layers.*.attn.probs",))
    np.testing.assert_allclose(hidden, plain, atol=1e-4)
    sums = [np.asarray(weights).sum(axis=-1) for weights in seen.values()]
    np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_a_patch_from_another_run_carries_its_output_over(default):
    model, weights, kv, batch = default
    other = jllm.Batch.from_prompts([[9, 4, 1, 6], [2, 8]])
    last = f"layers.{model.num_layers - 1}.resid"
    expected, _, seen = model.forward(weights, kv, other, capture=[last])
    hidden, _ = model.forward(weights, kv, batch, edit={last: lambda _: seen[last]})
    np.testing.assert_array_equal(hidden, expected)


def test_ablated_heads_of_all_layers_leave_the_mlps(default):
    model, weights, kv, batch = default
    zeros = {"layers.*.attn.probs": jnp.zeros_like}
    _, _, seen = model.forward(weights, kv, batch, capture=["*.attn.out"], edit=zeros)
    for values in seen.values():
        np.testing.assert_array_equal(values, 0)


def test_vmap_over_steering_vectors_is_a_loop_over_them(default):
    model, weights, kv, batch = default
    name = "layers.0.resid"
    vectors = jax.random.normal(jax.random.key(0), (3, weights["embed"].shape[1]))

    def steered(vector):
        edit = {name: lambda x: x + vector[None, :]}
        return model.forward(weights, kv, batch, edit=edit)[0]

    together = jax.vmap(steered)(vectors)
    alone = jnp.stack([steered(vector) for vector in vectors])
    np.testing.assert_allclose(together, alone, atol=1e-4)
