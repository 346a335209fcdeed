"""Operations that several tests use: the CPU's, with all experts on all tokens, which is the cheapest to compile."""

from __future__ import annotations

import dataclasses

from glm_jax.kernels import Operation, ops_for_platform, with_implementations
from glm_jax.kernels.ops import IMPLEMENTATIONS

CPU = ops_for_platform("cpu")
DENSE = with_implementations(CPU, experts="dense")
EXCHANGE = dataclasses.replace(DENSE, dispatch="all_to_all")
EXPERTS = {name: each for name, each in IMPLEMENTATIONS["experts"].items() if isinstance(each, Operation)}
MATMUL = {name: with_implementations(CPU, matmul=name) for name in IMPLEMENTATIONS["matmul"]}
