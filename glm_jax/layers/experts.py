"""The routed experts of one device as named implementations of one interface.

    implementation(x_TD, ids_TK, weights_TK, *, gate_up_E2FD, down_EDF) -> y_TD

y[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t]). The E experts are those of this device; an id outside
0..E-1 means an expert elsewhere and adds nothing. No implementation drops a token.

    dense    every expert on every token, by one einsum: the reference, and right where a batch touches all experts
    vectors  each choice by itself, a vector by its expert's matrices: GPU decode of few sequences
    blocks   rows sorted by expert and padded to blocks, each block with its expert's weights gathered: any platform
    ragged   rows sorted by expert, `lax.ragged_dot`: TPU and training (dense and slow on NVIDIA and CPU)
    switch   a loop over the experts hit with a tight product each: CPU
    single   a loop over all choices: a CPU's decode of few sequences through small experts
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.configs import MoeConfig
from glm_jax.layers.experts_switch import single_experts, switch_experts
from glm_jax.layers.linear import precision_of
from glm_jax.layers.mlp import swiglu
from glm_jax.layers.quantized import merge_outputs, weight_einsum
from glm_jax.sharding import QuantizedArray, WeightArray, platform

Experts = Callable[..., jax.Array]
MAX_BLOCK_ROWS = 128
CACHED_PARAMETERS = 2**19  # 2 MiB of float32
MAX_SINGLE_CHOICES = 64  # of all tokens, that a CPU takes one after the other
MAX_DENSE_TOKENS = 512  # of a TPU's decode step, for which grouped products would copy the experts out of the stack


def dense_experts(
    x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, *, gate_up_E2FD: WeightArray, down_EDF: WeightArray
) -> jax.Array:
    """All local experts on all tokens; those not chosen get weight 0."""
    precision = precision_of(x_TD.dtype)
    chosen_TKE = ids_TK[:, :, None] == jnp.arange(down_EDF.shape[0])
    weights_TE = jnp.sum(jnp.where(chosen_TKE, weights_TK[:, :, None], 0.0), axis=1)
    # Tokens last, as the product makes them: a GPU would write any other order again, as an array of its own, and a CPU
    # is kept from making a product of it for which it repacks the weights.
    gate_up = _as_made(weight_einsum("td,ecfd->ecft", x_TD, gate_up_E2FD, precision=precision))
    hidden = swiglu(gate_up[:, 0], gate_up[:, 1]).swapaxes(1, 2)
    if platform() == "cpu":
        outputs = _as_made(weight_einsum("etf,edf->edt", hidden, down_EDF, precision=precision)).swapaxes(1, 2)
    else:
        outputs = weight_einsum("etf,edf->etd", hidden, down_EDF, precision=precision)
    return jnp.einsum("etd,te->td", outputs.astype(jnp.float32), weights_TE, precision=lax.Precision.HIGHEST).astype(
        x_TD.dtype
    )


def _as_made(product: jax.Array) -> jax.Array:
    return lax.optimization_barrier(product) if platform() == "cpu" else product


def vector_experts(
    x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, *, gate_up_E2FD: WeightArray, down_EDF: WeightArray
) -> jax.Array:
    """Each choice by itself, as a sum of elementwise products with its expert's weights.

    A GPU reads the weights of such a sum from where they lie; for a product of matrices it would gather them first, as
    copies. An expert that several tokens chose is read for each.
    """
    experts = down_EDF.shape[0]
    ids_R = jnp.clip(ids_TK, 0, experts - 1).reshape(-1)
    gate_up = _vector_product(jnp.repeat(x_TD, ids_TK.shape[1], axis=0), gate_up_E2FD, ids_R)
    hidden = swiglu(gate_up[:, 0], gate_up[:, 1])
    return _combine(_vector_product(hidden, down_EDF, ids_R), ids_TK, weights_TK, experts)


def _vector_product(x_RN: jax.Array, weight_EXN: WeightArray, ids_R: jax.Array) -> jax.Array:
    """Each row by the matrices of its expert, [R, ...]: the weight has any number of outputs' dimensions."""

    def of_rows(array: jax.Array) -> jax.Array:
        return array.at[ids_R].get(mode="promise_in_bounds")

    if isinstance(weight_EXN, QuantizedArray):
        weight_RXN = weight_EXN.map(of_rows).dequantize(jnp.float32)
    else:
        weight_RXN = of_rows(weight_EXN).astype(jnp.float32)
    x = x_RN.astype(jnp.float32).reshape(x_RN.shape[0], *(1,) * (weight_RXN.ndim - 2), -1)
    return jnp.sum(x * weight_RXN, axis=-1).astype(x_RN.dtype)


def ragged_experts(
    x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, *, gate_up_E2FD: WeightArray, down_EDF: WeightArray
) -> jax.Array:
    """Rows sorted by expert, one grouped product over runs of unequal length."""
    experts, _, width, _ = gate_up_E2FD.shape
    order, counts = _sort_by_expert(ids_TK, experts)
    rows = x_TD[order // ids_TK.shape[1]]
    gate_up = _ragged_product(rows, merge_outputs(gate_up_E2FD, 1, 2), counts)
    hidden = swiglu(gate_up[:, :width], gate_up[:, width:])
    outputs = _ragged_product(hidden, down_EDF, counts)
    return _combine(outputs[sort_order(order)], ids_TK, weights_TK, experts)


def _ragged_product(x_RN: jax.Array, weight_EMN: WeightArray, counts_E: jax.Array) -> jax.Array:
    """Runs of rows, `counts` long, each by its expert's matrix: [R, M]."""
    precision = precision_of(x_RN.dtype)
    if isinstance(weight_EMN, QuantizedArray) and weight_EMN.bits:
        weight_EMN = weight_EMN.as_bfloat16().astype(x_RN.dtype)
    if not isinstance(weight_EMN, QuantizedArray):
        return lax.ragged_dot(x_RN, weight_EMN.swapaxes(1, 2), counts_E, precision=precision)
    # Rows beyond the last run are zero whatever they are scaled by.
    expert_of_row = jnp.sum(jnp.arange(x_RN.shape[0])[:, None] >= jnp.cumsum(counts_E), axis=1)
    scale_EMG = weight_EMN.scale if weight_EMN.grouped else weight_EMN.scale[..., None]
    size = weight_EMN.group_size

    def of_group(group: jax.Array | int) -> jax.Array:
        x = lax.dynamic_slice_in_dim(x_RN, group * size, size, axis=1)
        values = lax.dynamic_slice_in_dim(weight_EMN.values, group * size, size, axis=2)
        values = weight_EMN.numbers(values, x.dtype)
        y = lax.ragged_dot(x, values.swapaxes(1, 2), counts_E, precision=precision, preferred_element_type=jnp.float32)
        scale = lax.dynamic_index_in_dim(scale_EMG, group, axis=2, keepdims=False)
        return y * scale.at[expert_of_row].get(mode="clip")

    y = lax.fori_loop(1, scale_EMG.shape[2], lambda group, y: y + of_group(group), of_group(0))
    return y.astype(x_RN.dtype)


def block_experts(
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
    order, counts = _sort_by_expert(ids_TK, experts)
    blocks_of_expert = -(-counts // block)
    last_block = jnp.cumsum(blocks_of_expert)
    expert_of_block = jnp.sum(jnp.arange(blocks)[:, None] >= last_block, axis=1)
    # Where each sorted row lies among the padded blocks: its expert's first block, then its rank in that expert.
    expert_of_row = jnp.where(_is_local(ids_TK, experts), ids_TK, experts).reshape(-1)[order]
    first_row = jnp.append(jnp.cumsum(counts) - counts, 0)[expert_of_row]
    first_block = jnp.append(last_block - blocks_of_expert, blocks)[expert_of_row]
    place = first_block * block + jnp.arange(rows) - first_row
    source = jnp.full(blocks * block, rows, jnp.int32).at[place].set(order.astype(jnp.int32), mode="drop")
    packed = x_TD.at[source // choices].get(mode="fill", fill_value=0).reshape(blocks, block, -1)
    expert_of_block = jnp.minimum(expert_of_block, experts - 1)
    precision = precision_of(x_TD.dtype)
    gate_up = weight_einsum("btd,bcfd->btcf", packed, gate_up_E2FD[expert_of_block], precision=precision)
    hidden = swiglu(gate_up[:, :, 0], gate_up[:, :, 1])
    outputs = weight_einsum("btf,bdf->btd", hidden, down_EDF[expert_of_block], precision=precision)
    place_of_choice = jnp.zeros(rows, jnp.int32).at[order].set(place.astype(jnp.int32))
    outputs = outputs.reshape(blocks * block, -1).at[place_of_choice].get(mode="fill", fill_value=0)
    return _combine(outputs, ids_TK, weights_TK, experts)


def _is_local(ids_TK: jax.Array, experts: int) -> jax.Array:
    return (ids_TK >= 0) & (ids_TK < experts)


def _sort_by_expert(ids_TK: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The stable order of all choices by expert (those elsewhere last), and the number of rows of each expert."""
    flat = jnp.where(_is_local(ids_TK, experts), ids_TK, experts).reshape(-1)
    counts = jnp.sum(flat[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    return sort_order(flat), counts


def sort_order(keys: jax.Array) -> jax.Array:
    """The stable order of keys [R], int32 [R].

    In a `shard_map` jax takes the order for the same on all devices, as the numbers are that it sorts along with the
    keys; a gradient would then go to the rows of another device's order. Adding nothing of the keys says otherwise.
    """
    return jnp.argsort(keys, stable=True).astype(jnp.int32) + jnp.zeros_like(keys, dtype=jnp.int32)


def _combine(outputs_RD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, experts: int) -> jax.Array:
    """Weighted sum of the choices of each token, in a fixed order: deterministic, unlike a scatter-add."""
    tokens, choices = ids_TK.shape
    weights = jnp.where(_is_local(ids_TK, experts), weights_TK, 0.0)
    outputs = outputs_RD.reshape(tokens, choices, -1).astype(jnp.float32)
    outputs = jnp.where(_is_local(ids_TK, experts)[:, :, None], outputs, 0.0)
    summed = jnp.einsum("tkd,tk->td", outputs, weights, precision=lax.Precision.HIGHEST)
    return summed.astype(outputs_RD.dtype)


IMPLEMENTATIONS: dict[str, Experts] = {
    "dense": dense_experts,
    "vectors": vector_experts,
    "blocks": block_experts,
    "ragged": ragged_experts,
    "switch": switch_experts,
    "single": single_experts,
}


def choose(platform: str, tokens: int, config: MoeConfig, embed_dim: int, *, held: int, fresh: bool = True) -> str:
    """The implementation for a platform (`cpu`, `gpu`, `tpu`), the tokens of a pass, the experts that a device holds.

    `fresh` is that of the pass: one that continues sequences has no backward pass. CPU and TPU forms are measured and
    compiled choices. Of a layer whose experts together fit a CPU's cache, a few choices go one after the other, and the
    prompts of a training step, which is to have a derivative, through all experts. On GPU a decode batch
    of as many choices as a device holds experts reads all of these once (`dense`), a smaller one those it chose, and
    neither copies any; many more rows go by blocks.
    """
    experts, rows = config.num_experts, tokens * config.num_experts_per_token
    if platform == "cpu":
        cached = 3 * experts * config.expert_width * embed_dim <= CACHED_PARAMETERS
        if cached and rows <= MAX_SINGLE_CHOICES:
            return "single"
        return "dense" if cached and fresh else "switch"
    if platform == "tpu":
        return "dense" if rows <= 4 * experts or tokens <= MAX_DENSE_TOKENS else "ragged"
    if rows < held:
        return "vectors"
    return "dense" if rows <= 8 * experts else "blocks"
