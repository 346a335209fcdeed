"""Mesh, logical-axis rules and the layouts that follow from them. Mesh axes are named here and nowhere else."""

from __future__ import annotations

from glm_jax.sharding import distributed
from glm_jax.sharding.activation import (
    ahead,
    axes_of,
    einsum_reduce,
    gather_weight,
    local_call,
    local_calls,
    local_size,
    local_sum,
    reshape,
    take_position,
    take_rows,
    whole,
)
from glm_jax.sharding.apart import apart_axes, gathering_pays, multiply_apart, spread_outputs
from glm_jax.sharding.compilation_cache import cache_directory, keep_programs, make_cache_directory
from glm_jax.sharding.mesh import default_mesh, describe, make_mesh, mesh_sizes, parse_mesh, platform
from glm_jax.sharding.presets import PRESETS, name_of, rules_named
from glm_jax.sharding.quantized import QuantizedArray, WeightArray
from glm_jax.sharding.rules import (
    Rules,
    batch_axes,
    batch_sharding,
    length_axes,
    mesh_of,
    shardings,
    spec_of,
    with_shardings,
)
from glm_jax.sharding.turned import TurnedArray, multiply_together
from glm_jax.sharding.weight import (
    Constant,
    Normal,
    Weight,
    declare,
    initial_value,
    layer_axis,
    map_weights,
    weights_by_name,
    with_bits,
    with_dtype,
)

__all__ = [
    "PRESETS",
    "Constant",
    "Normal",
    "QuantizedArray",
    "Rules",
    "TurnedArray",
    "Weight",
    "WeightArray",
    "ahead",
    "apart_axes",
    "axes_of",
    "batch_axes",
    "batch_sharding",
    "cache_directory",
    "declare",
    "default_mesh",
    "describe",
    "distributed",
    "einsum_reduce",
    "gather_weight",
    "gathering_pays",
    "initial_value",
    "keep_programs",
    "layer_axis",
    "length_axes",
    "local_call",
    "local_calls",
    "local_size",
    "local_sum",
    "make_cache_directory",
    "make_mesh",
    "map_weights",
    "mesh_of",
    "mesh_sizes",
    "multiply_apart",
    "multiply_together",
    "name_of",
    "parse_mesh",
    "platform",
    "reshape",
    "rules_named",
    "shardings",
    "spec_of",
    "spread_outputs",
    "take_position",
    "take_rows",
    "weights_by_name",
    "whole",
    "with_bits",
    "with_dtype",
    "with_shardings",
]
