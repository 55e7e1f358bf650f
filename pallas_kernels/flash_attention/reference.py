"""The obvious version: all scores at once; differentiable."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.flash_attention.rules import LOG2_E, MASKED, Arrays, make_rules


def flash_attention_reference(
    q: Float[Array, "N T H D"],
    k: Float[Array, "N S K D"],
    v: Float[Array, "N S K D"],
    options: ScoreOptions,
    causal: bool,  # noqa: FBT001 (all implementations take it by place)
    q_segment_ids: Int[Array, "N T"] | None,
    kv_segment_ids: Int[Array, "N S"] | None,
) -> Float[Array, "N T H D"]:
    """Attends with a `[T, S]` matrix per head; see `api.flash_attention`."""
    arrays = Arrays(q, k, v, options.sinks, options.alibi_slopes, None, None)
    rules = make_rules(arrays, options, causal=causal)
    group = q.shape[2] // k.shape[2]
    keys = jnp.repeat(k.astype(jnp.float32), group, axis=2)
    values = jnp.repeat(v.astype(jnp.float32), group, axis=2)
    products = jnp.einsum("nthd,nshd->nhts", q.astype(jnp.float32), keys)
    rows = jnp.arange(q.shape[1])[None, None, :, None]
    columns = jnp.arange(k.shape[1])[None, None, None, :]
    bias, slopes = None, None
    if options.alibi_slopes is not None:
        bias = rules.bias(rows, columns)
        slopes = options.alibi_slopes.astype(jnp.float32)[None, :, None, None]
    scores = rules.scores(products, bias, slopes)[0] / LOG2_E
    q_ids = None if q_segment_ids is None else q_segment_ids[:, None, :, None]
    kv_ids = None if kv_segment_ids is None else kv_segment_ids[:, None, None, :]
    visible = rules.visible(rows, columns, q_ids, kv_ids)
    scores = jnp.where(visible, scores, MASKED)
    peak = jnp.maximum(scores.max(axis=-1, keepdims=True), MASKED / 2)
    sinks = None
    if options.sinks is not None:
        sinks = options.sinks.astype(jnp.float32)[None, :, None, None]
        peak = jnp.maximum(peak, sinks)
    peak = jax.lax.stop_gradient(peak)
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - peak)
    weights = weights / jnp.where(total > 0, total, 1)
    return jnp.einsum("nhts,nshd->nthd", weights, values).astype(q.dtype)
