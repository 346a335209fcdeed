"""Softmax attention of grouped queries over keys and values, without repeating these for each query head.

`blockwise_attend` is plain XLA and runs everywhere. Long prompts go through it in blocks of queries, so that the scores
of a 128K prompt are never held at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.kernels.precision import precision_of
from glm_jax.sharding import axes_of, reshape

CAUSAL_PARTS = 4  # parts of a prompt that each see the keys up to their end: 5/8 of all pairs are computed
MIN_CAUSAL = 256  # queries from which that is worth a program of more parts
QUERY_BLOCK = (
    512  # queries whose scores are held at a time: 96 heads x 512 x 8192 keys in float32 are 1.6 GB a sequence
)


def blockwise_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, query_positions: jax.Array, scale: float, prefill: bool = False
) -> jax.Array:
    """`reference.attend` by blocks of queries; in a prefill without the keys that no query of a part sees.

    The heads may be split over devices: with those of k and v, or, where K is 1, by themselves.
    """
    length = q.shape[1]
    part = -(-length // CAUSAL_PARTS) if prefill and length >= MIN_CAUSAL else length
    parts = []
    for low in range(0, length, part):
        seen = min(low + part, length) if prefill else k.shape[2]
        block = functools.partial(_attend_block, k=k[:, :, :seen], v=v[:, :, :seen], scale=scale)
        queries = slice(low, low + part)
        parts.append(in_query_blocks(block, q[:, queries], query_positions[:, queries], width=v.shape[-1]))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def in_query_blocks(
    attend: Callable[..., jax.Array], q: jax.Array, query_positions: jax.Array, *, width: int
) -> jax.Array:
    """attend(q, query_positions) of all queries, of many by blocks of them, so that not all scores are held at once.

    The backward pass recomputes the scores of each block instead of reading those of all blocks from memory.
    """
    batch, length, heads, head_dim = q.shape
    if length <= QUERY_BLOCK:
        return attend(q, query_positions)
    blocks = -(-length // QUERY_BLOCK)
    pad = blocks * QUERY_BLOCK - length
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    query_positions = jnp.pad(query_positions, ((0, 0), (0, pad)))
    q_blocks = jnp.swapaxes(q.reshape(batch, blocks, QUERY_BLOCK, heads, head_dim), 0, 1)
    position_blocks = jnp.swapaxes(query_positions.reshape(batch, blocks, QUERY_BLOCK), 0, 1)
    recomputed = jax.checkpoint(attend, prevent_cse=False)  # a loop does not merge the two computations
    out = jax.lax.map(lambda each: recomputed(*each), (q_blocks, position_blocks))
    return jnp.swapaxes(out, 0, 1).reshape(batch, blocks * QUERY_BLOCK, heads, width)[:, :length]


def masked_scores(q: jax.Array, k: jax.Array, query_positions: jax.Array, *, scale: float) -> jax.Array:
    """Scaled scores of q [B, T, N, H] and k [B, K, S, H], float32 [B, K, G, T, S]; -inf for keys that are not seen.

    The queries of all heads of a group form one matrix, so that no key is repeated. Where there is one kv head, the
    split of the query heads over devices is a split of the group.
    """
    (batch, length, heads, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    split = (None, 2) if _splits_group(k) else (2, None)
    queries = reshape(q, (batch, length, kv_heads, group, head_dim), layout=(0, 1, *split, None))
    queries = queries.transpose(0, 2, 3, 1, 4)
    queries = reshape(queries, (batch, kv_heads, group * length, head_dim), layout=(0, 1, 2, None))
    options: dict[str, Any] = {"precision": precision_of(q.dtype), "preferred_element_type": jnp.float32}
    # A product with transposed keys would make a GPU keep the whole cache transposed, and transpose it twice a step.
    scores = jnp.einsum("bkqh,bksh->bkqs", queries, k.astype(q.dtype), **options)
    scores = reshape(scores, (batch, kv_heads, group, length, keys), layout=(0, 1, 2, None, None))
    seen = jnp.arange(keys) <= query_positions[:, None, None, :, None]
    return jnp.where(seen, scores * scale, -jnp.inf)


def weighted_values(weights: jax.Array, v: jax.Array, *, dtype: Any) -> jax.Array:
    """Values [B, K, S, I] summed with the weights [B, K, G, T, S] of queries: [B, T, N, I], computed in `dtype`."""
    batch, kv_heads, group, length, keys = weights.shape
    weights = weights.astype(dtype)
    weights = reshape(weights, (batch, kv_heads, group * length, keys), layout=(0, 1, 2, None))
    out = jnp.matmul(weights, v.astype(dtype), precision=precision_of(dtype))
    out = reshape(out, (batch, kv_heads, group, length, v.shape[-1]), layout=(0, 1, 2, None, None))
    heads_from = 3 if _splits_group(v) else 2
    shape = (batch, length, kv_heads * group, v.shape[-1])
    return reshape(out.transpose(0, 3, 1, 2, 4), shape, layout=(0, 1, heads_from, None))


def _splits_group(k_or_v: jax.Array) -> bool:
    """Whether a split of the query heads over devices is a split within the group of one kv head."""
    return k_or_v.shape[1] == 1 and not axes_of(k_or_v, 1)


def _attend_block(q: jax.Array, query_positions: jax.Array, *, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    scores = masked_scores(q, k, query_positions, scale=scale)
    return weighted_values(jax.nn.softmax(scores, axis=-1), v, dtype=q.dtype)
