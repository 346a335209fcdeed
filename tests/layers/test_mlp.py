"""The gated MLP, the embedding and the mixture around the experts against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import configs
from glm_jax.configs import MoeConfig
from glm_jax.layers.context import ForwardContext
from glm_jax.layers.embedding import Embedding
from glm_jax.layers.mlp import Mlp
from glm_jax.layers.moe import Moe
from glm_jax.layers.rope import Rotation
from glm_jax.sharding import PackedBfloat16, map_weights
from tests.operations import CPU, DENSE, MATMUL

SIZE, WIDTH = 16, 12


def filled(module, seed: int = 0):
    """The module with random float32 weights."""
    rng = np.random.default_rng(seed)
    return map_weights(lambda _, w: jnp.asarray(rng.normal(0, 0.3, w.get_raw_value().shape), jnp.float32), module)


def swiglu(x, gate, up, down):
    gated = x @ gate.T
    return (gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("name", MATMUL)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)], ids=str)
def test_mlp(name, shape):
    mlp = filled(Mlp(SIZE, WIDTH, initializer_range=0.02))
    x = np.random.default_rng(1).normal(size=(*shape, SIZE)).astype(np.float32)
    (gate, up), down = np.asarray(mlp.gate_up[...]), np.asarray(mlp.down[...])
    np.testing.assert_allclose(mlp(jnp.asarray(x), MATMUL[name]), swiglu(x, gate, up, down), atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_embedding(packed):
    table = np.random.default_rng(0).normal(size=(32, SIZE)).astype(jnp.bfloat16)
    embedding = Embedding(configs.get("tiny-glm"))
    value = PackedBfloat16(jnp.asarray(table.view(np.uint16))) if packed else jnp.asarray(table, jnp.float32)
    embedding.weight.set_raw_value(value)
    tokens = np.array([[0, 31, 7], [7, 7, 1]], np.int32)
    np.testing.assert_array_equal(jax.jit(embedding.__call__)(tokens), table.astype(np.float32)[tokens])


@pytest.mark.parametrize("ops", [CPU, DENSE], ids=["expert_loop", "dense"])
@pytest.mark.parametrize("shared", [0, 2])
def test_moe_is_the_weighted_choice_and_the_shared_experts(ops, shared):
    config = MoeConfig(
        num_experts=6,
        num_experts_per_token=2,
        expert_width=WIDTH,
        num_shared_experts=shared,
        num_groups=1,
        num_groups_per_token=1,
        normalize_weights=True,
        routed_scaling=1.5,
    )
    moe = filled(Moe(config, SIZE, initializer_range=0.02))
    x = np.random.default_rng(2).normal(size=(2, 3, SIZE)).astype(np.float32)
    rotation = Rotation(jnp.zeros((2, 3, 1)), jnp.zeros((2, 3, 1)), interleaved=False)
    context = ForwardContext(jnp.zeros((2, 3), jnp.int32), rotation, prefill=True, ops=ops)
    out, ids = moe(jnp.asarray(x), context)
    routing = moe.router(jnp.asarray(x), ops)
    np.testing.assert_array_equal(ids, routing.ids)
    gate_up, down = np.asarray(moe.experts.gate_up[...]), np.asarray(moe.experts.down[...])
    expected = np.zeros_like(x)
    for place in np.ndindex(2, 3):
        for expert, weight in zip(np.asarray(ids)[place], np.asarray(routing.weights)[place], strict=True):
            expected[place] += weight * swiglu(x[place], *gate_up[expert], down[expert])
        if moe.shared is not None:
            (gate, up), last = np.asarray(moe.shared.gate_up[...]), np.asarray(moe.shared.down[...])
            expected[place] += swiglu(x[place], gate, up, last)
    assert (moe.shared is None) == (shared == 0)
    np.testing.assert_allclose(out, expected, atol=1e-5)
