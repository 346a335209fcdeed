"""The cache of a whole model, in the layout of its groups: one stacked cache, or a tuple where they are unrolled."""

from __future__ import annotations

import dataclasses
import functools

import jax

from glm_jax.layers.kv_cache import LayerCache
from glm_jax.model.stack import GroupCache
from glm_jax.sharding import short_repr


@functools.partial(jax.tree_util.register_dataclass, data_fields=["dense", "moe", "mtp"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What attention keeps, of every layer; `mtp` is None unless asked for."""

    dense: GroupCache
    moe: GroupCache
    mtp: LayerCache | None

    __repr__ = short_repr
