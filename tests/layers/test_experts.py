"""The routed experts of one device: each form against a loop in numpy, and which form a GPU's decode step takes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import configs
from glm_jax.layers.experts import IMPLEMENTATIONS, choose

EXPERTS, WIDTH, SIZE, CHOICES = 5, 6, 8, 3


def by_loop(x, ids, weights, gate_up, down):
    out = np.zeros_like(x)
    for token, (chosen, shares) in enumerate(zip(ids, weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            if 0 <= expert < EXPERTS:
                gate, up = gate_up[expert] @ x[token]
                out[token] += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("tokens", [1, 2, 4, 7])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_experts_here_and_elsewhere(name, tokens):
    """Ids outside 0..E-1 are experts of other devices and add nothing."""
    rng = np.random.default_rng(tokens)
    ids = np.stack([rng.permutation(np.arange(-2, EXPERTS + 3))[:CHOICES] for _ in range(tokens)])
    x, weights = rng.normal(size=(tokens, SIZE)), rng.uniform(size=(tokens, CHOICES))
    gate_up, down = rng.normal(size=(EXPERTS, 2, WIDTH, SIZE)), rng.normal(size=(EXPERTS, SIZE, WIDTH))
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, weights, gate_up, down)]
    run = jax.jit(IMPLEMENTATIONS[name])
    ours = run(arrays[0], jnp.asarray(ids, jnp.int32), arrays[1], gate_up_E2FD=arrays[2], down_EDF=arrays[3])
    np.testing.assert_allclose(ours, by_loop(x, ids, weights, gate_up, down), atol=1e-4)


def test_a_gpu_reads_the_experts_chosen_or_all_of_them_once():
    moe = dataclasses.replace(configs.get("glm-4.5-air").moe, num_experts=128, num_experts_per_token=8)
    tokens = {1: "vectors", 15: "vectors", 16: "dense", 128: "dense", 129: "blocks"}
    assert {count: choose("gpu", count, moe, 4096, held=128) for count in tokens} == tokens
    assert choose("gpu", 1, moe, 4096, held=16) == "vectors"
    assert choose("gpu", 2, moe, 4096, held=16) == "dense"


def test_a_cpu_loops_over_small_experts_only_to_decode_one_token():
    """A loop has no backward pass, which one token alone may have, too."""
    moe = dataclasses.replace(configs.get("glm-4.5-air").moe, num_experts=8, num_experts_per_token=2, expert_width=64)
    tokens = {1: "single", 2: "single", 8: "single", 9: "dense", 500: "dense"}
    assert {count: choose("cpu", count, moe, 128, held=8) for count in tokens} == tokens
    assert choose("cpu", 1, moe, 128, held=8, fresh=False) == "switch"
    assert {choose("cpu", count, moe, 4096, held=8, fresh=fresh) for count in tokens for fresh in (True, False)} == {
        "switch"
    }
