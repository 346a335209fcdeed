"""Projections by weights in Hugging Face's orientation [out, in], on any mesh.

`project` is the one place where a product with a weight meets its layout. The arithmetic is the `matmul` of the pass's
operations; what this file adds are FSDP, the sum over the devices that split the inputs, and the region in which a
local implementation runs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from glm_jax.kernels import Ops
from glm_jax.kernels.quantized import as_matrix
from glm_jax.sharding import WeightArray, axes_of, shard_local
from glm_jax.sharding.activation import layout_of
from glm_jax.sharding.fsdp import fsdp_axes, fsdp_matmul, fsdp_matmul_outputs


def project(x: jax.Array, weight: WeightArray, ops: Ops, *, row_parallel: bool = False, dtype: Any = None) -> jax.Array:
    """x [B, T, D] by a weight [*O, D]: [B, T, *O]; or, row parallel, x [B, T, *I] by a weight [D, *I]: [B, T, D].

    Args:
        x: activations, split over devices by batch and length; row parallel, also along I as the weight is.
        weight: column parallel, its outputs may be split over devices, and so are then the results. Row parallel, its
            inputs may be, and the partial results are summed (all-reduce). Along D it may be split by FSDP.
        ops: the operations of the pass.
        row_parallel: which of the two.
        dtype: of the result, by default that of x.
    """
    inputs = weight.ndim - 1 if row_parallel else 1
    outputs = weight.ndim - inputs
    layout = [(x, 0), (x, 1), *((weight, dimension) for dimension in range(outputs))]
    over = axes_of(weight, 1) if row_parallel else ()
    if fsdp := fsdp_axes(weight, 0 if row_parallel else outputs):
        local = functools.partial(project, ops=ops, row_parallel=row_parallel, dtype=dtype)
        if row_parallel:
            return fsdp_matmul_outputs(local, x, weight, fsdp=fsdp, over=over)
        return fsdp_matmul(local, x, weight, fsdp=fsdp, layout=layout)
    if ops.matmul.is_local_for(weight):

        def local_product(x: jax.Array, weight: WeightArray) -> jax.Array:
            matrix, rows = as_matrix(weight, contracting_dims=inputs), x.reshape(x.shape[0] * x.shape[1], -1)
            return ops.matmul(rows, matrix, dtype=dtype).reshape(*x.shape[:2], *weight.shape[:outputs])

        return shard_local(local_product, x, weight, layout=layout, over=over)
    out_sharding = None if jax.sharding.get_abstract_mesh().empty or not row_parallel else layout_of(layout)
    return ops.matmul(x, weight, contracting_dims=inputs, dtype=dtype, out_sharding=out_sharding)


def project_pair(x: jax.Array, weight: WeightArray, ops: Ops) -> tuple[jax.Array, jax.Array]:
    """x [B, T, D] by the two matrices of one weight [2, F, D], in one product: two [B, T, F]."""
    if fsdp_axes(weight, weight.ndim - 1):
        both = project(x, weight, ops)
    else:
        # Local, because both matrices are split alike: as one flat matrix its rows would change devices.
        layout = [(x, 0), (x, 1), (weight, 0), (weight, 1)]
        both = shard_local(functools.partial(project, ops=ops), x, weight, layout=layout)
    return both[:, :, 0], both[:, :, 1]
