"""Grouped-query attention: a prefill equals steps through the cache, and one query equals its place among all."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import configs
from glm_jax.layers.attention_gqa import GqaAttention
from glm_jax.layers.context import ForwardContext
from glm_jax.layers.rope import rotation
from glm_jax.sharding import map_weights
from tests.operations import CPU

CONFIG, SIZE, LENGTH = configs.get("tiny-glm").attention, 64, 6


def attention(**changes) -> GqaAttention:
    """With random weights."""
    config = dataclasses.replace(CONFIG, **changes)
    module, rng = GqaAttention(config, SIZE, norm_eps=1e-5, initializer_range=0.02), np.random.default_rng(0)
    return map_weights(lambda _, w: jnp.asarray(rng.normal(0, 0.1, w.get_raw_value().shape), jnp.float32), module)


def context(positions: np.ndarray, *, prefill: bool) -> ForwardContext:
    at = jnp.asarray(positions, jnp.int32)
    return ForwardContext(at, rotation(at, CONFIG.rope), prefill=prefill, ops=CPU)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": not CONFIG.qkv_bias}, {"qk_norm": not CONFIG.qk_norm}], ids=str)
def test_a_prefill_is_the_steps_through_the_cache(changes):
    module = attention(**changes)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, LENGTH, SIZE)), jnp.float32)
    positions = np.tile(np.arange(LENGTH), (2, 1))
    empty = module.empty_cache(lambda shape, _: jnp.zeros(shape), batch=2, length=LENGTH)
    whole, cache = module(x, context(positions, prefill=True), empty, None)
    stepped, step_cache = [], empty
    for t in range(LENGTH):
        one = slice(t, t + 1)
        out, step_cache = module(x[:, one], context(positions[:, one], prefill=False), step_cache, None)
        stepped.append(out)
    np.testing.assert_allclose(jnp.concatenate(stepped, axis=1), whole, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(step_cache), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_one_query_is_that_of_its_place():
    module, index = attention(), jnp.asarray([4, 1])
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, LENGTH, SIZE)), jnp.float32)
    at = context(np.tile(np.arange(LENGTH), (2, 1)), prefill=True)
    empty = module.empty_cache(lambda shape, _: jnp.zeros(shape), batch=2, length=LENGTH)
    whole, cache = module(x, at, empty, None)
    one, cache_too = module(x, dataclasses.replace(at, prefill=False), empty, None, query_index=index)
    np.testing.assert_allclose(one[:, 0], np.asarray(whole)[[0, 1], [4, 1]], atol=1e-5)
    np.testing.assert_allclose(cache_too.k, cache.k, atol=1e-6)


def test_what_comes_later_changes_nothing_before():
    module = attention()
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, LENGTH, SIZE)), jnp.float32)
    at = context(np.arange(LENGTH)[None], prefill=True)
    before, _ = module(x, at, None, None)
    after, _ = module(x.at[:, 3:].set(7.0), at, None, None)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(np.asarray(before - after)[:, 3:]).max() > 1e-3
