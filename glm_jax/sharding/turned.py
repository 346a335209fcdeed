"""A weight as [inputs, outputs] of one device, in parts: how a CPU multiplies a few rows by a small one fastest.

XLA's CPU backend multiplies rows by a matrix [in, out] as it lies; one that is [out, in] costs it nearly twice as much.
A large product it splits over its threads, which takes longer than a small one does itself: hence the parts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

MAX_PART = 2**16  # values of a part that XLA's CPU backend still multiplies by in one thread


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["shape", "spec"])
@dataclasses.dataclass(frozen=True)
class TurnedArray:
    """A float32 weight of `shape` [outputs..., inputs...], turned round.

    Attributes:
        parts: matrices [inputs, some of the outputs], which side by side are all of them.
        shape: of the weight itself.
        spec: the layout that the weight itself has on its mesh of one device; that of what is made with it follows.
    """

    parts: tuple[Any, ...]
    shape: tuple[int, ...]
    spec: PartitionSpec

    @classmethod
    def of(cls, weight: jax.Array, inputs: tuple[int, ...], *, outputs: tuple[int, ...] | None = None) -> TurnedArray:
        """Turn a weight on one device round.

        Args:
            weight: with values.
            inputs: the dimensions that its product sums over.
            outputs: the others, in the order that the product shall have them; by default their own.
        """
        if outputs is None:
            outputs = tuple(dimension for dimension in range(weight.ndim) if dimension not in inputs)
        rows = math.prod(weight.shape[dimension] for dimension in inputs)
        matrix = np.asarray(weight).transpose(*inputs, *outputs).reshape(rows, -1)
        counts = (n for n in range(1, matrix.shape[1] + 1) if matrix.shape[1] % n == 0)
        count = next((n for n in counts if matrix.size <= n * MAX_PART), matrix.shape[1])
        placed = weight.sharding
        assert isinstance(placed, NamedSharding), "the weights of a model lie on a mesh"
        whole = NamedSharding(placed.mesh, PartitionSpec())
        parts = (jax.device_put(np.ascontiguousarray(part), whole) for part in np.split(matrix, count, axis=1))
        return cls(tuple(parts), tuple(weight.shape), placed.spec)

    @property
    def ndim(self) -> int:
        """Dimensions of the weight."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """That of the parts."""
        return self.parts[0].dtype

    def __getitem__(self, index: Any) -> TurnedArray:
        """`...` is all of it, and nothing else can be had."""
        if index is not Ellipsis:
            raise IndexError(f"a weight turned round has no part {index!r}; right would be `...`")
        return self

    def multiply(self, x_RN: jax.Array) -> jax.Array:
        """Rows by the weight: float32 [R, outputs]."""
        options = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        products = [jnp.matmul(x_RN, part, **options) for part in self.parts]
        return products[0] if len(products) == 1 else jnp.concatenate(products, axis=1)
