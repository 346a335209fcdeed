"""The cache of a whole model, in the form of its groups: one stacked cache, or a tuple where they are unrolled."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from glm_jax.configs import ModelConfig
from glm_jax.layers.kv_cache import KvCache
from glm_jax.model.stack import Group, GroupCache, depth, is_stacked
from glm_jax.sharding import Rules, batch_axes, mesh_of, spec_of

if TYPE_CHECKING:
    from glm_jax.model.transformer import Transformer


@functools.partial(jax.tree_util.register_dataclass, data_fields=["dense", "moe", "mtp"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer; `mtp` is None unless asked for."""

    dense: GroupCache
    moe: GroupCache
    mtp: KvCache | None


def create_cache(model: Transformer, batch: int, length: int, *, dtype: Any = None, mtp: bool = False) -> Cache:
    """Return an empty cache for `batch` sequences of up to `length` tokens, on the model's mesh.

    The batch is split as `sharding.batch_axes` says, the heads as the kv heads; dtype is the weights' by default.
    """
    mesh = mesh_of(model)
    dtype = model.dtype if dtype is None else dtype
    build = functools.partial(
        _layer_cache, model.config, batch=batch, length=length, dtype=dtype, mesh=mesh, rules=model.rules
    )

    def group_cache(group: Group | None) -> GroupCache:
        if group is None:
            return None
        if is_stacked(group):
            return build(layers=depth(group))
        return tuple(build() for _ in range(depth(group)))

    return Cache(group_cache(model.dense), group_cache(model.moe), build() if mtp and model.mtp is not None else None)


def _layer_cache(
    config: ModelConfig,
    *,
    batch: int,
    length: int,
    dtype: Any,
    mesh: Mesh,
    rules: Rules,
    layers: int | None = None,
) -> KvCache:
    attention = config.attention
    shape: tuple[int, ...] = (batch, attention.num_kv_heads, length, attention.head_dim)
    spec = [batch_axes(batch, mesh, rules), rules.kv_heads, None, None]
    if layers is not None:
        shape, spec = (layers, *shape), [None, *spec]
    sharding = NamedSharding(mesh, spec_of(*spec))
    return KvCache(jnp.zeros(shape, dtype, device=sharding), jnp.zeros(shape, dtype, device=sharding))
