"""The routed experts of one device: each form against a loop in numpy, and which form a GPU's decode step takes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels import Load
from glm_jax.kernels.ops import gpu_experts, tpu_experts
from tests.operations import EXPERTS as IMPLEMENTATIONS

EXPERTS, WIDTH, SIZE, CHOICES = 5, 6, 8, 3


def by_loop(x, ids, weights, gate_up, down):
    out = np.zeros_like(x)
    for token, (chosen, shares) in enumerate(zip(ids, weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            if 0 <= expert < EXPERTS:
                gate, up = gate_up[expert] @ x[token]
                out[token] += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("tokens", [1, 4, 7, 64])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_experts_here_and_elsewhere(name, tokens):
    """Ids outside 0..E-1 are experts of other devices and add nothing."""
    rng = np.random.default_rng(tokens)
    ids = np.stack([rng.permutation(np.arange(-2, EXPERTS + 3))[:CHOICES] for _ in range(tokens)])
    x, weights = rng.normal(size=(tokens, SIZE)), rng.uniform(size=(tokens, CHOICES))
    gate_up, down = rng.normal(size=(EXPERTS, 2, WIDTH, SIZE)), rng.normal(size=(EXPERTS, SIZE, WIDTH))
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, weights, gate_up, down)]
    run = jax.jit(IMPLEMENTATIONS[name].function)
    ours = run(arrays[0], jnp.asarray(ids, jnp.int32), arrays[1], gate_up_E2FD=arrays[2], down_EDF=arrays[3])
    np.testing.assert_allclose(ours, by_loop(x, ids, weights, gate_up, down), atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "dense"])
def test_every_implementation_has_the_derivative_of_the_reference(tokens, name):
    rng = np.random.default_rng(tokens)
    ids = jnp.asarray(np.stack([rng.permutation(EXPERTS)[:CHOICES] for _ in range(tokens)]), jnp.int32)
    shapes = ((tokens, SIZE), (tokens, CHOICES), (EXPERTS, 2, WIDTH, SIZE), (EXPERTS, SIZE, WIDTH))
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def loss(x, weights, gate_up, down, *, name):
        y = IMPLEMENTATIONS[name](x, ids, weights, gate_up_E2FD=gate_up, down_EDF=down)
        return jnp.sum(jnp.square(y))

    gradients = [
        jax.jit(jax.grad(functools.partial(loss, name=name), argnums=range(4)))(*arrays) for name in (name, "dense")
    ]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_gpu_reads_the_experts_chosen_or_all_of_them_once():
    tokens = {1: "gemv", 15: "gemv", 16: "dense", 128: "dense", 129: "block_gmm"}
    assert {count: gpu_experts(Load(count, 8, 128, 128)).name for count in tokens} == tokens
    assert gpu_experts(Load(1, 8, 128, 16)).name == "gemv"
    assert gpu_experts(Load(2, 8, 128, 16)).name == "dense"


def test_a_tpu_runs_all_experts_on_a_decode_step():
    tokens = {1: "dense", 512: "dense", 513: "ragged"}
    assert {count: tpu_experts(Load(count, 8, 128, 16)).name for count in tokens} == tokens
