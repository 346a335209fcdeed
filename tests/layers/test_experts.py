"""The routed experts of one device: each form against a loop in numpy, and which form a GPU's decode step takes."""

from __future__ import annotations

import dataclasses
import functools

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


@pytest.mark.parametrize("tokens", [1, 6])
def test_small_experts_one_by_one_have_the_derivative_of_all_at_once(tokens):
    rng = np.random.default_rng(tokens)
    ids = jnp.asarray(np.stack([rng.permutation(EXPERTS)[:CHOICES] for _ in range(tokens)]), jnp.int32)
    shapes = ((tokens, SIZE), (tokens, CHOICES), (EXPERTS, 2, WIDTH, SIZE), (EXPERTS, SIZE, WIDTH))
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def loss(x, weights, gate_up, down, *, name):
        y = IMPLEMENTATIONS[name](x, ids, weights, gate_up_E2FD=gate_up, down_EDF=down)
        return jnp.sum(jnp.square(y))

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, name=name), argnums=range(4)))(*arrays) for name in ("single", "dense")
    ]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_gpu_reads_the_experts_chosen_or_all_of_them_once():
    moe = dataclasses.replace(configs.get("glm-4.5-air").moe, num_experts=128, num_experts_per_token=8)
    tokens = {1: "vectors", 15: "vectors", 16: "dense", 128: "dense", 129: "blocks"}
    assert {count: choose("gpu", count, moe, 4096, held=128) for count in tokens} == tokens
    assert choose("gpu", 1, moe, 4096, held=16) == "vectors"
    assert choose("gpu", 2, moe, 4096, held=16) == "dense"


def test_a_cpu_takes_a_few_small_experts_one_by_one_and_has_a_derivative_of_many():
    moe = dataclasses.replace(configs.get("glm-4.5-air").moe, num_experts=8, num_experts_per_token=2, expert_width=64)
    tokens = {1: "single", 2: "single", 32: "single", 33: "dense", 500: "dense"}
    assert {count: choose("cpu", count, moe, 128, held=8) for count in tokens} == tokens
    decoding = {count: "switch" if name == "dense" else name for count, name in tokens.items()}
    assert {count: choose("cpu", count, moe, 128, held=8, fresh=False) for count in tokens} == decoding
    assert {choose("cpu", count, moe, 4096, held=8, fresh=fresh) for count in tokens for fresh in (True, False)} == {
        "switch"
    }
