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

from glm_jax.sharding.quantized import PackedBfloat16, QuantizedArray, WeightArray, values_of
from glm_jax.sharding.rules import MeshAxes, as_axes, spec_of


def axes_of(x: WeightArray, dimension: int) -> MeshAxes:
    """The mesh axes over which one dimension of a (traced) array or weight is split."""
    spec = jax.typeof(values_of(x)).sharding.spec
    return as_axes(spec[dimension]) if dimension < len(spec) else ()


def local_size(x: WeightArray, dimension: int) -> int:
    """The size of one dimension of a (traced) array or weight on each device."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return values_of(x).shape[dimension] // math.prod(sizes[axis] for axis in axes_of(x, dimension))


def layout_of(layout: Sequence[tuple[Any, int] | None]) -> PartitionSpec:
    """The layout of a result by, for each of its dimensions, the operand and dimension whose split it has."""
    return spec_of(*(() if source is None else axes_of(*source) for source in layout))


def shard_local(
    function: Callable[..., jax.Array], *operands: Any, layout: Sequence[tuple[Any, int] | None], over: MeshAxes = ()
) -> jax.Array:
    """Call a function on each device's own part of the operands, which are arrays, weights or trees of them.

    Args:
        function: of the parts.
        operands: its arguments.
        layout: for each dimension of the result the operand and dimension whose split it has.
        over: mesh axes over which the results of the devices are summed (all-reduce); there is no other communication.
    """
    if is_local():
        return function(*operands)
    # XLA's CPU backend would run an exchange of one device with itself.
    alone = jax.sharding.get_abstract_mesh().size == 1

    def part(*operands: Any) -> jax.Array:
        result = function(*operands)
        return jax.lax.psum(result, over) if over and not alone else result

    return jax.shard_map(part, out_specs=layout_of(layout), check_vma=not alone)(*operands)


def is_local() -> bool:
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


def all_gather_dim(x: jax.Array, dimension: int) -> jax.Array:
    """x with one dimension whole on every device: an all-gather, where the dimension is split."""
    if jax.sharding.get_abstract_mesh().empty or not axes_of(x, dimension):
        return x
    return jax.sharding.reshard(x, spec_of(*(() if i == dimension else axes_of(x, i) for i in range(x.ndim))))


def shift_left(x: jax.Array | np.ndarray, shift: int) -> jax.Array:
    """x [B, T] shifted left by `shift` positions and padded with zeros; each device gets all of T."""
    # Not by a roll: jax 0.11 cannot tell the layout of its parts where there is one sequence.
    return jnp.pad(all_gather_dim(jnp.asarray(x), 1)[:, shift:], ((0, 0), (0, shift)))


def select_token(x: jax.Array, at: jax.Array) -> jax.Array:
    """Token at[b] of each sequence of x [B, T, D]: [B, 1, D]; of a split sequence from the device that has it."""
    if not axes_of(x, 1):
        return jnp.take_along_axis(x, at[:, None, None], axis=1)
    here = jnp.arange(x.shape[1])[None, :, None] == at[:, None, None]
    return jnp.sum(jnp.where(here, x, 0), axis=1, keepdims=True)


def embedding_lookup(table: WeightArray, tokens: jax.Array) -> jax.Array:
    """Rows of a table [V, D] by tokens [B, T]: [B, T, D], laid out like the tokens.

    Each device must have all rows of the table, or the look-up would gather them.
    """
    if isinstance(table, PackedBfloat16):
        return table.map(lambda values: embedding_lookup(values, tokens)).dequantize()
    assert isinstance(table, jax.Array), "an embedding table is never quantised"
    if jax.sharding.get_abstract_mesh().empty:
        return table[tokens]
    layout = [axes_of(tokens, dimension) or None for dimension in range(tokens.ndim)]
    return table.at[tokens].get(out_sharding=PartitionSpec(*layout, None))


def gather_weight(weight: WeightArray, axes: MeshAxes, *, dimension: int) -> WeightArray:
    """Inside a `shard_map`: the weight whole along a dimension that is split over `axes`, with its scales.

    Its gradient is summed and split again in one exchange (reduce-scatter).
    """

    def gather(array: jax.Array, dimension: int) -> jax.Array:
        return jax.lax.all_gather(array, axes, axis=dimension, tiled=True) if axes else array

    if isinstance(weight, PackedBfloat16):
        return weight.map(lambda values: gather(values, dimension))
    if not isinstance(weight, QuantizedArray):
        return gather(weight, dimension)
    outputs = weight.ndim - weight.contracting_dims

    def gather_scale(scale: jax.Array) -> jax.Array:
        if dimension < outputs:
            return gather(scale, dimension)
        return gather(scale, outputs) if weight.grouped else scale  # groups are split along the first input dimension

    return weight.map(lambda values: gather(values, dimension), gather_scale)
