"""The routed experts on a CPU: each expert hit is read once, and multiplied with just the rows that chose it.

XLA's CPU backend copies a slice of a stacked weight before it multiplies with it, does not fuse a product into a
neighbour, and pays page faults for large temporary arrays. These implementations avoid all three:

    one token       a loop over its K choices. A product of one row is the one that XLA fuses with the slice: the
                    weights stream from memory once, uncopied, on all cores (`cpu.multiply_row`).
    more tokens     experts sorted by how many rows chose them, and one loop for each bucket of row counts. A switch
                    on the bucket inside a single loop would copy the output in every iteration.
        few rows    the product as a sum of elementwise products of narrow column strips: fused with the slice,
                    vectorised, on all cores. Up to twice as fast as copy and product, up to 4 rows.
        many rows   copy and product: the copy is small beside the arithmetic.

The trip counts depend on the routing, so that the loops have no reverse derivative: that is `block_gmm`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.kernels.cpu import count_strips, multiply_row, multiply_rows, multiply_strips
from glm_jax.kernels.grouped import block_gmm_experts, is_local, sort_order
from glm_jax.kernels.quantized import merge_dims
from glm_jax.kernels.reference import swiglu
from glm_jax.sharding import WeightArray

Product = Callable[[jax.Array, WeightArray, jax.Array], jax.Array]
Weights = tuple[WeightArray, WeightArray]

STRIP_ROWS = (2, 4)  # buckets multiplied by strips; from there on the copy is small beside the rest
MAX_COPIED_ROWS = 32  # rows up to which a copied matrix multiplies them faster from the left
MIN_MANY_ROWS = 8  # the smallest bucket of long prompts, and from which on there is one between two powers of two
MIN_STRIP_BYTES = 1 << 18  # an expert's matrix below this stays in the cache, copy and all
MAX_FEW_TOKENS = 64  # up to here all strip buckets are compiled


def expert_loop(
    x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, *, gate_up_E2FD: WeightArray, down_EDF: WeightArray
) -> jax.Array:
    """As `reference.dense_experts`, exact: no row is dropped, and none is computed for an expert it did not choose.

    No token may choose a local expert twice.
    """
    return _differentiable(x_TD, ids_TK, weights_TK, (gate_up_E2FD, down_EDF))


@jax.custom_vjp
def _differentiable(x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, weights: Weights) -> jax.Array:
    matrices = (merge_dims(weights[0], 1, 2), weights[1])
    run = _one_token if x_TD.shape[0] == 1 else _many_tokens
    return run(x_TD, ids_TK, weights_TK.astype(jnp.float32), matrices).astype(x_TD.dtype)


def _forward(*operands: Any) -> tuple[jax.Array, Any]:
    return _differentiable(*operands), operands


def _backward(operands: Any, gradient: jax.Array) -> tuple[Any, ...]:
    x_TD, ids_TK, weights_TK, weights = operands

    def with_derivative(x: jax.Array, weights_TK: jax.Array, weights: Weights) -> jax.Array:
        return block_gmm_experts(x, ids_TK, weights_TK, gate_up_E2FD=weights[0], down_EDF=weights[1])

    _, pull_back = jax.vjp(with_derivative, x_TD, weights_TK, weights)
    of_x, of_weights_TK, of_weights = pull_back(gradient)
    return of_x, None, of_weights_TK, of_weights


_differentiable.defvjp(_forward, _backward)


def _one_token(x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, weights: Weights) -> jax.Array:
    """One choice after the other; those of other devices come last and are not computed."""
    local = is_local(ids_TK, weights[1].shape[0])
    order = jnp.argsort(~local[0], stable=True)

    def choice(i: jax.Array, total: jax.Array) -> jax.Array:
        k = order[i]
        return total + weights_TK[0, k] * _expert(multiply_row, weights, ids_TK[0, k], x_TD)

    total = _zeros(x_TD, ids_TK, weights_TK, *weights)
    return lax.fori_loop(0, jnp.sum(local, dtype=jnp.int32), choice, total)


def _many_tokens(x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, weights: Weights) -> jax.Array:
    """For each bucket of row counts, a loop over the experts in it."""
    (tokens, choices), experts = ids_TK.shape, weights[1].shape[0]
    expert_of_row = jnp.where(is_local(ids_TK, experts), ids_TK, experts).reshape(-1)
    counts = jnp.sum(expert_of_row[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(counts) - counts
    by_count = jnp.argsort(counts)
    buckets = _buckets(tokens, tokens * choices // experts)
    # Rows by expert, with room for the last expert to read a whole bucket.
    rows_by_expert = jnp.pad(sort_order(expert_of_row), (0, buckets[-1]))
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


def _expert(product: Product, weights: Weights, index: jax.Array, x_RD: jax.Array) -> jax.Array:
    """down(silu(gate(x)) * up(x)) of one expert on rows x, in float32."""
    gate_up, down = weights
    width = down.shape[2]
    hidden = product(x_RD, gate_up, index)
    hidden = swiglu(hidden[:, :width], hidden[:, width:]).astype(x_RD.dtype)
    return product(hidden, down, index)


def _copied(x_RN: jax.Array, w_EMN: WeightArray, index: jax.Array) -> jax.Array:
    def take(array: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(array, index, keepdims=False)

    if not isinstance(w_EMN, jax.Array):
        return multiply_rows(x_RN, w_EMN.map(take))
    if x_RN.shape[0] > MAX_COPIED_ROWS:
        return jnp.matmul(x_RN, take(w_EMN).T, preferred_element_type=jnp.float32)
    return multiply_rows(x_RN, take(w_EMN))


def _strips(x_RN: jax.Array, w_EMN: WeightArray, index: jax.Array) -> jax.Array:
    _, outputs, inputs = w_EMN.shape
    strips = count_strips(w_EMN)
    if strips == 1 or outputs * inputs * w_EMN.dtype.itemsize < MIN_STRIP_BYTES:
        return _copied(x_RN, w_EMN, index)
    return multiply_strips(x_RN, w_EMN, index, strips)


def _zeros(like: jax.Array, *varying: WeightArray) -> jax.Array:
    """float32 zeros to carry through a loop, varying over the mesh axes (of a `shard_map`) that any argument does."""
    zeros = jnp.zeros_like(like, dtype=jnp.float32)
    for array in jax.tree.leaves(varying):
        zeros += jnp.zeros_like(array[(0,) * array.ndim], dtype=jnp.float32)
    return zeros
