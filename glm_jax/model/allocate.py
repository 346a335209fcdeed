"""Caches as they lie on a model's mesh, empty or abstract."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from glm_jax.kernels import ops_for
from glm_jax.layers.kv_cache import LayerCache
from glm_jax.model.cache import Cache
from glm_jax.model.decoder_layer import DecoderLayer
from glm_jax.model.stack import Group, GroupCache, depth, is_stacked
from glm_jax.model.transformer import Transformer
from glm_jax.sharding import Rules
from glm_jax.sharding.rules import as_axes, batch_axes, length_axes, spec_of


def cache_axes(axis: str | None, batch: int, length: int, *, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """The mesh axes over which a logical axis of a cache of `batch` sequences of `length` tokens is split."""
    if axis == "batch":
        return batch_axes(batch, mesh, rules)
    return length_axes(batch, length, mesh, rules) if axis == "length" else rules.mesh_axes(axis)


def cache_part(
    shape: tuple[int, ...], axes: tuple[str | None, ...], *, mesh: Mesh, rules: Rules, dtype: Any
) -> jax.ShapeDtypeStruct:
    """One array of a layer's cache, by its logical axes, as it lies on a mesh.

    Latent vectors are padded to the multiple that the mesh's platform wants (`kernels.storage`).
    """
    multiple = ops_for(mesh).storage.latent_multiple
    shape = tuple(-(-n // multiple) * multiple if a == "latent" else n for n, a in zip(shape, axes, strict=True))
    batch, length = (shape[axes.index(name)] for name in ("batch", "length"))
    split = (cache_axes(axis, batch, length, mesh=mesh, rules=rules) for axis in axes)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec_of(*split)))


def create_cache(model: Transformer, batch: int, length: int, *, dtype: Any = None, mtp: bool = False) -> Cache:
    """Return an empty cache for `batch` sequences of up to `length` tokens, on the model's mesh.

    What is cached, and which of it is split over devices, each layer's attention says; batch and length are
    split as `sharding.batch_axes` and `sharding.length_axes` say. The dtype is the weights' by default.
    """
    abstract = abstract_cache(model, batch, length, dtype=dtype, mtp=mtp)
    leaves, structure = jax.tree.flatten(abstract)
    return jax.tree.unflatten(structure, _zeros(tuple(leaves))())


@functools.lru_cache(maxsize=64)
def _zeros(leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Callable[[], list[jax.Array]]:
    """One program for all arrays: one by one, those of every prompt would take milliseconds."""

    def zeros() -> list[jax.Array]:
        return [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]

    return jax.jit(zeros, out_shardings=[leaf.sharding for leaf in leaves])


def abstract_cache(model: Transformer, batch: int, length: int, *, dtype: Any = None, mtp: bool = False) -> Cache:
    """As `create_cache`, of a model on a mesh or an abstract one with shardings: shapes, dtypes and shardings only."""
    mesh = model.mesh
    dtype = model.dtype if dtype is None else dtype

    def layer_cache(layer: DecoderLayer, layers: int | None = None) -> LayerCache:
        def abstract(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Any:
            one = cache_part(shape, axes, mesh=mesh, rules=model.rules, dtype=dtype)
            if layers is None:
                return one
            stacked = NamedSharding(mesh, spec_of((), *map(as_axes, one.sharding.spec)))
            return jax.ShapeDtypeStruct((layers, *one.shape), dtype, sharding=stacked)

        return layer.attention.empty_cache(abstract, batch=batch, length=length)

    def group_cache(group: Group | None) -> GroupCache:
        if group is None:
            return None
        if is_stacked(group):
            return layer_cache(group, depth(group))
        return tuple(layer_cache(layer) for layer in group)

    mtp_cache = layer_cache(model.mtp.layer) if mtp and model.mtp is not None else None
    return Cache(group_cache(model.dense), group_cache(model.moe), mtp_cache)
