"""The arithmetic of one device: one interface, a reference, and one file of implementations a platform.

ops        the interface: named implementations of each operation, chosen once a model from its mesh
reference  every operation in plain `jnp`, the specification
attention  attention by blocks of queries
grouped    rows sorted by expert, in blocks
quantized  products with quantised weights
storage    how weights are held
cpu gpu tpu, expert_loop   what XLA's backends do best
"""

from __future__ import annotations

from glm_jax.kernels.ops import (
    ByLoad,
    Load,
    Operation,
    Ops,
    check_ops,
    ops_for,
    ops_for_platform,
    with_implementations,
)
from glm_jax.kernels.precision import precision_of
from glm_jax.kernels.storage import Storage

__all__ = [
    "ByLoad",
    "Load",
    "Operation",
    "Ops",
    "Storage",
    "check_ops",
    "ops_for",
    "ops_for_platform",
    "precision_of",
    "with_implementations",
]
