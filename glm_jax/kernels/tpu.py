"""What TPUs run beside the reference: grouped products of experts by `lax.ragged_dot`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.kernels.grouped import combine, sort_by_expert, sort_order
from glm_jax.kernels.precision import precision_of
from glm_jax.kernels.quantized import merge_dims
from glm_jax.kernels.reference import swiglu
from glm_jax.sharding import QuantizedArray, WeightArray, as_array


def ragged_experts(
    x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, *, gate_up_E2FD: WeightArray, down_EDF: WeightArray
) -> jax.Array:
    """Rows sorted by expert, one grouped product over runs of unequal length."""
    experts, _, width, _ = gate_up_E2FD.shape
    order, counts = sort_by_expert(ids_TK, experts)
    rows = x_TD[order // ids_TK.shape[1]]
    gate_up = _ragged_product(rows, merge_dims(gate_up_E2FD, 1, 2), counts)
    hidden = swiglu(gate_up[:, :width], gate_up[:, width:])
    outputs = _ragged_product(hidden, down_EDF, counts)
    return combine(outputs[sort_order(order)], ids_TK, weights_TK, experts)


def _ragged_product(x_RN: jax.Array, weight_EMN: WeightArray, counts_E: jax.Array) -> jax.Array:
    """Runs of rows, `counts` long, each by its expert's matrix: [R, M]."""
    precision = precision_of(x_RN.dtype)
    if not isinstance(weight_EMN, QuantizedArray):
        matrices_ENM = as_array(weight_EMN, x_RN.dtype).swapaxes(1, 2)
        return lax.ragged_dot(x_RN, matrices_ENM, counts_E, precision=precision)
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
