"""Rows by one matrix on a CPU, each form of it by the product that XLA's CPU backend does best.

One row reads the matrix once. XLA fuses such a product with whatever makes the matrix, such as a slice of a stack or
the scaling of a quantised one, so that the matrix is never written out. Up to jax 0.10 the fused sum was vectorised by
reordering it. From 0.11 on the order is kept, and what was read at the memory's rate takes up to nine times as long:
there the sum is one over strips of columns, in vectors of a strip's columns, and last one over these.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.sharding import QuantizedArray, WeightArray

MAX_SINGLE_ROWS = 3  # rows that a CPU multiplies with a quantised matrix one by one rather than write it out
MAX_SINGLE_VALUES = 32  # of a product that is worth no more than a loop of its own for each row
MAX_COLUMNS = 256  # rows up to which a CPU multiplies faster with a float32 matrix as its columns
MAX_FUSED_INPUTS = 2**12 - 2**7  # of a row that XLA's CPU backend multiplies without writing out the matrix
MAX_STRIPS = 32  # strips of a product: bounds the code that is compiled; the partial sums are 1/32 of the work
STRIP_WIDTH = 16  # columns of the narrowest strip: one 512-bit register of float32
ROW_STRIP_WIDTH = 32  # and where it is one row that is multiplied
# Whether XLA's CPU backend reorders the sum of a product that it fuses; measured with jax 0.10.2 and 0.11.2.
REORDERS_SUMS = jax.__version_info__ < (0, 11)


def take(weight: WeightArray, index: jax.Array) -> WeightArray:
    """One matrix [M, N] of a weight [E, M, N]."""

    def one(array: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(array, index, keepdims=False)

    return weight.map(one) if isinstance(weight, QuantizedArray) else one(weight)


def multiply_rows(x_RN: jax.Array, weight_MN: WeightArray) -> jax.Array:
    """Rows by a matrix on a CPU, float32 [R, M]; each form of a weight by the product that XLA does best.

    Several rows by bfloat16 bits multiply as bfloat16. Other quantised matrices are dequantised: one expert's, or one
    projection's.
    """
    if x_RN.shape[0] == 1:
        stack = weight_MN.map(lambda a: a[None]) if isinstance(weight_MN, QuantizedArray) else weight_MN[None]
        return multiply_row(x_RN, stack, 0)
    if isinstance(weight_MN, QuantizedArray):
        if weight_MN.bits:
            # Only this form of it, of two matrices, is one that XLA's CPU backend has in bfloat16.
            x_RN, matrix = x_RN.astype(jnp.bfloat16), weight_MN.as_bfloat16()
            return jnp.einsum("rn,mn->rm", x_RN, matrix, preferred_element_type=jnp.float32)
        weight_MN = weight_MN.dequantize(x_RN.dtype)
    if x_RN.shape[0] <= MAX_COLUMNS:
        return multiply_columns(x_RN, weight_MN)
    return jnp.matmul(x_RN, weight_MN.T, preferred_element_type=jnp.float32)


def multiply_few_rows(x_RN: jax.Array, weight_MN: WeightArray) -> jax.Array:
    """As `multiply_rows`, of a quantised weight up to MAX_SINGLE_ROWS rows one by one, and so of very few outputs.

    Not by bfloat16 bits, of which a product of matrices is as fast.
    """
    rows = x_RN.shape[0]
    if isinstance(weight_MN, QuantizedArray):
        single = rows <= MAX_SINGLE_ROWS and not weight_MN.bits
    else:
        single = rows * weight_MN.shape[0] <= MAX_SINGLE_VALUES
    if rows == 1 or not single:
        return multiply_rows(x_RN, weight_MN)
    return jnp.concatenate([multiply_rows(x_RN[row : row + 1], weight_MN) for row in range(rows)])


def multiply_columns(x_RN: jax.Array, weight_MN: jax.Array) -> jax.Array:
    """Rows by a matrix [M, N] on a CPU as the matrix by columns: float32 [R, M].

    XLA's CPU backend repacks the right side of a product at every call. This way it is the few rows that it repacks,
    and the weight is read once, where it lies. The barrier keeps XLA from turning the product round again.
    """
    product = jnp.einsum("mn,rn->mr", weight_MN, x_RN, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(product).T


def multiply_row(x_1N: jax.Array, weight_EMN: WeightArray, index: jax.Array | int) -> jax.Array:
    """One row by one matrix of a stack on a CPU, float32 [1, M]: the weights stream from memory once, as they are.

    XLA's CPU backend fuses such a product with whatever makes the matrix, but only while the row takes less than 16
    KiB; beyond, it writes the matrix out, transposed. So a longer row is multiplied part by part. The barrier keeps XLA
    from making one product of them again.
    """
    inputs = weight_EMN.shape[2]
    is_made = isinstance(weight_EMN, QuantizedArray) or weight_EMN.shape[0] > 1  # else it lies there, and none is fused
    strips = count_strips(weight_EMN, width=ROW_STRIP_WIDTH)
    if is_made and strips > 1 and not REORDERS_SUMS:
        # The barrier keeps what makes the row, such as a slice, out of the sum: it would be made anew for each value.
        return multiply_strips(lax.optimization_barrier(x_1N), weight_EMN, index, strips)
    group = weight_EMN.group_size if isinstance(weight_EMN, QuantizedArray) and weight_EMN.grouped else 1
    parts = -(-inputs // MAX_FUSED_INPUTS) if group <= MAX_FUSED_INPUTS else 1
    width = -(-inputs // (parts * group)) * group
    products = []
    for low in range(0, inputs, width):
        high = min(low + width, inputs)
        matrix = cut_inputs(weight_EMN, index, low, high).astype(x_1N.dtype)
        products.append(jnp.matmul(x_1N[:, low:high], matrix.T, preferred_element_type=jnp.float32))
    if len(products) == 1:
        return products[0]
    return functools.reduce(jnp.add, map(lax.optimization_barrier, products))


def multiply_strips(x_RN: jax.Array, weight_EMN: WeightArray, index: jax.Array | int, strips: int) -> jax.Array:
    """Few rows by one matrix of a stack, float32 [R, M]: a sum over strips of columns, then over a strip's columns."""
    _, outputs, inputs = weight_EMN.shape
    rows, strip = x_RN.shape[0], inputs // strips
    x_RN = x_RN.astype(jnp.float32)
    partial = jnp.zeros((outputs, rows, strip), jnp.float32)
    for low in range(0, inputs, strip):
        weight = cut_inputs(weight_EMN, index, low, low + strip).astype(jnp.float32)
        partial = partial + weight[:, None, :] * x_RN[None, :, low : low + strip]
    # As a product with ones, which XLA keeps apart from the sum above; a fused reduction would undo its vectors.
    sums = partial.reshape(outputs * rows, strip) @ jnp.ones((strip,), jnp.float32)
    return sums.reshape(outputs, rows).T


def count_strips(weight_EMN: WeightArray, *, width: int = STRIP_WIDTH) -> int:
    """The most strips of equal width that are at most MAX_STRIPS, of `width` columns or a multiple; 1 if none are.

    A strip is whole groups of inputs, or a part of one.
    """
    inputs, group = weight_EMN.shape[2], weight_EMN.group_size if isinstance(weight_EMN, QuantizedArray) else 1
    widths = {n: inputs // n for n in range(1, MAX_STRIPS + 1) if inputs % n == 0 and (inputs // n) % width == 0}
    return max((n for n, width in widths.items() if width % group == 0 or group % width == 0), default=1)


def cut_inputs(weight_EMN: WeightArray, index: jax.Array | int, low: int, high: int) -> jax.Array:
    """Inputs low to high of one matrix of a stack, dequantised; of a grouped weight whole groups, or part of one."""
    outputs = weight_EMN.shape[1]

    def of_values(array: jax.Array) -> jax.Array:
        return lax.dynamic_slice(array, (index, 0, low), (1, outputs, high - low))[0]

    if not isinstance(weight_EMN, QuantizedArray):
        return of_values(weight_EMN)
    size = weight_EMN.group_size

    def of_scale(scale: jax.Array) -> jax.Array:
        if not weight_EMN.grouped:
            return lax.dynamic_index_in_dim(scale, index, keepdims=False)
        return lax.dynamic_slice(scale, (index, 0, low // size), (1, outputs, -(-(high - low) // size)))[0]

    return weight_EMN.map(of_values, of_scale).dequantize()
