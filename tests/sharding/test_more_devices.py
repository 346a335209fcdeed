"""Every preset on 64 virtual devices: the model of one device, in values and gradients."""

from __future__ import annotations

import pytest

from tests import processes

PROGRAM = """
import dataclasses, functools, sys
import jax, jax.numpy as jnp, numpy as np
import glm_jax
from glm_jax import configs
from glm_jax.model.transformer import Transformer, forward
from glm_jax.sharding import rules_named
from glm_jax.training import Batch, language_model_loss, place
from glm_jax.training.step import values_by_name
from tests.operations import EXCHANGE

preset, sizes = sys.argv[1], [int(n) for n in sys.argv[2].split(",")]
base = configs.get("tiny-glm")
moe = dataclasses.replace(base.moe, num_experts=16)
attention = dataclasses.replace(base.attention, num_kv_heads=4)
config = dataclasses.replace(base, num_layers=2, moe=moe, attention=attention, initializer_range=0.2)
tokens = np.random.default_rng(0).integers(0, config.vocab_size, (16, 16)).astype(np.int32)
mask = np.ones(tokens.shape, bool)

def loss(model, batch):
    ops = EXCHANGE
    output = forward(model, batch.tokens, mtp=True, ops=ops, remat=True, keep_last=True)
    return language_model_loss(output, batch, mtp_weight=0.3).loss, output.logits

results = []
many = glm_jax.make_mesh(data=sizes[0], expert=sizes[1], tensor=sizes[2])
assert many.size == 64
for mesh, rules in ((glm_jax.make_mesh(), None), (many, rules_named(preset))):
    model = Transformer.create(config, mesh=mesh, rules=rules, dtype=jnp.float32, stacked=True)
    with jax.set_mesh(mesh):
        gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(model, place(Batch(tokens, mask, mask), mesh, rules))
    results.append((np.asarray(logits), {n: np.asarray(v) for n, v in values_by_name(gradient).items()}))
(logits, gradients), (ours, own) = results
assert np.abs(ours - logits).max() <= 1e-4 * logits.std()
for name, reference in gradients.items():
    assert np.abs(own[name] - reference).max() <= 1e-4 * max(reference.std(), 1e-3), name
print("equal")
"""
SIZES = {
    "serve_latency": "2,8,4",
    "serve_throughput": "4,8,2",
    "train": "4,16,1",
    "long_context": "4,8,2",
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", SIZES)
def test_sixty_four_devices(preset):
    flags = "--xla_force_host_platform_device_count=64 --xla_backend_optimization_level=0"
    assert processes.said(PROGRAM, preset, SIZES[preset], XLA_FLAGS=flags) == "equal\n"
