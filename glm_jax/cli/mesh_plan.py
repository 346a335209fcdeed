"""What a model takes on each device of a mesh that need not exist: arithmetic over the declared weights and the rules.

The layouts are those of `sharding.shardings`, so a mesh is refused here for the same reason as when loading.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import cast

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from glm_jax.configs import ModelConfig
from glm_jax.errors import ShardingError
from glm_jax.model import Transformer
from glm_jax.sharding import Rules, batch_axes, shardings, weights_by_name, with_dtype
from glm_jax.sharding.mesh import AXIS_NAMES

__all__ = ["Request", "ShardingError", "bytes_per_device", "meshes"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to run: a model in a dtype, with a cache for `batch` sequences of `length` tokens."""

    config: ModelConfig
    dtype: str
    batch: int
    length: int


def meshes(devices: int) -> Iterator[Mesh]:
    """Every mesh of exactly that many devices, abstract: only the names and sizes of its axes are real."""
    for first in (size for size in range(1, devices + 1) if devices % size == 0):
        rest = devices // first
        for second in (size for size in range(1, rest + 1) if rest % size == 0):
            yield cast(Mesh, AbstractMesh((first, second, rest // second), AXIS_NAMES))


def bytes_per_device(request: Request, mesh: Mesh) -> tuple[int, int]:
    """The bytes of the weights and of the cache on each device.

    Raises:
        ShardingError: the mesh does not divide the model.
    """
    model = with_dtype(Transformer(dataclasses.replace(request.config, mtp_copies=())), jnp.dtype(request.dtype))
    placed = shardings(model, mesh)
    weights = 0
    for name, weight in weights_by_name(model).items():
        value = weight.get_raw_value()
        weights += math.prod(placed[name].shard_shape(value.shape)) * value.dtype.itemsize
    return weights, _cache_bytes(request, mesh)


def _cache_bytes(request: Request, mesh: Mesh) -> int:
    """Keys and values of all layers, split as `model.create_cache` splits them: by batch and by kv heads."""
    attention = request.config.attention
    sequences = request.batch // _devices(mesh, batch_axes(request.batch, mesh))
    heads = attention.num_kv_heads // _devices(mesh, Rules().kv_heads)
    values = 2 * sequences * heads * request.length * attention.head_dim
    return request.config.num_layers * values * jnp.dtype(request.dtype).itemsize


def _devices(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
