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

from glm_jax.sharding import QuantizedArray, WeightArray

# Values of all groups' products that are held at once (256 MiB of float32); beyond, one group follows the other.
MAX_GROUP_VALUES = 2**26
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
