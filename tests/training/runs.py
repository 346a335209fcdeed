"""A tiny model's training run, for tests: a state, its step, and a few steps on one batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import configs
from glm_jax.model import Transformer
from glm_jax.training import Batch, OptimizerConfig, build_optimizer, build_step, create_state, place
from tests.operations import DENSE

TINY = dataclasses.replace(configs.get("tiny-glm"), num_layers=2)
OPTIMIZER = OptimizerConfig(muon_rate=0.01, adam_rate=3e-3, steps=20, warmup_steps=1)
REAL = np.arange(16) < np.array([16, 16, 16, 16, 12, 12, 9, 5])[:, None]
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)
BATCH = Batch(np.where(REAL, TOKENS, 0).astype(np.int32), REAL, REAL)


def build(mesh, rules=None, **changes):
    """A fresh state of the tiny model, with changes to its configuration, and the compiled step."""
    config = dataclasses.replace(TINY, **changes)
    model = Transformer.create(config, mesh=mesh, rules=rules, dtype=jnp.float32, stacked=True)
    optimizer = build_optimizer(model, OPTIMIZER)
    return create_state(model, optimizer), build_step(optimizer, bias_rate=0.01, ops=DENSE)


def train(mesh, step, state, *, batch=BATCH, steps=4):
    """The state after some steps on one batch, and the loss of each."""
    losses = []
    with jax.set_mesh(mesh):
        batch = place(batch, mesh, state.model.rules)
        for _ in range(steps):
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss.loss))
    return state, losses
