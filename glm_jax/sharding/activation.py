"""Layouts of activations, read off the types of the arrays themselves.

In explicit mode an array's type carries its layout, so a layer needs no rules: the few places where communication
happens say so by calling a function of this file, and everything else is inferred by jax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from glm_jax.sharding.quantized import QuantizedArray, WeightArray
from glm_jax.sharding.rules import MeshAxes, as_axes, spec_of
from glm_jax.sharding.turned import TurnedArray


def axes_of(x: jax.Array | TurnedArray, dimension: int) -> MeshAxes:
    """The mesh axes over which one dimension of a (traced) array is split, or of a weight that is turned round."""
    spec = x.spec if isinstance(x, TurnedArray) else jax.typeof(x).sharding.spec
    return as_axes(spec[dimension]) if dimension < len(spec) else ()


def local_size(x: WeightArray, dimension: int) -> int:
    """The size of one dimension of a (traced) array, or of a weight, on each device."""
    array = x.values if isinstance(x, QuantizedArray) else x
    sizes = jax.sharding.get_abstract_mesh().shape
    return array.shape[dimension] // math.prod(sizes[axis] for axis in axes_of(array, dimension))


def einsum_reduce(equation: str, x: jax.Array, weight: jax.Array, **options: Any) -> jax.Array:
    """An einsum over dimensions that may be split: the partial results are summed over the devices (all-reduce).

    The result keeps the layout of every dimension that stays. This is the row-parallel projection of tensor
    parallelism; jax refuses it without a stated result layout.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.einsum(equation, x, weight, **options)
    inputs, result = equation.split("->")
    layout: dict[str, MeshAxes | None] = {}
    for labels, operand in zip(inputs.split(","), (x, weight), strict=True):
        for dimension, label in enumerate(labels):
            layout[label] = layout.get(label) or axes_of(operand, dimension) or None
    return jnp.einsum(equation, x, weight, out_sharding=PartitionSpec(*(layout[label] for label in result)), **options)


def local_calls(
    function: Callable[..., tuple[jax.Array, ...]], *operands: Any, layouts: Sequence[Sequence[tuple[Any, int]]]
) -> tuple[jax.Array, ...]:
    """Call a function on each device's own part of the operands (arrays or trees of them), without communication.

    Each of `layouts` names for each dimension of a result the operand and dimension whose split it has.
    """
    if _is_local():
        return function(*operands)
    specs = tuple(spec_of(*(axes_of(operand, dimension) for operand, dimension in layout)) for layout in layouts)
    several = jax.sharding.get_abstract_mesh().size > 1
    return jax.shard_map(function, out_specs=specs, check_vma=several)(*operands)


def local_call(function: Callable[..., jax.Array], *operands: Any, layout: Sequence[tuple[Any, int]]) -> jax.Array:
    """As `local_calls`, of a function with one result."""
    return local_calls(lambda *parts: (function(*parts),), *operands, layouts=[layout])[0]


def local_sum(
    function: Callable[..., jax.Array], *operands: Any, layout: Sequence[tuple[Any, int]], over: MeshAxes
) -> jax.Array:
    """As `local_call`, and the sum of the results over the devices along the mesh axes `over` (all-reduce)."""
    # XLA's CPU backend would run an exchange of one device with itself.
    if not over or _is_local() or jax.sharding.get_abstract_mesh().size == 1:
        return local_call(function, *operands, layout=layout)
    return local_call(lambda *parts: jax.lax.psum(function(*parts), over), *operands, layout=layout)


def _is_local() -> bool:
    """Whether arrays are one device's own here: there is no mesh, or this is inside a `shard_map` already."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or set(mesh.manual_axes) == set(mesh.axis_names)


def reshape(x: jax.Array, shape: Sequence[int], *, layout: Sequence[int | None]) -> jax.Array:
    """Reshape in place on each device; `layout` names for each new dimension the old one whose split it has.

    Where dimensions of size 1 are split (over one device), jax cannot tell by itself where the split goes.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x.reshape(shape)
    spec = spec_of(*(None if source is None else axes_of(x, source) for source in layout))
    return jnp.reshape(x, shape, out_sharding=spec)


def whole(x: jax.Array, dimension: int) -> jax.Array:
    """The array with one dimension no longer split (all-gather), where it is."""
    if jax.sharding.get_abstract_mesh().empty or not axes_of(x, dimension):
        return x
    return jax.sharding.reshard(x, spec_of(*(() if i == dimension else axes_of(x, i) for i in range(x.ndim))))


def ahead(x: jax.Array | np.ndarray, shift: int) -> jax.Array:
    """x [B, T] with what stands `shift` further on at each place: zeros at the end, and T whole on each device."""
    # Not by a roll: jax 0.11 cannot tell the layout of its parts where there is one sequence.
    return jnp.pad(whole(jnp.asarray(x), 1)[:, shift:], ((0, 0), (0, shift)))


def take_position(x: jax.Array, at: jax.Array) -> jax.Array:
    """Row at[b] of each sequence of x [B, T, D]: [B, 1, D]; of a split sequence from the device that has it."""
    if not axes_of(x, 1):
        return jnp.take_along_axis(x, at[:, None, None], axis=1)
    here = jnp.arange(x.shape[1])[None, :, None] == at[:, None, None]
    return jnp.sum(jnp.where(here, x, 0), axis=1, keepdims=True)


def take_rows(table: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of a table [V, D] by indices [B, T]: [B, T, D], laid out like the indices.

    The table's rows must be whole on every device, or the look-up would be a gather over all of them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return table[indices]
    layout = [axes_of(indices, dimension) or None for dimension in range(indices.ndim)]
    return table.at[indices].get(out_sharding=PartitionSpec(*layout, None))


def gather_weight(weight: WeightArray, axes: MeshAxes, *, dimension: int) -> WeightArray:
    """Inside a `shard_map`: the weight whole along a dimension that is split over `axes`, with its scales.

    Its gradient is summed and split again in one exchange (reduce-scatter).
    """

    def whole(array: jax.Array, dimension: int) -> jax.Array:
        return jax.lax.all_gather(array, axes, axis=dimension, tiled=True) if axes else array

    if not isinstance(weight, QuantizedArray):
        return whole(weight, dimension)
    outputs = weight.ndim - weight.inputs

    def whole_scale(scale: jax.Array) -> jax.Array:
        if dimension < outputs:
            return whole(scale, dimension)
        return whole(scale, outputs) if weight.grouped else scale  # groups are split along the first input dimension

    return weight.map(lambda values: whole(values, dimension), whole_scale)
