"""Products with matrices that FSDP splits (`Rules.fsdp`): along the model's width, over axes that split the tokens.

There are two ways, and the number of tokens decides. Many tokens: each device gathers the matrix where it is used
(all-gather), and a reduce-scatter sums and splits its gradient. Few tokens: the matrix stays where it is, and the
tokens move. Where FSDP splits the inputs, each device takes its part of the width of all tokens of the group
(all-to-all), multiplies, and a reduce-scatter returns the summed products to the tokens' devices. Where it splits the
outputs, each device takes all tokens (all-gather), and the parts of the results go back (all-to-all).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.sharding.activation import axes_of, gather_weight, is_local, layout_of
from glm_jax.sharding.quantized import WeightArray, values_of
from glm_jax.sharding.rules import MeshAxes, spec_of

Layout = Sequence[tuple[WeightArray, int]]


def gathering_pays(tokens: int, *, sent: int, matrix: int) -> bool:
    """Whether to gather the numbers of a matrix rather than move tokens, each of which sends so many there and back."""
    return tokens * sent >= matrix


def fsdp_matmul(
    product: Callable[..., jax.Array], x: jax.Array, weight: WeightArray, *, fsdp: MeshAxes, layout: Layout
) -> jax.Array:
    """product(x [B, T, D], weight [..., D]) of a weight whose last dimension is split over the axes `fsdp`.

    `layout` names for each dimension of the result the operand and dimension whose split it has.
    """
    runs, gathered = _runs(x, fsdp), _gathers(x, weight, fsdp)
    last = weight.ndim - 1

    def region(x: jax.Array, weight: WeightArray) -> jax.Array:
        if gathered:
            return product(x, gather_weight(weight, fsdp, dimension=last))
        for axes, dimension in runs:
            if dimension is not None:
                x = jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=dimension, tiled=True)
            else:
                part = x.shape[2] // jax.lax.axis_size(axes)
                x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * part, part, axis=2)
        y = product(x, weight)
        for axes, dimension in reversed(runs):
            if dimension is not None:
                y = jax.lax.psum_scatter(y, axes, scatter_dimension=dimension, tiled=True)
            else:
                y = jax.lax.psum(y, axes)
        return y

    return jax.shard_map(region, out_specs=layout_of(layout))(x, weight)


def fsdp_matmul_outputs(
    product: Callable[..., jax.Array],
    x: jax.Array,
    weight: WeightArray,
    *,
    fsdp: MeshAxes,
    over: MeshAxes = (),
    dimension: int = 0,
) -> jax.Array:
    """product(x [B, T, ...], weight) -> [B, T, D] of a weight whose `dimension` D is split over the axes `fsdp`.

    The product is summed over the axes `over`, which split what it sums over.
    """
    runs, gathered = _runs(x, fsdp), _gathers(x, weight, fsdp)

    def region(x: jax.Array, weight: WeightArray) -> jax.Array:
        if gathered:
            y = product(x, gather_weight(weight, fsdp, dimension=dimension))
            return jax.lax.psum(y, over) if over else y
        for axes, at in runs:
            if at is not None:
                x = jax.lax.all_gather(x, axes, axis=at, tiled=True)
        y = product(x, weight)
        y = jax.lax.psum(y, over) if over else y
        for axes, at in reversed(runs):
            y = _back(y, axes, at)
        return y

    return jax.shard_map(region, out_specs=spec_of(axes_of(x, 0), axes_of(x, 1), None))(x, weight)


def _back(y: jax.Array, axes: MeshAxes, tokens_at: int | None) -> jax.Array:
    """From a part of the width D of all tokens of a group to the whole width of this device's tokens."""
    if tokens_at is not None:
        return jax.lax.all_to_all(y, axes, split_axis=tokens_at, concat_axis=2, tiled=True)
    # The tokens are the same everywhere. A gather would be typed as differing between devices, a sum is not.
    whole = jnp.zeros((*y.shape[:2], y.shape[2] * jax.lax.axis_size(axes)), y.dtype)
    whole = jax.lax.dynamic_update_slice_in_dim(
        whole + jnp.zeros_like(y[:1, :1, :1]), y, jax.lax.axis_index(axes) * y.shape[2], axis=2
    )
    return jax.lax.psum(whole, axes)


def _tokens(x: jax.Array) -> dict[str, int]:
    """Which of the dimensions B and T of x each mesh axis splits, of those that split one."""
    return {axis: dimension for dimension in (0, 1) for axis in axes_of(x, dimension)}


def _runs(x: jax.Array, fsdp: MeshAxes) -> list[tuple[MeshAxes, int | None]]:
    """The axes in runs that split the same dimension of x, or none of it: one exchange is over one run."""
    at = _tokens(x)
    return [(tuple(run), dimension) for dimension, run in itertools.groupby(fsdp, at.get)]


def _gathers(x: jax.Array, weight: WeightArray, fsdp: MeshAxes) -> bool:
    """Whether the weight is gathered; it never is for tokens that are the same on several of its parts."""
    sizes, at = jax.sharding.get_abstract_mesh().shape, _tokens(x)
    if any(axis not in at for axis in fsdp):
        return False
    values = values_of(weight)
    group = math.prod(sizes[axis] for axis in fsdp)
    local = [values.shape[i] // math.prod(sizes[a] for a in axes_of(values, i)) for i in range(values.ndim)]
    inputs = next(values.shape[i] for i in range(values.ndim) if any(axis in fsdp for axis in axes_of(values, i)))
    outputs = 1 if x.ndim == 2 else math.prod(local) * group // inputs  # a look-up sends an index
    tokens = x.shape[0] * x.shape[1] * group // math.prod(sizes[axis] for axis in at)
    return gathering_pays(tokens, sent=inputs + outputs, matrix=math.prod(local) * group)


def fsdp_axes(weight: Any, dimension: int) -> MeshAxes:
    """The axes over which a dimension of a weight is split; none without a mesh or inside a `shard_map`."""
    return () if is_local() else axes_of(weight, dimension)
