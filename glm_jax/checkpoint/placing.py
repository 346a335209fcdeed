"""Puts arrays on devices, slice by slice: the host holds no more than a piece of one slice.

Each slice is read once, however many devices hold it, and a slice larger than `PIECE_BYTES` is assembled on the device.
jax's own `make_array_from_callback` holds all slices of this process at once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from glm_jax.checkpoint.quantized import Index

PIECE_BYTES = 2**27
_NO_MESH = Mesh(np.empty((), object), ())


def place(target: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """Return the array of the target's shape, dtype and sharding whose slices `read` gives.

    Of a sharding over several processes each reads the slices of its own devices.
    """
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = defaultdict(list)
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        assert index is not None
        bounds = (part.indices(size)[:2] for part, size in zip(index, target.shape, strict=True))
        devices[tuple((start, stop) for start, stop in bounds)].append(device)
    shards: list[jax.Array] = []
    for box, holders in devices.items():
        shards += _shard(tuple(slice(*bounds) for bounds in box), target.dtype, holders, read=read)
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)


def _shard(
    box: Index, dtype: np.dtype, devices: list[jax.Device], *, read: Callable[[Index], np.ndarray]
) -> list[jax.Array]:
    """The slice `box` on each of the devices."""
    shape = tuple(part.stop - part.start for part in box)
    pieces = list(_pieces(box, dtype.itemsize))
    if len(pieces) == 1:
        part = read(box).astype(dtype)
        return [jax.device_put(part, device).block_until_ready() for device in devices]
    with jax.set_mesh(_NO_MESH):  # the caller's has other devices than each of these programs
        shards = [_widen(jax.device_put(np.zeros((), dtype), device), shape) for device in devices]
        for piece in pieces:
            part = read(piece).astype(dtype)
            start = np.array([at.start - whole.start for at, whole in zip(piece, box, strict=True)], np.int32)
            for i, device in enumerate(devices):
                shards[i] = _write(shards[i], *jax.device_put((part, start), device)).block_until_ready()
    return shards


@functools.partial(jax.jit, static_argnums=1)
def _widen(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.numpy.broadcast_to(value, shape)


@functools.partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, part, [start[axis] for axis in range(array.ndim)])


def _pieces(box: Index, itemsize: int) -> Iterator[Index]:
    """Parts of a box of at most `PIECE_BYTES`, divided along its first dimensions as far as needed."""
    sizes = [part.stop - part.start for part in box]
    if not sizes:
        yield box
        return
    axis = 0
    while axis < len(sizes) - 1 and math.prod(sizes[axis + 1 :]) * itemsize > PIECE_BYTES:
        axis += 1
    step = max(1, PIECE_BYTES // max(1, math.prod(sizes[axis + 1 :]) * itemsize))
    single = [[slice(i, i + 1) for i in range(part.start, part.stop)] for part in box[:axis]]
    runs = [slice(i, min(i + step, box[axis].stop)) for i in range(box[axis].start, box[axis].stop, step)]
    for lead in itertools.product(*single, runs):
        yield (*lead, *box[axis + 1 :])
