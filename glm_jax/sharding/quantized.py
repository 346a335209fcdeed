"""A weight stored in fewer bits: values and scales, one leaf of the model each, which no product turns into one.

The dtypes are int8, float8_e4m3fn and int4; the scales are float32, one for each output (`per channel`) or one for each
output and group of consecutive inputs (`grouped`: int4, and the blocks of published FP8 checkpoints).

A CPU holds two of them as bits, for XLA's CPU backend turns an array of small floats that is sliced or looked up into
float32, all of it, at every call: float8_e4m3fn as uint8, and bfloat16, which has no scales, as uint16. Its int4 arrays
are no faster, and are int8 there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["inputs"])
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """The matrix `values * scale`, [*outputs, *inputs].

    Attributes:
        values: [*outputs, *inputs] in the narrow dtype; uint8 are the bits of float8_e4m3fn numbers.
        scale: float32 [*outputs], or [*outputs, groups] with each group the same number of inputs, counted over all
            input dimensions as one; None of uint16 values, the bits of bfloat16 numbers.
        inputs: how many trailing dimensions of the values are inputs, those that a product sums over.
    """

    values: Any
    scale: Any
    inputs: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """Dimensions of the matrix."""
        return len(self.values.shape)

    @property
    def dtype(self) -> Any:
        """The narrow dtype; of bits, that of the activations beside them."""
        return jnp.dtype(jnp.float32) if self.bits else self.values.dtype

    @property
    def bits(self) -> bool:
        """Whether the values are the bits of bfloat16 numbers."""
        return self.scale is None

    @property
    def sharding(self) -> Any:
        """The layout of the values; the scales' follows from it."""
        return self.values.sharding

    @property
    def size(self) -> int:
        """Values of the matrix."""
        return math.prod(self.shape)

    @property
    def grouped(self) -> bool:
        """Whether a scale belongs to a group of inputs rather than to all of them."""
        return self.scale is not None and len(self.scale.shape) > self.ndim - self.inputs

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        inputs = math.prod(self.shape[self.ndim - self.inputs :])
        return inputs // self.scale.shape[-1] if self.grouped else inputs

    def __getitem__(self, index: Any) -> QuantizedArray:
        """Part of the outputs, by the first dimension; `...` is all."""
        return self if index is Ellipsis else self.map(lambda array: array[index])

    def map(self, function: Callable[[Any], Any], of_scale: Callable[[Any], Any] | None = None) -> QuantizedArray:
        """The weight with a function applied to its values, and it or another to its scales if there are any."""
        scale = None if self.scale is None else (of_scale or function)(self.scale)
        return QuantizedArray(function(self.values), scale, self.inputs)

    def as_bfloat16(self) -> jax.Array:
        """The bfloat16 numbers that bits are, without work."""
        return jax.lax.bitcast_convert_type(self.values, jnp.bfloat16)

    @staticmethod
    def numbers(values: jax.Array, dtype: Any) -> jax.Array:
        """Values, or a part of them, as the numbers that they are before scaling."""
        if values.dtype == jnp.uint8:
            return _of_float8_bits(values).astype(dtype)
        if values.dtype == jnp.uint16:
            # By shifting: a conversion from bfloat16 would not be fused into the product that reads it.
            return jax.lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)
        return values.astype(dtype)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The matrix itself in `dtype`, multiplied in float32; for references and for one expert at a time."""
        if self.bits:
            return self.numbers(self.values, dtype)
        outputs = self.shape[: self.ndim - self.inputs]
        groups = self.scale.shape[-1] if self.grouped else 1
        values = self.numbers(self.values, jnp.float32).reshape(*outputs, groups, self.group_size)
        scale = self.scale.reshape(*outputs, groups, 1)
        return (values * scale).astype(dtype).reshape(self.shape)


def _of_float8_bits(bits: jax.Array) -> jax.Array:
    """The float32 numbers of float8_e4m3fn bits (bias 7, no infinities), by way of float16 (bias 15) of 1/256 the size.

    Exact, the subnormal ones too, which float32 arithmetic on a CPU would take for zeros.
    """
    wide = bits.astype(jnp.uint16)
    magnitude = wide & 0x7F
    not_a_number = jnp.uint16(0x7E00)
    half = ((wide & 0x80) << 8) | jnp.where(magnitude == 0x7F, not_a_number, magnitude << 7)
    return jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256.0


WeightArray = jax.Array | QuantizedArray
