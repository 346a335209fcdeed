"""The programs that generation and training run, compiled as for users, and what they send, read off their text."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from glm_jax.configs import ModelConfig
from glm_jax.planning import Job
from glm_jax.planning.compile import estimate
from glm_jax.planning.lower import lower_job
from glm_jax.sharding import Rules

# The tests' flags (tests/conftest.py) change which loops XLA fuses, and with them its temporaries. These programs are
# planned as for users; only LLVM's optimisations, which begin when all memory is planned, stay out.
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if jax.__version__.startswith("0.10.") else {}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\(")
ARRAY = re.compile(r"[a-z]\w*\[([0-9,]*)\]")


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """Every collective of a program: its kind and the elements of the largest array that it makes."""
    found = []
    for result, kind in COLLECTIVE.findall(compiled.as_text()):
        shapes = [[int(n) for n in dims.split(",") if n] for dims in ARRAY.findall(result)]
        found.append((kind, max(int(np.prod(shape)) for shape in shapes)))
    return found


def compiled_step(
    config: ModelConfig,
    mesh: Mesh,
    *,
    batch: int,
    length: int,
    kind: str = "decode",
    rules: Rules | None = None,
    stacked: bool | None = None,
) -> tuple[Any, int]:
    """One step of a job in float32: the program, and the bytes of the cache on each device."""
    job = Job(config=config, kind=kind, batch=batch, length=length, weights="float32", rules=rules or Rules())
    lowered = lower_job(job, mesh, stacked=stacked)
    return lowered.compile(compiler_options=AS_USERS), estimate(job, mesh).cache
