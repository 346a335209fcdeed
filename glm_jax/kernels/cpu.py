"""Products on a CPU, each storage of a weight by the form that XLA's CPU backend does best.

One row reads the matrix once. XLA fuses such a product with whatever makes the matrix, such as a slice of a stack or
the scaling of a quantised one, so that the matrix is never written out. Up to jax 0.10 XLA vectorises the fused sum by
reordering it. From 0.11 on it keeps the order, and the product takes up to nine times as long: there the sum runs over
strips of columns, and last over the columns of a strip. Measured with jax 0.10.2 and 0.11.2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.sharding import PackedBfloat16, QuantizedArray, WeightArray, as_array

MAX_FEW_ROWS = 256  # rows up to which a product with the matrix on the left is faster
MAX_STRIPS = 32  # strips of a product: bounds the code that is compiled; the partial sums are 1/32 of the work
STRIP_WIDTH = 16  # columns of the narrowest strip: one 512-bit register of float32
ROW_STRIP_WIDTH = 32  # and where one row is multiplied
MAX_FUSED_INPUTS = 2**12  # of a row; with a longer one XLA's CPU backend writes the matrix out
REORDERS_SUMS = jax.__version_info__ < (0, 11)  # whether XLA's CPU backend reorders the sum of a fused product


def matmul(x_RN: jax.Array, w_MN: WeightArray, *, dtype: Any = None) -> jax.Array:
    """x [R, N] by a weight [M, N] in any storage: [R, M] in `dtype`, or that of x.

    Several rows by a packed weight multiply as bfloat16; other quantised weights are dequantised for several rows.
    """
    dtype = x_RN.dtype if dtype is None else dtype
    if x_RN.shape[0] == 1:
        stack = w_MN[None] if isinstance(w_MN, jax.Array) else w_MN.map(lambda array: array[None])
        return multiply_row(x_RN, stack, 0).astype(dtype)
    return multiply_rows(x_RN, w_MN).astype(dtype)


def top_k(scores: jax.Array, *, k: int) -> jax.Array:
    """As `reference.top_k`, of one device's part.

    XLA's CPU backend selects the best of a matrix; of an array of more dimensions it sorts every row, and gathers it.
    """
    rows = scores.reshape(-1, scores.shape[-1])
    return lax.top_k(rows, k)[1].reshape(*scores.shape[:-1], k)


def multiply_rows(x_RN: jax.Array, w_MN: WeightArray) -> jax.Array:
    """Several rows by a matrix, float32 [R, M]."""
    if isinstance(w_MN, PackedBfloat16):
        # Of the products in bfloat16 XLA's CPU backend has only this form, of two matrices.
        x_RN, matrix = x_RN.astype(jnp.bfloat16), w_MN.as_bfloat16()
        return jnp.einsum("rn,mn->rm", x_RN, matrix, preferred_element_type=jnp.float32)
    matrix = as_array(w_MN, x_RN.dtype)
    if x_RN.shape[0] > MAX_FEW_ROWS:
        return jnp.matmul(x_RN, matrix.T, preferred_element_type=jnp.float32)
    # XLA's CPU backend repacks the right side of a product at every call: here these are the few rows, and the weight
    # is read once, as it lies. The barrier keeps XLA from exchanging the sides again.
    product = jnp.einsum("mn,rn->mr", matrix, x_RN, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(product).T


def multiply_row(x_1N: jax.Array, w_EMN: WeightArray, index: jax.Array | int) -> jax.Array:
    """One row by one matrix of a stack, float32 [1, M]: the weights stream from memory once, as they are."""
    is_made = isinstance(w_EMN, QuantizedArray | PackedBfloat16) or w_EMN.shape[0] > 1
    strips = count_strips(w_EMN, width=ROW_STRIP_WIDTH)
    if is_made and strips > 1 and not (REORDERS_SUMS and w_EMN.shape[2] < MAX_FUSED_INPUTS):
        # The barrier keeps what makes the row, such as a slice, out of the sum, which would compute it for each value.
        return multiply_strips(lax.optimization_barrier(x_1N), w_EMN, index, strips)
    matrix = cut_inputs(w_EMN, index, 0, w_EMN.shape[2]).astype(x_1N.dtype)
    return jnp.matmul(x_1N, matrix.T, preferred_element_type=jnp.float32)


def multiply_strips(x_RN: jax.Array, w_EMN: WeightArray, index: jax.Array | int, strips: int) -> jax.Array:
    """Few rows by one matrix of a stack, float32 [R, M]: a sum over strips of columns, then over a strip's columns."""
    _, outputs, inputs = w_EMN.shape
    rows, strip = x_RN.shape[0], inputs // strips
    x_RN = x_RN.astype(jnp.float32)
    partial = jnp.zeros((outputs, rows, strip), jnp.float32)
    for low in range(0, inputs, strip):
        weight = cut_inputs(w_EMN, index, low, low + strip).astype(jnp.float32)
        partial = partial + weight[:, None, :] * x_RN[None, :, low : low + strip]
    # As a product with ones, which XLA keeps apart from the sum above; a fused reduction would undo its vectors.
    sums = partial.reshape(outputs * rows, strip) @ jnp.ones((strip,), jnp.float32)
    return sums.reshape(outputs, rows).T


def count_strips(w_EMN: WeightArray, *, width: int = STRIP_WIDTH) -> int:
    """The most strips of equal width that are at most MAX_STRIPS, of `width` columns or a multiple; 1 if none are.

    A strip is whole groups of inputs, or a part of one.
    """
    inputs, group = w_EMN.shape[2], w_EMN.group_size if isinstance(w_EMN, QuantizedArray) else 1
    widths = {n: inputs // n for n in range(1, MAX_STRIPS + 1) if inputs % n == 0 and (inputs // n) % width == 0}
    return max((n for n, width in widths.items() if width % group == 0 or group % width == 0), default=1)


def cut_inputs(w_EMN: WeightArray, index: jax.Array | int, low: int, high: int) -> jax.Array:
    """Inputs low to high of one matrix of a stack, dequantised; of a grouped weight whole groups, or part of one."""
    outputs = w_EMN.shape[1]

    def of_values(array: jax.Array) -> jax.Array:
        return lax.dynamic_slice(array, (index, 0, low), (1, outputs, high - low))[0]

    if isinstance(w_EMN, jax.Array):
        return of_values(w_EMN)
    if isinstance(w_EMN, PackedBfloat16):
        return w_EMN.map(of_values).dequantize()
    size = w_EMN.group_size

    def of_scale(scale: jax.Array) -> jax.Array:
        if not w_EMN.grouped:
            return lax.dynamic_index_in_dim(scale, index, keepdims=False)
        return lax.dynamic_slice(scale, (index, 0, low // size), (1, outputs, -(-(high - low) // size)))[0]

    return w_EMN.map(of_values, of_scale).dequantize()
