"""Products with weights that may be quantised: the scale goes onto the result, never into the weight.

A weight multiplied by its scale first would be written out whole, on GPUs in every step. So a product runs over the
narrow values, converted as they are read, and is scaled after; with groups of inputs that is a product for each group.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.kernels.precision import precision_of
from glm_jax.sharding import PackedBfloat16, QuantizedArray, WeightArray

# Values of all groups' products that are held at once (256 MiB of float32); beyond, one group follows the other.
MAX_GROUP_VALUES = 2**26
_GROUP = "z"  # the einsum label of groups


def scaled_einsum(
    equation: str, x: jax.Array, weight: WeightArray, *, precision: Any = None, dtype: Any = None
) -> jax.Array:
    """An einsum "...i,...i->..." of x and a weight over the last dimension of both, on one device's own parts.

    The result has `dtype`, or that of x.
    """
    options: dict[str, Any] = {"precision": precision, "preferred_element_type": dtype}
    if not isinstance(weight, QuantizedArray):
        matrix = weight.dequantize(x.dtype) if isinstance(weight, PackedBfloat16) else weight
        return jnp.einsum(equation, x, matrix, **options)
    result_dtype = x.dtype if dtype is None else dtype
    operands, out = equation.split("->")
    x_labels, weight_labels = operands.split(",")
    options["preferred_element_type"] = jnp.float32
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


def scaled_matmul(x: jax.Array, w: WeightArray, *, dtype: Any = None) -> jax.Array:
    """x [R, I] by a weight [O, I] in any storage, on one device's own parts: [R, O]."""
    return scaled_einsum("rd,od->ro", x, w, precision=precision_of(x.dtype), dtype=dtype)


def as_matrix(weight: WeightArray, *, contracting_dims: int) -> WeightArray:
    """A weight [*O, *I] as a matrix [O, I], on one device's own part."""
    outputs = weight.ndim - contracting_dims

    def merge(array: jax.Array) -> jax.Array:
        return array.reshape(math.prod(array.shape[:outputs]), math.prod(array.shape[outputs:]))

    if not isinstance(weight, QuantizedArray):
        return weight.map(merge) if isinstance(weight, PackedBfloat16) else merge(weight)
    groups = weight.scale.shape[outputs:]
    return QuantizedArray(merge(weight.values), weight.scale.reshape(-1, *groups), 1)


def merge_dims(weight: WeightArray, first: int, count: int) -> WeightArray:
    """The weight with `count` of its output dimensions, from `first` on, as one; on one device's own part."""

    def merge(array: jax.Array) -> jax.Array:
        shape = array.shape
        return array.reshape(*shape[:first], math.prod(shape[first : first + count]), *shape[first + count :])

    return merge(weight) if isinstance(weight, jax.Array) else weight.map(merge)


def absorb_into_query(q: jax.Array, weight: WeightArray, *, count: int) -> jax.Array:
    """q [B, T, N, count] by the first `count` rows of each head's matrix [N, H, R], over these rows: [B, T, N, R]."""
    precision = precision_of(q.dtype)
    if not isinstance(weight, QuantizedArray):
        matrix = weight[:, :count]
        matrix = matrix.dequantize(q.dtype) if isinstance(matrix, PackedBfloat16) else matrix.astype(q.dtype)
        return jnp.einsum("btnh,nhr->btnr", q, matrix, precision=precision)
    # A GPU would widen a part of the narrow values first and write it out, as a copy of the weight. The whole weight it
    # widens as it reads it; the zeros for the other rows cost nothing beside that.
    q = jnp.pad(q, [(0, 0), (0, 0), (0, 0), (0, weight.shape[1] - count)])
    options: dict[str, Any] = {"precision": precision, "preferred_element_type": jnp.float32}
    values, scale = weight.numbers(weight.values, q.dtype), weight.scale.astype(q.dtype)
    if not weight.grouped:
        return jnp.einsum("btnh,nhr->btnr", q * scale, values, **options).astype(q.dtype)
    # The scale belongs to what is summed over here, so each group of results has its own scaled q.
    values = values.reshape(*weight.shape[:-1], scale.shape[-1], weight.group_size)
    scaled = q[..., None, :] * scale.swapaxes(1, 2)
    y = jnp.einsum("btngh,nhgc->btngc", scaled, values, **options)
    return y.reshape(*q.shape[:-1], weight.shape[-1]).astype(q.dtype)


def expand_values(latent: jax.Array, weight: WeightArray, *, count: int) -> jax.Array:
    """latent [B, T, N, R] by the last `count` rows of each head's matrix [N, H, R], over R: [B, T, N, count]."""
    # Of a quantised weight all rows, and a part of the result, for the reason that `absorb_into_query` gives.
    rows = weight if isinstance(weight, QuantizedArray) else weight[:, weight.shape[1] - count :]
    out = scaled_einsum("btnr,nhr->btnh", latent, rows, precision=precision_of(latent.dtype))
    return out[..., -count:]


def _spread(scale: jax.Array, labels: str, out: str) -> jax.Array:
    """A scale with dimensions `labels` in the order of `out`, with 1 for those that it lacks."""
    scale = scale.transpose([labels.index(label) for label in out if label in labels])
    return jnp.expand_dims(scale, [at for at, label in enumerate(out) if label not in labels])
