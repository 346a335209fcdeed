"""Mesh, logical-axis rules and the layouts that follow from them. Mesh axes are named here and nowhere else."""

from __future__ import annotations

from glm_jax.sharding.activation import (
    all_gather_dim,
    axes_of,
    embedding_lookup,
    local_size,
    reshape,
    select_token,
    shard_local,
    shift_left,
)
from glm_jax.sharding.devices import find_devices
from glm_jax.sharding.mesh import default_mesh, describe, make_mesh, parse_mesh, platform
from glm_jax.sharding.presets import PRESETS, rules_named
from glm_jax.sharding.quantized import PackedBfloat16, QuantizedArray, WeightArray, as_array
from glm_jax.sharding.rules import Rules, batch_sharding, shardings, with_shardings
from glm_jax.sharding.shown import short_repr
from glm_jax.sharding.weight import Constant, Normal, Weight, declare, map_weights, weights_by_name, with_dtype

__all__ = [
    "PRESETS",
    "Constant",
    "Normal",
    "PackedBfloat16",
    "QuantizedArray",
    "Rules",
    "Weight",
    "WeightArray",
    "all_gather_dim",
    "as_array",
    "axes_of",
    "batch_sharding",
    "declare",
    "default_mesh",
    "describe",
    "embedding_lookup",
    "find_devices",
    "local_size",
    "make_mesh",
    "map_weights",
    "parse_mesh",
    "platform",
    "reshape",
    "rules_named",
    "select_token",
    "shard_local",
    "shardings",
    "shift_left",
    "short_repr",
    "weights_by_name",
    "with_dtype",
    "with_shardings",
]
