"""The routed experts on a CPU: each expert hit is read once, and multiplied with just the rows that chose it.

XLA's CPU backend copies a slice of a stacked weight before it multiplies with it, does not fuse a product into a
neighbour, and pays page faults for large temporary arrays. The forms here go round that:

    one token       a loop over its K choices. A product of one row is the one that XLA fuses with the slice: the
                    weights stream from memory once, uncopied, on all cores (`rows.multiply_row`).
    more tokens     experts sorted by how many rows chose them, and one loop for each bucket of row counts. A switch
                    on the bucket inside a single loop would copy the output at every turn.
        few rows    the product as a sum of elementwise products of narrow column strips (`_strips`): fused with the
                    slice, vectorised, on all cores. Up to twice as fast as copy and product, up to 4 rows.
        many rows   copy and product: the copy is small beside the arithmetic.

The trip counts depend on the routing, so this has no reverse derivative. Experts that stay in the cache cost little to
read again: a few tokens take them choice by choice (`single_experts`). A product of one vector has a third of the speed
of one of many rows, but a token chooses a quarter of the experts or fewer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.layers.mlp import swiglu
from glm_jax.layers.quantized import merge_outputs
from glm_jax.layers.rows import count_strips, multiply_row, multiply_rows, multiply_strips, take
from glm_jax.sharding import QuantizedArray, WeightArray

Product = Callable[[jax.Array, WeightArray, jax.Array], jax.Array]
Weights = tuple[WeightArray, WeightArray]

STRIP_ROWS = (2, 4)  # buckets multiplied by strips; from there on the copy is small beside the rest
MAX_COPIED_COLUMNS = 32  # rows up to which a copy multiplies them faster as its columns; beyond, it is turned round
MIN_MANY_ROWS = 8  # the smallest bucket of long prompts, and from which on there is one between two powers of two
MIN_STRIP_BYTES = 1 << 18  # an expert's matrix below this stays in the cache, copy and all
MAX_FEW_TOKENS = 64  # up to here all strip buckets are compiled


def switch_experts(
    x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, *, gate_up_E2FD: WeightArray, down_EDF: WeightArray
) -> jax.Array:
    """Weighted sum of the chosen local experts of each token; exact, no row is dropped.

    Args:
        x_TD: the tokens.
        ids_TK: experts chosen, no local one twice by a token; an id outside 0..E-1 is an expert of another device and
            adds nothing.
        weights_TK: the weight of each choice.
        gate_up_E2FD: gate and up projections, [out, in].
        down_EDF: down projections, [out, in].

    Returns:
        y_TD in the dtype of x, accumulated in float32.
    """
    weights_TK = weights_TK.astype(jnp.float32)
    weights = (merge_outputs(gate_up_E2FD, 1, 2), down_EDF)
    run = _one_token if x_TD.shape[0] == 1 else _many_tokens
    return run(x_TD, ids_TK, weights_TK, weights).astype(x_TD.dtype)


def single_experts(
    x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, *, gate_up_E2FD: WeightArray, down_EDF: WeightArray
) -> jax.Array:
    """As `switch_experts`, each choice of each token by itself: few tokens, and experts that stay in the cache.

    The number of turns is fixed, so this has a derivative.
    """
    weights = (merge_outputs(gate_up_E2FD, 1, 2), down_EDF)
    choices = ids_TK.shape[1]
    local = _is_local(ids_TK, down_EDF.shape[0])  # those of other devices are computed, with a weight of 0
    ids = jnp.where(local, ids_TK, 0).reshape(-1)
    shares = jnp.where(local, weights_TK.astype(jnp.float32), 0.0).reshape(-1)

    def choice(i: jax.Array, total: jax.Array) -> jax.Array:
        token = i // choices
        x = lax.dynamic_slice_in_dim(x_TD, token, 1)
        row = lax.dynamic_slice_in_dim(total, token, 1) + shares[i] * _expert(multiply_row, weights, ids[i], x)
        return lax.dynamic_update_slice_in_dim(total, row, token, 0)

    total = _zeros(x_TD, ids_TK, weights_TK, *weights)
    return lax.fori_loop(0, ids.size, choice, total).astype(x_TD.dtype)


def _one_token(x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, weights: Weights) -> jax.Array:
    """One choice after the other; those of other devices come last and are not computed."""
    local = _is_local(ids_TK, weights[1].shape[0])
    order = jnp.argsort(~local[0], stable=True)

    def choice(i: jax.Array, total: jax.Array) -> jax.Array:
        k = order[i]
        return total + weights_TK[0, k] * _expert(multiply_row, weights, ids_TK[0, k], x_TD)

    total = _zeros(x_TD, ids_TK, weights_TK, *weights)
    return lax.fori_loop(0, jnp.sum(local, dtype=jnp.int32), choice, total)


def _many_tokens(x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, weights: Weights) -> jax.Array:
    """For each bucket of row counts, a loop over the experts in it."""
    (tokens, choices), experts = ids_TK.shape, weights[1].shape[0]
    expert_of_row = jnp.where(_is_local(ids_TK, experts), ids_TK, experts).reshape(-1)
    counts = jnp.sum(expert_of_row[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(counts) - counts
    by_count = jnp.argsort(counts)
    buckets = _buckets(tokens, tokens * choices // experts)
    # Rows by expert, with room for the last expert to read a whole bucket.
    rows_by_expert = jnp.pad(_stable_order(expert_of_row, experts), (0, buckets[-1]))
    weight_of_row = weights_TK.reshape(-1)
    edges = [jnp.sum(counts <= edge, dtype=jnp.int32) for edge in (0, *buckets)]

    def expert(i: jax.Array, total: jax.Array, *, rows: int) -> jax.Array:
        index = by_count[i]
        row = lax.dynamic_slice(rows_by_expert, (starts[index],), (rows,))
        token = row // choices
        product = _strips if rows in STRIP_ROWS else _copied
        out = _expert(product, weights, index, x_TD.at[token].get(mode="promise_in_bounds"))
        out = out * weight_of_row.at[row].get(mode="promise_in_bounds")[:, None]
        # Rows of the bucket beyond the expert's own are other experts': computed, not added.
        out = jnp.where((jnp.arange(rows) < counts[index])[:, None], out, 0.0)
        return total.at[token].add(out, mode="promise_in_bounds")

    total = _zeros(x_TD, ids_TK, weights_TK, *weights)
    for rows, low, high in zip(buckets, edges[:-1], edges[1:], strict=True):
        total = lax.fori_loop(low, high, functools.partial(expert, rows=rows), total)
    return total


def _buckets(tokens: int, mean: int) -> tuple[int, ...]:
    """Row counts that are compiled: an expert of n rows runs in the smallest that holds n. The last holds all tokens.

    Powers of two, and from the mean rows of an expert on, where most of the work is, one between two of them. Each
    costs compile time: long prompts, which rarely leave an expert a handful of rows, go without the smallest.
    """
    powers = [1 << i for i in range(1, max(2, tokens).bit_length() + 1)]
    between = [3 * power // 4 for power in powers if power > MIN_MANY_ROWS and power >= mean]
    low = STRIP_ROWS[0] if tokens <= MAX_FEW_TOKENS else MIN_MANY_ROWS
    sizes = sorted(size for size in {*powers, *between} if size >= low)
    return tuple(sizes[: next(i for i, rows in enumerate(sizes) if rows >= tokens) + 1])


def _stable_order(keys: jax.Array, highest: int) -> jax.Array:
    """The stable order of keys [R] in 0..highest. XLA's CPU backend sorts plain numbers four times as fast as pairs."""
    rows = keys.shape[0]
    if (highest + 1) * rows > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(keys, stable=True)
    return jnp.sort(keys * rows + jnp.arange(rows, dtype=jnp.int32)) % rows


def _expert(product: Product, weights: Weights, index: jax.Array, x_RD: jax.Array) -> jax.Array:
    """down(silu(gate(x)) * up(x)) of one expert on rows x, in float32."""
    gate_up, down = weights
    width = down.shape[2]
    hidden = product(x_RD, gate_up, index)
    hidden = swiglu(hidden[:, :width], hidden[:, width:]).astype(x_RD.dtype)
    return product(hidden, down, index)


def _copied(x_RN: jax.Array, weight_EMN: WeightArray, index: jax.Array) -> jax.Array:
    weight_MN = take(weight_EMN, index)
    if x_RN.shape[0] > MAX_COPIED_COLUMNS and not isinstance(weight_MN, QuantizedArray):
        return jnp.matmul(x_RN, weight_MN.T, preferred_element_type=jnp.float32)
    return multiply_rows(x_RN, weight_MN)


def _strips(x_RN: jax.Array, weight_EMN: WeightArray, index: jax.Array) -> jax.Array:
    _, outputs, inputs = weight_EMN.shape
    strips = count_strips(weight_EMN)
    if strips == 1 or outputs * inputs * weight_EMN.dtype.itemsize < MIN_STRIP_BYTES:
        return _copied(x_RN, weight_EMN, index)
    return multiply_strips(x_RN, weight_EMN, index, strips)


def _is_local(ids_TK: jax.Array, experts: int) -> jax.Array:
    return (ids_TK >= 0) & (ids_TK < experts)


def _zeros(like: jax.Array, *varying: WeightArray) -> jax.Array:
    """float32 zeros to carry through a loop, varying over the mesh axes (of a `shard_map`) that any argument does."""
    zeros = jnp.zeros_like(like, dtype=jnp.float32)
    for array in jax.tree.leaves(varying):
        zeros += jnp.zeros_like(array[(0,) * array.ndim], dtype=jnp.float32)
    return zeros
