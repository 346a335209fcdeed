"""How a platform holds the weights of a model: asked where a model is created or loaded, and nowhere else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from glm_jax.sharding import PackedBfloat16, map_weights, with_dtype


@dataclasses.dataclass(frozen=True)
class Storage:
    """How weights are held.

    Attributes:
        name: of the storage, as `glm-jax doctor` reports it.
        default_dtype: of activations and weights where a run names none.
        packs_bfloat16: bfloat16 matrices are held as bits beside float32 activations (`PackedBfloat16`).
        bytes_for_small: quantised values of less than common dtypes are held in whole bytes: float8_e4m3fn as its bits
            in uint8, int4 as int8.
        latent_multiple: the latent vectors of a cache are padded with zeros to a multiple of so many values.
    """

    name: str = "array"
    default_dtype: str = "bfloat16"
    packs_bfloat16: bool = False
    bytes_for_small: bool = False
    latent_multiple: int = 1

    def prepare(self, model: Any, dtype: Any = None) -> Any:
        """The abstract `model` with every weight as a run of `dtype` holds it; pinned dtypes stay."""
        dtype = jnp.dtype(self.default_dtype if dtype is None else dtype)
        if not (self.packs_bfloat16 and dtype == jnp.bfloat16):
            return with_dtype(model, dtype)

        def pack(_: str, weight: Any) -> Any:
            value = weight.get_raw_value()
            if weight.pinned:
                return value
            if not weight.packable:
                return jax.ShapeDtypeStruct(value.shape, jnp.float32)
            return PackedBfloat16(jax.ShapeDtypeStruct(value.shape, jnp.uint16))

        return map_weights(pack, model)

    def quantized_dtype(self, dtype: Any) -> np.dtype:
        """The dtype in which quantised values of `dtype` are held."""
        held = {np.dtype(ml_dtypes.float8_e4m3fn): np.dtype(np.uint8), np.dtype(ml_dtypes.int4): np.dtype(np.int8)}
        dtype = np.dtype(dtype)
        return held.get(dtype, dtype) if self.bytes_for_small else dtype


ARRAY = Storage()
# XLA's CPU backend turns an array of small floats that is sliced or looked up into float32, all of it, at every call;
# its int4 arrays are no faster than bytes.
PACKED = Storage("packed_bfloat16", default_dtype="float32", packs_bfloat16=True, bytes_for_small=True)
# A TPU stores an array whose last dimension is no multiple of 128 lanes with its dimensions in another order, and each
# step would transpose the whole cache and transpose it back. The padding takes no more memory than that layout does.
LANES = Storage("lanes", latent_multiple=128)
