"""Both forms of latent attention are the same arithmetic, and each is chosen where it is less work."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import configs
from glm_jax.configs import MlaConfig, RopeConfig
from glm_jax.layers.attention_mla import MlaAttention
from glm_jax.layers.context import ForwardContext
from glm_jax.layers.rope import rotation
from glm_jax.sharding import QuantizedArray
from tests.operations import CPU

SMALL = MlaConfig(
    num_heads=4, q_rank=32, kv_rank=24, nope_dim=16, value_dim=12, rope=RopeConfig(theta=1e4, rotary_dim=8)
)
# One of the published shape's heads, with its latent sizes.
PUBLISHED = dataclasses.replace(configs.get("deepseek-v3").attention, num_heads=2)


@pytest.mark.parametrize("config", [SMALL, PUBLISHED], ids=["small", "published"])
@pytest.mark.parametrize("queries", [1, 2, 7])
def test_expanded_and_absorbed_agree(config, queries):
    rng = np.random.default_rng(queries)
    attention = MlaAttention(config, 64, initializer_range=0.02)
    shape = attention.kv_b.get_raw_value().shape
    attention.kv_b.set_raw_value(jnp.asarray(rng.normal(0, config.kv_rank**-0.5, shape), jnp.float32))
    q = jnp.asarray(rng.normal(size=(3, queries, config.num_heads, config.qk_dim)), jnp.float32)
    latent = jnp.asarray(rng.normal(size=(3, 20, config.latent_dim)), jnp.float32)
    context = _context(rng.integers(0, 20, (3, queries)))
    expanded, absorbed = (
        np.asarray(jax.jit(form)(q, latent, context)) for form in (attention._expanded, attention._absorbed)
    )
    assert expanded.shape == (3, queries, config.num_heads, config.value_dim)
    np.testing.assert_allclose(absorbed, expanded, atol=1e-4 * expanded.std(), rtol=0)


@pytest.mark.parametrize("groups", [None, 3])
def test_absorbed_over_quantised_weights(groups):
    """Narrow weights are not cut into the parts of keys and values, but multiplied whole: the results are the same."""
    rng = np.random.default_rng(0)
    attention = MlaAttention(SMALL, 64, initializer_range=0.02)
    shape = attention.kv_b.get_raw_value().shape
    values = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.001, 0.003, shape[:-1] if groups is None else (*shape[:-1], groups)), jnp.float32)
    narrow = QuantizedArray(values, scale)
    q = jnp.asarray(rng.normal(size=(3, 2, SMALL.num_heads, SMALL.qk_dim)), jnp.float32)
    latent, context = (
        jnp.asarray(rng.normal(size=(3, 20, SMALL.latent_dim)), jnp.float32),
        _context(rng.integers(0, 20, (3, 2))),
    )
    results = []
    for weight in (narrow, narrow.dequantize()):
        attention.kv_b.set_raw_value(weight)
        results.append(np.asarray(jax.jit(attention._absorbed)(q, latent, context)))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4 * results[1].std(), rtol=0)


def _context(query_positions: np.ndarray) -> ForwardContext:
    positions = jnp.asarray(query_positions, jnp.int32)
    return ForwardContext(positions, rotation(positions, SMALL.rope), prefill=False, ops=CPU)


def test_decode_absorbs_and_prompts_expand():
    """By the operations for each head and cached token: 640 a query and 512 x 256 once, against 2,176 a query."""
    attention = MlaAttention(PUBLISHED, 64, initializer_range=0.02)
    assert not attention._expanding_pays(1) and not attention._expanding_pays(8)
    assert attention._expanding_pays(512)
