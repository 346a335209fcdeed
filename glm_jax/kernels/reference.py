"""Every operation in plain `jnp`: the specification, and the oracle of all other implementations.

None of these functions knows a platform. In explicit mode jax derives the layout of a result from those of the
operands, so that all of them run on whole arrays as well as on one device's part.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from glm_jax.kernels.attention import masked_scores, weighted_values
from glm_jax.kernels.precision import precision_of
from glm_jax.kernels.quantized import scaled_einsum, scaled_matmul
from glm_jax.sharding import WeightArray


def matmul(
    x: jax.Array,
    w: WeightArray,
    *,
    contracting_dims: int = 1,
    dtype: Any = None,
    out_sharding: PartitionSpec | None = None,
) -> jax.Array:
    """Product of x [..., *I] with a weight w [*O, *I], which is [out, in] as Hugging Face has it: [..., *O].

    Args:
        x: activations.
        w: an array as it is stored: a TPU would cut a layer out of a stack as a copy to flatten it first. A weight in
            another storage is a matrix of one device's part, and scaled after the product.
        contracting_dims: how many trailing dimensions are the inputs I.
        dtype: of the result; by default that of x. The sum is float32 where the hardware has it.
        out_sharding: the layout of the result; needed where the inputs are split over devices, to say that the partial
            sums are added (all-reduce).
    """
    if not isinstance(w, jax.Array):
        return scaled_matmul(x, w, dtype=dtype)
    of_x, of_w = (tuple(range(a.ndim - contracting_dims, a.ndim)) for a in (x, w))
    return lax.dot_general(
        x,
        w,
        ((of_x, of_w), ((), ())),
        precision=precision_of(x.dtype),
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    )


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, query_positions: jax.Array, scale: float, prefill: bool = False
) -> jax.Array:
    """Softmax attention of q [B, T, N, H] over k [B, K, S, H] and v [B, K, S, I]: [B, T, N, I] in the dtype of q.

    Query t of sequence b sees the keys 0..query_positions[b, t]. N is a multiple of K: query head n reads kv head
    n // (N / K). Scores and softmax are float32. `prefill` says that the keys are those of the queries themselves,
    query_positions being 0..T-1; here it changes nothing.
    """
    del prefill
    scores = masked_scores(q, k, query_positions, scale=scale)
    return weighted_values(jax.nn.softmax(scores, axis=-1), v, dtype=q.dtype)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (arXiv 2002.05202)."""
    return jax.nn.silu(gate) * up


def dense_experts(
    x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, *, gate_up_E2FD: WeightArray, down_EDF: WeightArray
) -> jax.Array:
    """The routed experts of one device: y[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t]).

    All experts run on all tokens, and those that a token did not choose get weight 0. An id outside 0..E-1 is an expert
    of another device and adds nothing. The result has the dtype of x; the sum over choices is float32.
    """
    precision = precision_of(x_TD.dtype)
    chosen_TKE = ids_TK[:, :, None] == jnp.arange(down_EDF.shape[0])
    weights_TE = jnp.sum(jnp.where(chosen_TKE, weights_TK[:, :, None], 0.0), axis=1)
    # Tokens last, as the product makes them: a GPU would write any other order again, as an array of its own.
    gate_up = scaled_einsum("td,ecfd->ecft", x_TD, gate_up_E2FD, precision=precision)
    hidden = swiglu(gate_up[:, 0], gate_up[:, 1]).swapaxes(1, 2)
    outputs = scaled_einsum("etf,edf->etd", hidden, down_EDF, precision=precision)
    summed = jnp.einsum("etd,te->td", outputs.astype(jnp.float32), weights_TE, precision=lax.Precision.HIGHEST)
    return summed.astype(x_TD.dtype)


def top_k(scores: jax.Array, *, k: int) -> jax.Array:
    """The indices of the k highest of scores [..., E], int32 [..., k], the highest first, of equal ones the first."""
    return lax.top_k(scores, k)[1]


def argmax(scores: jax.Array) -> jax.Array:
    """The index of the first of the highest of scores [..., V], int32 [...]."""
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)
