"""Muon: the momentum of a matrix, orthogonalised (https://kellerjordan.github.io/posts/muon, arXiv 2502.16982).

Which dimensions of a weight are the matrix follows from the logical axes it was declared with: heads and their width
count as one dimension, experts and stacked layers as batch, and of what is left the last two are output and input. So
gate and up, one leaf, are two matrices, and a per-head bias is none.

The iteration runs on one layer after the other, on all of its matrices at once: a batch of experts that is split over
devices stays split and each device orthogonalises its own. Where the matrix itself is split, the devices exchange
parts for whole matrices first (all-to-all; all-gather only of a single matrix).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from glm_jax.sharding import Weight, axes_of
from glm_jax.sharding.weight import layer_axis

COEFFICIENTS = (3.4445, -4.775, 2.0315)
_HEADS = ("heads", "kv_heads")


class MatrixAxes(NamedTuple):
    """A weight as a batch of matrices: `batch` leading dimensions, then `outputs`, then `inputs` dimensions."""

    batch: int
    outputs: int
    inputs: int


class MuonState(NamedTuple):
    """The momentum of each weight."""

    momentum: optax.Updates


def matrix_axes(weight: Weight) -> MatrixAxes | None:
    """The matrix dimensions of a weight, from its declared axes; None if it is no matrix (a norm, a bias)."""
    sizes: list[int] = []  # how many dimensions each logical dimension of the matrix takes
    batch = int(layer_axis(weight))
    for i, axis in enumerate(weight.axes):
        if axis == "expert":
            batch += 1
        elif axis == "head_dim" and i and weight.axes[i - 1] in _HEADS:
            sizes[-1] += 1
        else:
            sizes.append(1)
    if len(sizes) < 2:
        return None
    return MatrixAxes(batch + sum(sizes[:-2]), sizes[-2], sizes[-1])


def scale_by_muon(
    axes: Mapping[str, MatrixAxes],
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    update_rms: float = 0.2,
) -> optax.GradientTransformation:
    """Turn the gradients of matrices, a dict by weight name, into orthogonal updates of equal size.

    Each matrix' update has singular values near `update_rms * sqrt(max(outputs, inputs))`, so that its root mean
    square is near `update_rms`, as AdamW's, whatever its shape (arXiv 2502.16982, equation 4).

    Args:
        axes: of every weight that comes.
        momentum: decay of the running mean of the gradients.
        nesterov: look one step ahead along the momentum.
        steps: of the Newton-Schulz iteration.
        update_rms: of an entry of the update, before the learning rate.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(
        gradients: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        moved = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.momentum, gradients)
        ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, moved, gradients) if nesterov else moved
        # By path, not by item: optax.partition leaves a place without leaves for each weight that is another's.
        updates = jax.tree_util.tree_map_with_path(
            lambda path, value: _orthogonal_update(value, axes[path[-1].key], steps=steps, update_rms=update_rms), ahead
        )
        return updates, MuonState(moved)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: jax.Array, *, steps: int = 5) -> jax.Array:
    """The matrices x [..., M, N] with their singular values moved to about 1 (0.7 to 1.2), by Newton-Schulz.

    Runs in the dtype of x, at full precision.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.swapaxes(-1, -2), steps=steps).swapaxes(-1, -2)
    a, b, c = COEFFICIENTS
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-8)

    def iterate(_, x):
        gram = _matmul(x, x.swapaxes(-1, -2))
        return a * x + _matmul(b * gram + c * _matmul(gram, gram), x)

    return jax.lax.fori_loop(0, steps, iterate, x)  # a loop, because unrolled it is most of the step's compile time


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


class _Move(NamedTuple):
    """A mesh axis that splits dimension `source` of a matrix, to dimension `target` of the batch; None gathers it."""

    axis: str
    source: int
    target: int | None


def _orthogonal_update(value: jax.Array, axes: MatrixAxes, *, steps: int, update_rms: float) -> jax.Array:
    rows = math.prod(value.shape[axes.batch : axes.batch + axes.outputs])
    columns = math.prod(value.shape[axes.batch + axes.outputs :])
    moves, padding = _moves_to_whole_matrices(value, axes.batch)

    def region(x: jax.Array) -> jax.Array:
        length = x.shape[0]
        x = jnp.pad(x, [(0, padding), *[(0, 0)] * (x.ndim - 1)]) if padding else x
        for move in moves:
            x = _move(x, move)
        matrices = x.reshape(*x.shape[: axes.batch], rows, columns)
        update = _orthogonal_layers(matrices, steps=steps) * (update_rms * math.sqrt(max(rows, columns)))
        update = update.reshape(x.shape)
        for move in reversed(moves):
            update = _move_back(update, move)
        return update[:length] if padding else update

    if jax.sharding.get_abstract_mesh().empty:
        return region(value)
    return jax.shard_map(region, out_specs=jax.typeof(value).sharding.spec)(value)


def _orthogonal_layers(matrices: jax.Array, *, steps: int) -> jax.Array:
    """`orthogonalize`, one part of the first batch dimension after the other: what is between takes a part's room."""
    one = functools.partial(orthogonalize, steps=steps)
    return jax.lax.map(one, matrices) if matrices.ndim > 2 else one(matrices)


def _moves_to_whole_matrices(value: jax.Array, batch: int) -> tuple[list[_Move], int]:
    """How the axes that split matrices move to the batch, one after the other, and the matrices of zeros to add.

    Where no dimension of the batch divides, the first is filled up with matrices of zeros, unless it is split itself:
    else every device would hold, and turn, the matrices of all. One at a time, because an exchange over several axes
    at once is one that compilers make by gathering everything.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return [], 0
    sizes = jax.sharding.get_abstract_mesh().shape
    layout = [list(axes_of(value, i)) for i in range(value.ndim)]
    moves, padding = [], 0
    for source in range(batch, value.ndim):
        for axis in reversed(layout[source]):  # the last one splits the finest: its parts are neighbours
            if sizes[axis] > 1:
                dividing = (i for i in range(batch) if not _rest(value.shape[i], (*layout[i], axis), sizes))
                target = next(dividing, None)
                moves.append(_Move(axis, source, target))
                if target is not None:
                    layout[target].append(axis)
    left = [move.axis for move in moves if move.target is None]
    if left and batch and not axes_of(value, 0):
        padding = _rest(value.shape[0], (*layout[0], *left), sizes)
        moves = [move if move.target is not None else move._replace(target=0) for move in moves]
    return moves, padding


def _rest(size: int, axes: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    """What a size lacks to be divided over axes."""
    return -size % math.prod(sizes[axis] for axis in axes)


def _move(x: jax.Array, move: _Move) -> jax.Array:
    if move.target is None:
        return jax.lax.all_gather(x, move.axis, axis=move.source, tiled=True)
    return jax.lax.all_to_all(x, move.axis, split_axis=move.target, concat_axis=move.source, tiled=True)


def _move_back(x: jax.Array, move: _Move) -> jax.Array:
    if move.target is not None:
        return jax.lax.all_to_all(x, move.axis, split_axis=move.source, concat_axis=move.target, tiled=True)
    part = x.shape[move.source] // jax.lax.axis_size(move.axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(move.axis) * part, part, axis=move.source)
