"""What GPUs run: matrices flattened for their libraries, and a decode step that reads only the experts it chose."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from glm_jax.kernels import reference
from glm_jax.kernels.grouped import combine
from glm_jax.kernels.reference import swiglu
from glm_jax.sharding import WeightArray, as_array, reshape


def flat_matmul(
    x: jax.Array,
    w: WeightArray,
    *,
    contracting_dims: int = 1,
    dtype: Any = None,
    out_sharding: PartitionSpec | None = None,
) -> jax.Array:
    """`reference.matmul` with the weight flattened to a matrix.

    A product with a weight of more dimensions would make the compiler transpose the weight at every call.
    """
    if not isinstance(w, jax.Array):
        return reference.matmul(x, w, dtype=dtype)
    outputs, inputs = w.shape[: w.ndim - contracting_dims], w.shape[w.ndim - contracting_dims :]
    lead = x.shape[: x.ndim - contracting_dims]
    x = reshape(x, (*lead, math.prod(inputs)), layout=tuple(range(len(lead) + 1)))
    matrix = reshape(w, (math.prod(outputs), math.prod(inputs)), layout=(0, len(outputs)))
    flat = None if out_sharding is None else PartitionSpec(*tuple(out_sharding)[: len(lead) + 1])
    y = reference.matmul(x, matrix, dtype=dtype, out_sharding=flat)
    layout = (*range(len(lead) + 1), *(None for _ in outputs[1:]))
    return reshape(y, (*lead, *outputs), layout=layout)


def gemv_experts(
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
    return combine(_vector_product(hidden, down_EDF, ids_R), ids_TK, weights_TK, experts)


def _vector_product(x_RN: jax.Array, weight_EXN: WeightArray, ids_R: jax.Array) -> jax.Array:
    """Each row by the matrices of its expert, [R, ...]: the weight may have several output dimensions."""

    def of_rows(array: jax.Array) -> jax.Array:
        return array.at[ids_R].get(mode="promise_in_bounds")

    chosen_RXN = of_rows(weight_EXN) if isinstance(weight_EXN, jax.Array) else weight_EXN.map(of_rows)
    weight_RXN = as_array(chosen_RXN, jnp.float32).astype(jnp.float32)
    x = x_RN.astype(jnp.float32).reshape(x_RN.shape[0], *(1,) * (weight_RXN.ndim - 2), -1)
    return jnp.sum(x * weight_RXN, axis=-1).astype(x_RN.dtype)
