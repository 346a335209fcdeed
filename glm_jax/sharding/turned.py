"""A weight as [inputs, outputs] of one device, in parts: how a CPU multiplies a few rows by a small one fastest.

XLA's CPU backend multiplies rows by a matrix [in, out] as it lies; one that is [out, in] costs it nearly twice as much.
A large product it splits over its threads, which takes longer than a small one does itself: hence the parts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

MAX_PART = 2**16  # values of a part that XLA's CPU backend still multiplies by in one thread


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["shape", "inputs", "spec"])
@dataclasses.dataclass(frozen=True)
class TurnedArray:
    """A float32 weight of `shape` [outputs..., inputs...], turned round.

    Attributes:
        parts: matrices [inputs, some of the outputs], which side by side are all of them, and those of the weights that
            were turned round with it; none if another weight holds them.
        shape: of the weight itself.
        inputs: how many of its dimensions, the last ones, a product sums over.
        spec: the layout that the weight itself has on its mesh of one device; that of what is made with it follows.
    """

    parts: tuple[Any, ...]
    shape: tuple[int, ...]
    inputs: int
    spec: PartitionSpec

    @classmethod
    def together(cls, weights: Sequence[jax.Array], inputs: int) -> list[TurnedArray]:
        """Turn weights round that multiply the same rows: `multiply_together` takes one product for all of them.

        `inputs` is that of each. The first holds the parts of all, and without it the others cannot be multiplied by.
        """
        matrices = [np.asarray(w).reshape(-1, math.prod(w.shape[w.ndim - inputs :])).T for w in weights]
        matrix = np.concatenate(matrices, axis=1)
        counts = (n for n in range(1, matrix.shape[1] + 1) if matrix.shape[1] % n == 0)
        count = next((n for n in counts if matrix.size <= n * MAX_PART), matrix.shape[1])
        placed = [weight.sharding for weight in weights if isinstance(weight.sharding, NamedSharding)]
        assert len(placed) == len(weights), "the weights of a model lie on a mesh"
        whole = NamedSharding(placed[0].mesh, PartitionSpec())
        parts = (jax.device_put(np.ascontiguousarray(part), whole) for part in np.split(matrix, count, axis=1))
        held: list[tuple[Any, ...]] = [tuple(parts), *(() for _ in weights[1:])]
        return [cls(p, tuple(w.shape), inputs, at.spec) for p, w, at in zip(held, weights, placed, strict=True)]

    @property
    def ndim(self) -> int:
        """Dimensions of the weight."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> TurnedArray:
        """`...` is all of it, and nothing else can be had."""
        if index is not Ellipsis:
            raise IndexError(f"a weight turned round has no part {index!r}; right would be `...`")
        return self

    def multiply(self, x_RN: jax.Array) -> jax.Array:
        """Rows by the weight: float32 [R, outputs]."""
        return multiply_together(x_RN, [self])[0]


def multiply_together(x_RN: jax.Array, weights: Sequence[TurnedArray]) -> list[jax.Array]:
    """Rows by each of the weights, in one product where they were turned round together: float32 [R, outputs] each."""
    options = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    products = [jnp.matmul(x_RN, part, **options) for weight in weights for part in weight.parts]
    outputs = [math.prod(weight.shape[: weight.ndim - weight.inputs]) for weight in weights]
    assert sum(y.shape[1] for y in products) == sum(outputs), "weights turned round together multiply together"
    together = products[0] if len(products) == 1 else jnp.concatenate(products, axis=1)
    return jnp.split(together, list(itertools.accumulate(outputs))[:-1], axis=1)
