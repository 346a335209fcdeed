"""Arrays between the host and the devices of a mesh that may belong to several processes."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.errors import ShardingError
from glm_jax.sharding.mesh import describe


def check_mesh(mesh: Mesh) -> None:
    """Check that this process has a part of a mesh: without one it could not run the program of the others.

    Raises:
        ShardingError: it has none, or what was given is no mesh.
    """
    if not isinstance(mesh, Mesh):
        raise ShardingError(f"mesh {mesh!r} is no mesh; right would be glm_jax.make_mesh(data=1, expert=1, tensor=1)")
    there = {device.process_index for device in mesh.devices.flat}
    if jax.process_index() not in there:
        raise ShardingError(
            f"mesh {describe(mesh)} has no device of process {jax.process_index()}: {mesh.size} of the "
            f"{jax.device_count()} devices of {jax.process_count()} processes; start fewer, or choose a mesh over all"
        )


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array as numpy, gathered first if this process holds only a part; then all must call this."""
    if not array.is_fully_addressable and not array.is_fully_replicated:
        assert isinstance(array.sharding, NamedSharding) and isinstance(array.sharding.mesh, Mesh)
        with jax.set_mesh(array.sharding.mesh):
            array = _replicate(array)
    return np.asarray(array)


@jax.jit
def _replicate(array: jax.Array) -> jax.Array:
    return jax.reshard(array, PartitionSpec())


def to_devices(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Place an array that every process has whole; each places its own devices' parts."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
