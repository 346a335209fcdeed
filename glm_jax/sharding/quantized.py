"""Weights that are held otherwise than as one array of numbers: quantised, or bfloat16 packed as bits.

Each is one leaf of the model with the interface of an array as far as declarations and layouts need it, and no product
turns it into an array first unless it says so (`dequantize`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.sharding.shown import short_repr


class _Stored:
    """What a stored weight has in common with an array; `values` lies as the weight does."""

    values: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """Dimensions of the weight."""
        return len(self.values.shape)

    @property
    def sharding(self) -> Any:
        """The layout of the values; that of the scales follows from it."""
        return self.values.sharding

    @property
    def size(self) -> int:
        """Values of the weight."""
        return math.prod(self.shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["contracting_dims"])
@dataclasses.dataclass(frozen=True)
class QuantizedArray(_Stored):
    """The matrix `values * scale`, [*outputs, *inputs].

    The dtypes are int8, float8_e4m3fn and int4; a platform may hold the last two in whole bytes (`kernels.storage`).

    Attributes:
        values: [*outputs, *inputs] in the narrow dtype; uint8 are the bits of float8_e4m3fn numbers.
        scale: float32 [*outputs], or [*outputs, groups] with each group the same number of inputs, counted over all
            input dimensions as one.
        contracting_dims: how many trailing dimensions of the values are inputs, those that a product sums over.
    """

    values: Any
    scale: Any
    contracting_dims: int = 1

    __repr__ = short_repr

    @property
    def dtype(self) -> Any:
        """The narrow dtype."""
        return self.values.dtype

    @property
    def grouped(self) -> bool:
        """Whether a scale belongs to a group of inputs rather than to all of them."""
        return len(self.scale.shape) > self.ndim - self.contracting_dims

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        inputs = math.prod(self.shape[self.ndim - self.contracting_dims :])
        return inputs // self.scale.shape[-1] if self.grouped else inputs

    def __getitem__(self, index: Any) -> QuantizedArray:
        """Part of the outputs, by the first dimension; `...` is all."""
        return self if index is Ellipsis else self.map(lambda array: array[index])

    def map(self, function: Callable[[Any], Any], of_scale: Callable[[Any], Any] | None = None) -> QuantizedArray:
        """The weight with a function applied to its values, and it or another to its scales."""
        return QuantizedArray(function(self.values), (of_scale or function)(self.scale), self.contracting_dims)

    @staticmethod
    def numbers(values: jax.Array, dtype: Any) -> jax.Array:
        """Values, or a part of them, as the numbers that they are before scaling."""
        return (_of_float8_bits(values) if values.dtype == jnp.uint8 else values).astype(dtype)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The matrix itself in `dtype`, multiplied in float32; for references and for one expert at a time."""
        outputs = self.shape[: self.ndim - self.contracting_dims]
        groups = self.scale.shape[-1] if self.grouped else 1
        values = self.numbers(self.values, jnp.float32).reshape(*outputs, groups, self.group_size)
        scale = self.scale.reshape(*outputs, groups, 1)
        return (values * scale).astype(dtype).reshape(self.shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PackedBfloat16(_Stored):
    """A bfloat16 weight as the bits of its numbers, uint16, beside float32 activations.

    XLA's CPU backend turns a bfloat16 array that is sliced or looked up into float32, all of it, at every call. It
    leaves integers as they are.
    """

    values: Any

    @property
    def dtype(self) -> Any:
        """The dtype of the activations beside it, which a product with it has."""
        return jnp.dtype(jnp.float32)

    def __getitem__(self, index: Any) -> PackedBfloat16:
        """Part of the weight; `...` is all."""
        return self if index is Ellipsis else self.map(lambda array: array[index])

    def map(self, function: Callable[[Any], Any]) -> PackedBfloat16:
        """The weight with a function applied to its bits."""
        return PackedBfloat16(function(self.values))

    def as_bfloat16(self) -> jax.Array:
        """The numbers in bfloat16, without work."""
        return jax.lax.bitcast_convert_type(self.values, jnp.bfloat16)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The numbers in `dtype`, exactly."""
        # By shifting: XLA does not fuse a conversion from bfloat16 into the product that reads it.
        wide = jax.lax.bitcast_convert_type(self.values.astype(jnp.uint32) << 16, jnp.float32)
        return wide.astype(dtype)


WeightArray = jax.Array | QuantizedArray | PackedBfloat16


def values_of(weight: Any) -> Any:
    """The array that lies as the weight does: its values, or an array itself."""
    return weight.values if isinstance(weight, _Stored) else weight


def as_array(weight: WeightArray, dtype: Any) -> jax.Array:
    """The weight as one array: dequantised to `dtype`, or an array as it is."""
    return weight if isinstance(weight, jax.Array) else weight.dequantize(dtype)


def _of_float8_bits(bits: jax.Array) -> jax.Array:
    """The float32 numbers of float8_e4m3fn bits (bias 7, no infinities), by way of float16 (bias 15) of 1/256 the size.

    Exact, the subnormal ones too, which float32 arithmetic on a CPU would take for zeros.
    """
    wide = bits.astype(jnp.uint16)
    magnitude = wide & 0x7F
    not_a_number = jnp.uint16(0x7E00)
    half = ((wide & 0x80) << 8) | jnp.where(magnitude == 0x7F, not_a_number, magnitude << 7)
    return jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256.0
