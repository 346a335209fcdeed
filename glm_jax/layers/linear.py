"""Projections by weights in Hugging Face's orientation [out, in], with the arithmetic said out loud.

Weights keep their heads apart ([N, H, D]); the product itself is of matrices, because a product with a weight of more
dimensions makes XLA's CPU backend transpose the weight at every call. On a TPU it is of the weight as it is: flattened,
one that is a slice of the stack of layers would be cut out as a copy first.

A float32 run is float32: TPUs would round the operands of a default-precision dot to bfloat16, and GPUs to TF32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.layers.quantized import merge_inputs, merge_outputs, weight_einsum
from glm_jax.layers.rows import MAX_COLUMNS, multiply_few_rows
from glm_jax.sharding import (
    QuantizedArray,
    TurnedArray,
    WeightArray,
    apart_axes,
    axes_of,
    einsum_reduce,
    local_call,
    local_calls,
    local_sum,
    multiply_apart,
    multiply_together,
    platform,
    reshape,
    spread_outputs,
)

_LABELS = "nhk"  # of the einsum, for the dimensions that a weight has beside those of matrices


def precision_of(dtype: Any) -> lax.Precision:
    """The precision of a dot over operands of `dtype`: full for float32, the hardware's own for anything smaller."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def few_rows(x: jax.Array) -> bool:
    """Whether x [B, T, ...] has so few rows on a CPU that a matrix multiplies them faster as its columns."""
    return platform() == "cpu" and x.dtype == jnp.float32 and 1 < x.shape[0] * x.shape[1] <= MAX_COLUMNS


def project(x: jax.Array, weight: WeightArray | TurnedArray) -> jax.Array:
    """x [B, T, D] by a weight [..., D], its first dimension split or its last one kept apart, or both: [B, T, ...]."""
    if isinstance(weight, TurnedArray):
        return project_each(x, [weight])[0]
    if apart := apart_axes(weight, weight.ndim - 1):
        return multiply_apart(project, x, weight, apart=apart, layout=_outputs(x, weight))
    if isinstance(weight, QuantizedArray) or few_rows(x):
        return local_call(_project_local, x, weight, layout=_outputs(x, weight))
    outputs, inputs = weight.shape[:-1], weight.shape[-1]
    if platform() == "tpu":
        labels = _LABELS[: len(outputs)]
        return jnp.einsum(f"btd,{labels}d->bt{labels}", x, weight, precision=precision_of(x.dtype))
    matrix = reshape(weight, (math.prod(outputs), inputs), layout=(0, len(outputs)))
    y = jnp.einsum("btd,od->bto", x, matrix, precision=precision_of(x.dtype))
    return reshape(y, (*x.shape[:2], *outputs), layout=(0, 1, 2, *(None for _ in outputs[1:])))


def project_each(x: jax.Array, weights: Sequence[WeightArray | TurnedArray]) -> list[jax.Array]:
    """As `project` by each of the weights; in one product where they were turned round together."""
    turned = [weight for weight in weights if isinstance(weight, TurnedArray)]
    if not turned:
        return [project(x, weight) for weight in weights]
    products = iter(local_calls(_project_turned, x, *turned, layouts=[_outputs(x, weight) for weight in turned]))
    return [next(products) if isinstance(weight, TurnedArray) else project(x, weight) for weight in weights]


def _outputs(x: jax.Array, weight: WeightArray | TurnedArray) -> list[tuple[Any, int]]:
    """Where the dimensions of a projection of x [B, T, D] come from."""
    values = weight.values if isinstance(weight, QuantizedArray) else weight
    return [(x, 0), (x, 1), *((values, dimension) for dimension in range(values.ndim - 1))]


def _project_turned(x: jax.Array, *weights: TurnedArray) -> tuple[jax.Array, ...]:
    """Projections by weights that are turned round, as they lie."""
    products = multiply_together(x.reshape(-1, x.shape[-1]), weights)
    return tuple(y.reshape(*x.shape[:2], *weight.shape[:-1]) for y, weight in zip(products, weights, strict=True))


def _project_local(x: jax.Array, weight: WeightArray) -> jax.Array:
    """A projection by a quantised weight, or of a few rows on a CPU; of this device's own parts."""
    outputs = weight.shape[:-1]
    matrix = merge_outputs(weight, 0, len(outputs))
    if _is_rows(weight):
        y = multiply_few_rows(x.reshape(-1, x.shape[-1]), matrix).astype(x.dtype)
    else:
        y = weight_einsum("btd,od->bto", x, matrix, precision=precision_of(x.dtype))
    return y.reshape(*x.shape[:2], *outputs)


def project_pair(x: jax.Array, weight: WeightArray | TurnedArray) -> tuple[jax.Array, jax.Array]:
    """x [B, T, D] by the two matrices of one weight [2, F, D], in one product: two [B, T, F]."""
    if not isinstance(weight, TurnedArray) and (apart := apart_axes(weight, weight.ndim - 1)):
        both = multiply_apart(project, x, weight, apart=apart, layout=_outputs(x, weight))
    else:
        # Local, because both matrices are split alike: flattened as a whole, the rows would change devices.
        both = local_call(project, x, weight, layout=_outputs(x, weight))
    return both[:, :, 0], both[:, :, 1]


def project_reduce(x: jax.Array, weight: WeightArray | TurnedArray) -> jax.Array:
    """x [B, T, ...] by a weight [D, ...] whose inputs may be split over devices: [B, T, D], after an all-reduce."""
    if isinstance(weight, TurnedArray):
        return local_call(_reduce_turned, x, weight, layout=((x, 0), (x, 1), (weight, 0)))
    if apart := apart_axes(weight, 0):
        over = apart_axes(weight, 1)
        return spread_outputs(project_reduce, x, weight, apart=apart, over=over)
    if isinstance(weight, QuantizedArray) or few_rows(x):
        values = weight.values if isinstance(weight, QuantizedArray) else weight
        layout, over = ((x, 0), (x, 1), (values, 0)), axes_of(values, 1)
        return local_sum(_reduce_local, x, weight, layout=layout, over=over)
    if platform() == "tpu":
        labels = _LABELS[: weight.ndim - 1]
        return einsum_reduce(f"bt{labels},d{labels}->btd", x, weight, precision=precision_of(x.dtype))
    inputs = math.prod(weight.shape[1:])
    x = reshape(x, (*x.shape[:2], inputs), layout=(0, 1, 2))
    matrix = reshape(weight, (weight.shape[0], inputs), layout=(0, 1))
    return einsum_reduce("bti,di->btd", x, matrix, precision=precision_of(x.dtype))


def _reduce_turned(x: jax.Array, weight: TurnedArray) -> jax.Array:
    """As `_project_turned`, over all dimensions of x [B, T, ...] but the first two."""
    return weight.multiply(x.reshape(x.shape[0] * x.shape[1], -1)).reshape(*x.shape[:2], -1)


def _reduce_local(x: jax.Array, weight: WeightArray) -> jax.Array:
    """As `_project_local`, over all dimensions of x [B, T, ...] but the first two."""
    rows = x.reshape(*x.shape[:2], -1)
    if _is_rows(weight):
        y = multiply_few_rows(rows.reshape(-1, rows.shape[-1]), merge_inputs(weight)).astype(x.dtype)
        return y.reshape(*x.shape[:2], -1)
    return weight_einsum("bti,di->btd", rows, merge_inputs(weight), precision=precision_of(x.dtype))


def _is_rows(weight: WeightArray) -> bool:
    """Whether a product is one of rows by a matrix: on a CPU, and by bits, which are held nowhere else."""
    return platform() == "cpu" or (isinstance(weight, QuantizedArray) and weight.bits)
