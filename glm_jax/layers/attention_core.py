"""Softmax attention of grouped queries over keys and values, without repeating these for each query head.

`attend` is plain XLA and runs everywhere. Long prompts go through it in blocks of queries, so that the scores of a
128K prompt are never held at once. Sequences may be split over devices (sequence parallelism): queries, keys or both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.layers.linear import precision_of
from glm_jax.sharding import axes_of, local_call, platform, reshape, spec_of

MAX_VECTORS = 2  # queries of a group up to which they are taken one by one on a CPU
MAX_KEYS_FIRST = 8  # and up to which the keys are the left side of a product
# From jax 0.11 on XLA's CPU backend splits a batch of products over its threads, from as few multiplications on as the
# first of these. Up to the second that takes longer than vector by vector, if it is for no more queries of a group.
# Measured with jax 0.10.2 and 0.11.2.
SPLITS_BATCHES = jax.__version_info__ >= (0, 11)
MIN_SPLIT, MAX_UNSPLIT, MAX_UNSPLIT_ROWS = 2**15, 2**19, 16
LANES = 32  # keys of a row that a CPU reduces side by side
MAX_LANE_ROWS = 4  # queries of a group up to which that is faster
CAUSAL_PARTS = 4  # parts of a prompt that each see the keys up to their end: 5/8 of all pairs are computed
MIN_CAUSAL = 256  # queries from which that is worth a program of more parts
QUERY_BLOCK = 512  # rows of scores held at a time: 96 heads x 512 x 8192 keys in float32 are 1.6 GB a sequence


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, last_key: jax.Array, scale: float | None = None, fresh: bool = False
) -> jax.Array:
    """Attention of q [B, T, N, H] over k [B, K, S, H] and v [B, K, S, I]; query t sees keys 0..last_key[b, t].

    `fresh` says that the keys are those of the queries themselves (last_key is 0..T-1): what no query of a part sees
    is then not computed. Scores are scaled by H^-0.5 or `scale`, softmax is float32. The heads may be split over
    devices: with those of k and v, or, where K is 1, by themselves. So may be the queries T, and the keys S.

    Returns:
        [B, T, N, I] in the dtype of q.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if axes_of(q, 1) or axes_of(k, 2):
        return _attend_split(q, k, v, last_key, scale=scale)
    length = q.shape[1]
    part = -(-length // CAUSAL_PARTS) if fresh and length >= MIN_CAUSAL else length
    parts = []
    for low in range(0, length, part):
        seen = min(low + part, length) if fresh else k.shape[2]
        block = functools.partial(_attend_block, k=k[:, :, :seen], v=v[:, :, :seen], scale=scale)
        rows = slice(low, low + part)
        parts.append(_in_blocks(block, q[:, rows], last_key[:, rows], width=v.shape[-1]))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _in_blocks(block: Callable[..., jax.Array], q: jax.Array, last_key: jax.Array, *, width: int) -> jax.Array:
    """block(q, last_key) of all queries, of many by blocks of them, so that not all scores are held at once.

    A backward pass makes the scores of each block anew, rather than be handed those of all of them.
    """
    batch, length, heads, head_dim = q.shape
    if length <= QUERY_BLOCK:
        return block(q, last_key)
    blocks = -(-length // QUERY_BLOCK)
    pad = blocks * QUERY_BLOCK - length
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    last_key = jnp.pad(last_key, ((0, 0), (0, pad)))
    q_blocks = jnp.swapaxes(q.reshape(batch, blocks, QUERY_BLOCK, heads, head_dim), 0, 1)
    key_blocks = jnp.swapaxes(last_key.reshape(batch, blocks, QUERY_BLOCK), 0, 1)
    again = jax.checkpoint(block, prevent_cse=False)  # in a loop nothing is merged
    out = jax.lax.map(lambda each: again(*each), (q_blocks, key_blocks))
    return jnp.swapaxes(out, 0, 1).reshape(batch, blocks * QUERY_BLOCK, heads, width)[:, :length]


def _attend_split(q: jax.Array, k: jax.Array, v: jax.Array, last_key: jax.Array, *, scale: float) -> jax.Array:
    """Attention of sequences that are split over devices.

    Each device has some of the queries, and all keys or some. Where it has some of the keys, too, it takes all queries
    of its sequences, attends to the keys it has, and the results are combined as one softmax over all of them: with
    the maximum of all scores, a sum of weights and a sum of weighted values.
    """
    queries, keys = axes_of(q, 1), axes_of(k, 2)
    shared = tuple(axis for axis in queries if axis in keys)

    def region(q: jax.Array, k: jax.Array, v: jax.Array, last_key: jax.Array) -> jax.Array:
        if not keys:
            return attend(q, k, v, last_key=last_key, scale=scale)
        for axis in reversed(shared):
            q, last_key = (jax.lax.all_gather(each, axis, axis=1, tiled=True) for each in (q, last_key))
        # Of an axis that splits the keys only, the queries are the same on its devices: so is the combined result.
        last_key = last_key - jax.lax.axis_index(keys) * k.shape[2]
        block = functools.partial(_attend_part, k=k, v=v, scale=scale, axes=keys)
        out = _in_blocks(block, q, last_key, width=v.shape[-1])
        for axis in shared:
            part = out.shape[1] // jax.lax.axis_size(axis)
            out = jax.lax.dynamic_slice_in_dim(out, jax.lax.axis_index(axis) * part, part, axis=1)
        return out

    out = spec_of(axes_of(q, 0), queries, axes_of(q, 2), None)
    return jax.shard_map(region, out_specs=out)(q, k, v, last_key)


def _attend_part(
    q: jax.Array, last_key: jax.Array, *, k: jax.Array, v: jax.Array, scale: float, axes: tuple[str, ...]
) -> jax.Array:
    """In a `shard_map`: attention over this device's keys and those of the others along `axes`."""
    batch, length, heads, _ = q.shape
    scores = _masked_scores(q, k, last_key, scale=scale)
    highest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)), axes)
    weights = jnp.exp(scores - highest)  # 0 for keys that a query does not see; every query sees one
    summed = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(q.dtype).reshape(batch, k.shape[1], -1, k.shape[2])
    out = jnp.matmul(weights, v.astype(q.dtype), precision=precision_of(q.dtype), preferred_element_type=jnp.float32)
    out, summed = jax.lax.psum((out.reshape(*summed.shape[:-1], v.shape[-1]), summed), axes)
    return (out / summed).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, v.shape[-1]).astype(q.dtype)


def _masked_scores(q: jax.Array, k: jax.Array, last_key: jax.Array, *, scale: float) -> jax.Array:
    """Scaled scores of q [B, T, N, H] and k [B, K, S, H], float32 [B, K, G, T, S]; of keys not seen -inf.

    The queries of all heads of a group are rows of one matrix, for which keys are not repeated. With one kv head that
    is whole everywhere, the split of the heads is one of the group.
    """
    (batch, length, heads, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    split = (None, 2) if kv_heads == 1 and not axes_of(k, 1) else (2, None)
    rows = reshape(q, (batch, length, kv_heads, group, head_dim), layout=(0, 1, *split, None)).transpose(0, 2, 3, 1, 4)
    rows = reshape(rows, (batch, kv_heads, group * length, head_dim), layout=(0, 1, 2, None))
    scores = _scores(rows, k.astype(q.dtype))
    scores = reshape(scores, (batch, kv_heads, group, length, keys), layout=(0, 1, 2, None, None))
    seen = jnp.arange(keys) <= last_key[:, None, None, :, None]
    return jnp.where(seen, scores * scale, -jnp.inf)


def _attend_block(q: jax.Array, last_key: jax.Array, *, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    (batch, length, heads, _), (kv_heads, keys) = q.shape, k.shape[1:3]
    group, v = heads // kv_heads, v.astype(q.dtype)
    scores = _masked_scores(q, k, last_key, scale=scale)
    weights = _softmax(scores).astype(q.dtype)
    weights = reshape(weights, (batch, kv_heads, group * length, keys), layout=(0, 1, 2, None))
    out = _values(weights, v)
    out = reshape(out, (batch, kv_heads, group, length, v.shape[-1]), layout=(0, 1, 2, None, None))
    out_heads = 3 if kv_heads == 1 and not axes_of(k, 1) else 2
    return reshape(out.transpose(0, 3, 1, 2, 4), (batch, length, heads, v.shape[-1]), layout=(0, 1, out_heads, None))


def _softmax(scores: jax.Array) -> jax.Array:
    """Softmax over the keys of scores [B, K, G, T, S]."""
    rows, keys = scores.shape[2] * scores.shape[3], scores.shape[4]
    if platform() != "cpu" or rows > MAX_LANE_ROWS or keys % LANES:
        return jax.nn.softmax(scores, axis=-1)

    def by_lanes(scores: jax.Array) -> jax.Array:
        highest = _reduce_lanes(jnp.max, jax.lax.stop_gradient(scores))
        weights = jax.lax.optimization_barrier(jnp.exp(scores - highest))
        return weights / _reduce_lanes(jnp.sum, weights)

    return local_call(by_lanes, scores, layout=[(scores, dimension) for dimension in range(scores.ndim)])


def _reduce_lanes(reduce: Callable[..., jax.Array], scores: jax.Array) -> jax.Array:
    """A maximum or sum over the keys, [..., 1]: of LANES at a time first, which XLA's CPU backend does with vectors."""
    lanes = scores.reshape(*scores.shape[:-1], -1, LANES)
    return reduce(jax.lax.optimization_barrier(reduce(lanes, axis=-2)), axis=-1, keepdims=True)


def _scores(rows: jax.Array, k: jax.Array) -> jax.Array:
    """Products of queries [B, K, R, H] with keys [B, K, S, H], float32 [B, K, R, S]."""
    options = {"precision": precision_of(rows.dtype), "preferred_element_type": jnp.float32}

    def by_keys(rows: jax.Array, k: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(jnp.einsum("bksh,bkrh->bksr", k, rows, **options)).swapaxes(2, 3)

    # XLA's CPU backend repacks the right side of a product of matrices: a vector at a time it reads the keys as they
    # are, and of a few it repacks these.
    if platform() == "cpu":
        unsplit, queries = _is_better_unsplit(rows, k), rows.shape[2]
        if unsplit or queries <= MAX_KEYS_FIRST:
            by_vectors = functools.partial(_row_by_row, "bkh,bksh->bks", **options)
            few = by_vectors if unsplit or queries <= MAX_VECTORS else by_keys
            return local_call(few, rows, k, layout=[(rows, 0), (rows, 1), (rows, 2), (k, 2)])
    # Not a product with transposed keys: a GPU would keep the whole cache transposed and turn it round twice a step.
    return jnp.einsum("bkrh,bksh->bkrs", rows, k, **options)


def _values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Values [B, K, S, V] summed with the weights [B, K, R, S] of queries: [B, K, R, V] in their dtype."""
    precision = precision_of(weights.dtype)
    if platform() == "cpu" and _is_better_unsplit(weights, v):
        by_vectors = functools.partial(_row_by_row, "bks,bksv->bkv", precision=precision)
        return local_call(by_vectors, weights, v, layout=[(weights, 0), (weights, 1), (weights, 2), (v, 3)])
    return jnp.matmul(weights, v, precision=precision)


def _row_by_row(equation: str, rows: jax.Array, k_or_v: jax.Array, **options: Any) -> jax.Array:
    """An einsum of each of rows [B, K, R, ...] by itself with keys or values [B, K, S, H]: [B, K, R, ...]."""
    return jnp.stack([jnp.einsum(equation, rows[:, :, i], k_or_v, **options) for i in range(rows.shape[2])], axis=2)


def _is_better_unsplit(rows: jax.Array, k_or_v: jax.Array) -> bool:
    """Whether a CPU multiplies rows [B, K, R, ...] with keys or values [B, K, S, H] faster row by row, in a thread."""
    multiplications = rows.shape[2] * k_or_v.size
    return SPLITS_BATCHES and rows.shape[2] <= MAX_UNSPLIT_ROWS and MIN_SPLIT < multiplications <= MAX_UNSPLIT
