"""Grouped products of routed experts: rows sorted by expert, padded to blocks, and combined for each token.

A row stands for one choice of one token. `block_gmm` runs on any platform; `gpu.py` and `tpu.py` have others, which
share the sort and the combination with it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.kernels.precision import precision_of
from glm_jax.kernels.quantized import scaled_einsum
from glm_jax.kernels.reference import swiglu
from glm_jax.sharding import WeightArray

MAX_BLOCK_ROWS = 128


def block_gmm_experts(
    x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, *, gate_up_E2FD: WeightArray, down_EDF: WeightArray
) -> jax.Array:
    """Rows sorted by expert and padded to whole blocks; each block multiplies with its expert's weights.

    The block is about the rows an expert gets on average, so that one token reads K experts and a long prompt reads
    each expert a few times.
    """
    experts = down_EDF.shape[0]
    tokens, choices = ids_TK.shape
    rows = tokens * choices
    block = min(MAX_BLOCK_ROWS, 1 << max(1, rows // experts).bit_length() - 1)
    blocks = min(rows, rows // block + experts)
    order, counts = sort_by_expert(ids_TK, experts)
    blocks_of_expert = -(-counts // block)
    last_block = jnp.cumsum(blocks_of_expert)
    expert_of_block = jnp.sum(jnp.arange(blocks)[:, None] >= last_block, axis=1)
    # Where each sorted row lies among the padded blocks: its expert's first block, then its rank in that expert.
    expert_of_row = jnp.where(is_local(ids_TK, experts), ids_TK, experts).reshape(-1)[order]
    first_row = jnp.append(jnp.cumsum(counts) - counts, 0)[expert_of_row]
    first_block = jnp.append(last_block - blocks_of_expert, blocks)[expert_of_row]
    place = first_block * block + jnp.arange(rows) - first_row
    source = jnp.full(blocks * block, rows, jnp.int32).at[place].set(order.astype(jnp.int32), mode="drop")
    packed = x_TD.at[source // choices].get(mode="fill", fill_value=0).reshape(blocks, block, -1)
    expert_of_block = jnp.minimum(expert_of_block, experts - 1)
    precision = precision_of(x_TD.dtype)
    gate_up = scaled_einsum("btd,bcfd->btcf", packed, gate_up_E2FD[expert_of_block], precision=precision)
    hidden = swiglu(gate_up[:, :, 0], gate_up[:, :, 1])
    outputs = scaled_einsum("btf,bdf->btd", hidden, down_EDF[expert_of_block], precision=precision)
    place_of_choice = jnp.zeros(rows, jnp.int32).at[order].set(place.astype(jnp.int32))
    outputs = outputs.reshape(blocks * block, -1).at[place_of_choice].get(mode="fill", fill_value=0)
    return combine(outputs, ids_TK, weights_TK, experts)


def is_local(ids_TK: jax.Array, experts: int) -> jax.Array:
    """Whether each choice is of one of this device's experts, bool [T, K]."""
    return (ids_TK >= 0) & (ids_TK < experts)


def sort_by_expert(ids_TK: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The stable order of all choices by expert (those elsewhere last), and the number of rows of each expert."""
    flat = jnp.where(is_local(ids_TK, experts), ids_TK, experts).reshape(-1)
    counts = jnp.sum(flat[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return sort_order(flat), counts


def sort_order(keys: jax.Array) -> jax.Array:
    """The stable order of keys [R], int32 [R].

    In a `shard_map` jax takes the order for the same on all devices, as the numbers are that it sorts along with the
    keys; a gradient would then go to the rows of another device's order. Adding nothing of the keys says otherwise.
    """
    return jnp.argsort(keys, stable=True).astype(jnp.int32) + jnp.zeros_like(keys, dtype=jnp.int32)


def combine(outputs_RD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, experts: int) -> jax.Array:
    """Weighted sum of the choices of each token, in a fixed order: deterministic, unlike a scatter-add."""
    tokens, choices = ids_TK.shape
    weights = jnp.where(is_local(ids_TK, experts), weights_TK, 0.0)
    outputs = outputs_RD.reshape(tokens, choices, -1).astype(jnp.float32)
    outputs = jnp.where(is_local(ids_TK, experts)[:, :, None], outputs, 0.0)
    summed = jnp.einsum("tkd,tk->td", outputs, weights, precision=lax.Precision.HIGHEST)
    return summed.astype(outputs_RD.dtype)
