"""Balancing the experts without a loss: after each step the routers' biases move against their loads.

An expert chosen less often than the mean gains `rate`, one chosen more often loses it (arXiv 2408.15664, algorithm 1).
The bias decides who is chosen and is in no product, so it has no gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.model import Output
from glm_jax.sharding import map_weights, shift_left
from glm_jax.training.batch import Batch

_BIAS = "router.bias"
_MTP = "mtp"


def is_bias(name: str) -> bool:
    """Whether a weight is a router's correction bias."""
    return name.endswith(_BIAS)


def expert_loads(output: Output, batch: Batch, *, experts: int) -> dict[str, jax.Array]:
    """How often each expert was chosen for the batch's tokens without padding, float32.

    Returns:
        `moe` [L, E], a row for each MoE layer, and `mtp` [E] if the MTP layer ran.
    """
    padding_mask = jnp.asarray(batch.padding_mask)
    loads = {}
    if output.expert_ids is not None:
        loads["moe"] = _count(output.expert_ids, padding_mask, experts)
    if output.mtp_expert_ids is not None:
        loads[_MTP] = _count(
            output.mtp_expert_ids, shift_left(padding_mask, 1)[:, : output.mtp_expert_ids.shape[1]], experts
        )
    return loads


def _count(ids: jax.Array, padding_mask: jax.Array, experts: int) -> jax.Array:
    """ids [..., B, T, K] -> [..., E]."""
    chosen = (ids[..., None] == jnp.arange(experts)) & padding_mask[:, :, None, None]
    return jnp.sum(chosen.astype(jnp.float32), axis=(-4, -3, -2))


def update_router_biases(model: Any, loads: dict[str, jax.Array], rate: jax.Array | float) -> Any:
    """Return the model with each router's bias moved by `rate` towards equal loads."""

    def move(name, weight):
        bias = weight.get_raw_value()
        if not is_bias(name):
            return bias
        group, layer = name.split(".")[:2]
        if group not in loads:
            return bias
        load = loads[group]
        if layer.isdecimal():
            load = load[int(layer)]
        return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)

    return map_weights(move, model)


def imbalance(loads: dict[str, jax.Array]) -> jax.Array:
    """The busiest expert's load over the mean, the worst of all layers: 1 is perfect."""
    worst = [jnp.max(jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1.0)) for load in loads.values()]
    return jnp.max(jnp.stack(worst)) if worst else jnp.float32(1.0)
