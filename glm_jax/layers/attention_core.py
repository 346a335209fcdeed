"""Attention on any mesh: the operation of the pass, and around it sequences that are split over devices.

Context parallelism splits queries, keys or both. Heads may be split besides.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from glm_jax.kernels.attention import in_query_blocks, masked_scores
from glm_jax.kernels.precision import precision_of
from glm_jax.layers.context import ForwardContext
from glm_jax.sharding import axes_of, shard_local
from glm_jax.sharding.rules import spec_of


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, context: ForwardContext, *, scale: float | None = None
) -> jax.Array:
    """Attention of q [B, T, N, H] over k [B, K, S, H] and v [B, K, S, I]: [B, T, N, I] in the dtype of q.

    Query t sees the keys up to its position in the pass. In a prefill the keys are those of the queries themselves.
    Scores are scaled by H^-0.5 or `scale`. The heads may be split over devices: with those of k and v, or, where K is
    1, by themselves. So may be the queries T, and the keys S.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if axes_of(q, 1) or axes_of(k, 2):
        return _attend_split(q, k, v, context, scale=scale)
    operation = context.ops.attend

    def whole_sequences(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        return operation(q, k, v, query_positions=positions, scale=scale, prefill=context.prefill)

    if not operation.local:
        return whole_sequences(q, k, v, context.positions)
    layout = [(q, 0), (q, 1), (q, 2), None]
    return shard_local(whole_sequences, q, k, v, context.positions, layout=layout)


def _attend_split(q: jax.Array, k: jax.Array, v: jax.Array, context: ForwardContext, *, scale: float) -> jax.Array:
    """Attention of sequences that are split over devices.

    Each device has some of the queries, and all keys or some. Where it has some of the keys, too, it takes all queries
    of its sequences, attends to the keys it has, and the results are combined as one softmax over all of them: with
    the maximum of all scores, a sum of weights and a sum of weighted values.
    """
    queries, keys = axes_of(q, 1), axes_of(k, 2)
    shared = tuple(axis for axis in queries if axis in keys)

    def region(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        if not keys:
            return context.ops.attend(q, k, v, query_positions=positions, scale=scale)
        for axis in reversed(shared):
            q, positions = (jax.lax.all_gather(each, axis, axis=1, tiled=True) for each in (q, positions))
        # Of an axis that splits the keys only, the queries are the same on its devices: so is the combined result.
        positions = positions - jax.lax.axis_index(keys) * k.shape[2]
        block = functools.partial(_attend_part, k=k, v=v, scale=scale, axes=keys)
        out = in_query_blocks(block, q, positions, width=v.shape[-1])
        for axis in shared:
            part = out.shape[1] // jax.lax.axis_size(axis)
            out = jax.lax.dynamic_slice_in_dim(out, jax.lax.axis_index(axis) * part, part, axis=1)
        return out

    out = spec_of(axes_of(q, 0), queries, axes_of(q, 2), None)
    return jax.shard_map(region, out_specs=out)(q, k, v, context.positions)


def _attend_part(
    q: jax.Array, positions: jax.Array, *, k: jax.Array, v: jax.Array, scale: float, axes: tuple[str, ...]
) -> jax.Array:
    """In a `shard_map`: attention over this device's keys and those of the others along `axes`."""
    batch, length, heads, _ = q.shape
    scores = masked_scores(q, k, positions, scale=scale)
    highest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)), axes)
    weights = jnp.exp(scores - highest)  # 0 for keys that a query does not see; every query sees one
    summed = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(q.dtype).reshape(batch, k.shape[1], -1, k.shape[2])
    out = jnp.matmul(weights, v.astype(q.dtype), precision=precision_of(q.dtype), preferred_element_type=jnp.float32)
    out, summed = jax.lax.psum((out.reshape(*summed.shape[:-1], v.shape[-1]), summed), axes)
    return (out / summed).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, v.shape[-1]).astype(q.dtype)
