"""Products with weights that may be quantised: the scale goes onto the result, never into the weight.

A weight multiplied by its scale first would be written out whole, on GPUs in every step. So a product runs over the
narrow values, converted as they are read, and is scaled after; with groups of inputs that is a product for each group.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.sharding import QuantizedArray, WeightArray

# Values of all groups' products that are held at once (256 MiB of float32); beyond, one group follows the other.
MAX_GROUP_VALUES = 2**26
MAX_SINGLE_ROWS = 3  # rows that a CPU multiplies with a quantised matrix one by one rather than write it out
MAX_SINGLE_VALUES = 32  # of a product that is worth no more than a loop of its own for each row
MAX_COLUMNS = 256  # rows up to which a CPU multiplies faster with a float32 matrix as its columns
MAX_FUSED_INPUTS = 2**12 - 2**7  # of a row that XLA's CPU backend multiplies without writing out the matrix
_GROUP = "z"  # the einsum label of groups


def weight_einsum(
    equation: str,
    x: jax.Array,
    weight: WeightArray,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """An einsum "...i,...i->..." of x and a weight over the last dimension of both, on this device's own parts."""
    if not isinstance(weight, QuantizedArray):
        options: dict[str, Any] = {"precision": precision, "preferred_element_type": preferred_element_type}
        return jnp.einsum(equation, x, weight, **options)
    result_dtype = x.dtype if preferred_element_type is None else preferred_element_type
    if weight.bits:
        options = {"precision": precision, "preferred_element_type": result_dtype}
        return jnp.einsum(equation, x, weight.dequantize(x.dtype), **options)
    operands, out = equation.split("->")
    x_labels, weight_labels = operands.split(",")
    options = {"precision": precision, "preferred_element_type": jnp.float32}
    if not weight.grouped:
        y = jnp.einsum(equation, x, weight.numbers(weight.values, x.dtype), **options)
        return (y * _spread(weight.scale, weight_labels[:-1], out)).astype(result_dtype)
    groups, inputs = weight.scale.shape[-1], x_labels[-1]
    x = x.reshape(*x.shape[:-1], groups, weight.group_size)
    values = weight.values.reshape(*weight.shape[:-1], groups, weight.group_size)
    sizes = dict(zip(x_labels[:-1] + weight_labels[:-1], (*x.shape[:-2], *values.shape[:-2]), strict=True))
    if groups * math.prod(sizes[label] for label in out) <= MAX_GROUP_VALUES:
        grouped = f"{x_labels[:-1]}{_GROUP}{inputs},{weight_labels[:-1]}{_GROUP}{inputs}->{out}{_GROUP}"
        y = jnp.einsum(grouped, x, weight.numbers(values, x.dtype), **options)
        y = jnp.sum(y * _spread(weight.scale, weight_labels[:-1] + _GROUP, out + _GROUP), axis=-1)
        return y.astype(result_dtype)

    def of_group(group: Any) -> jax.Array:
        part = weight.numbers(lax.dynamic_index_in_dim(values, group, axis=-2, keepdims=False), x.dtype)
        y = jnp.einsum(equation, lax.dynamic_index_in_dim(x, group, axis=-2, keepdims=False), part, **options)
        scale = lax.dynamic_index_in_dim(weight.scale, group, axis=-1, keepdims=False)
        return y * _spread(scale, weight_labels[:-1], out)

    return lax.fori_loop(1, groups, lambda group, y: y + of_group(group), of_group(0)).astype(result_dtype)


def merge_outputs(weight: WeightArray, first: int, count: int) -> WeightArray:
    """The weight with `count` of its output dimensions, from `first` on, as one; on this device's own part."""

    def merge(array: jax.Array) -> jax.Array:
        shape = array.shape
        return array.reshape(*shape[:first], math.prod(shape[first : first + count]), *shape[first + count :])

    return weight.map(merge) if isinstance(weight, QuantizedArray) else merge(weight)


def merge_inputs(weight: WeightArray) -> WeightArray:
    """A weight [D, ...] with all of its input dimensions, those after the first, as one; on this device's own part."""
    if not isinstance(weight, QuantizedArray):
        return weight.reshape(weight.shape[0], -1)
    outputs = weight.shape[: weight.ndim - weight.inputs]
    return QuantizedArray(weight.values.reshape(*outputs, -1), weight.scale, 1)


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


def contract_outputs(x: jax.Array, weight: WeightArray, *, precision: Any = None) -> jax.Array:
    """x [B, T, N, H] by a weight [N, H, R] over its output dimension H: [B, T, N, R]."""
    if not isinstance(weight, QuantizedArray):
        return jnp.einsum("btnh,nhr->btnr", x, weight.astype(x.dtype), precision=precision)
    options: dict[str, Any] = {"precision": precision, "preferred_element_type": jnp.float32}
    if weight.bits:
        return jnp.einsum("btnh,nhr->btnr", x, weight.dequantize(x.dtype), precision=precision)
    values, scale = weight.numbers(weight.values, x.dtype), weight.scale.astype(x.dtype)
    if not weight.grouped:
        return jnp.einsum("btnh,nhr->btnr", x * scale, values, **options).astype(x.dtype)
    # The scale belongs to what is summed over here, so each group of results has its own scaled x.
    values = values.reshape(*weight.shape[:-1], scale.shape[-1], weight.group_size)
    scaled = x[..., None, :] * scale.swapaxes(1, 2)
    y = jnp.einsum("btngh,nhgc->btngc", scaled, values, **options)
    return y.reshape(*x.shape[:-1], weight.shape[-1]).astype(x.dtype)


def _spread(scale: jax.Array, labels: str, out: str) -> jax.Array:
    """A scale with dimensions `labels` in the order of `out`, with 1 for those that it lacks."""
    scale = scale.transpose([labels.index(label) for label in out if label in labels])
    return jnp.expand_dims(scale, [at for at, label in enumerate(out) if label not in labels])
