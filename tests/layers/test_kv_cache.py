"""The caches: writes at each sequence's own positions, of one layer and of a stacked group, whole and split."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.layers.kv_cache import KvCache, LatentCache

BATCH, HEADS, LENGTH, WIDTH, LAYERS = 2, 2, 8, 4, 3
POSITIONS = np.array([[0, 1, 2], [5, 6, 9]], np.int32)  # the last one lies beyond the cache


def expected(old: np.ndarray, new: np.ndarray, positions: np.ndarray = POSITIONS) -> np.ndarray:
    """old [B, K, S, H] with new [B, T, K, H] at the positions that it has."""
    result = old.copy()
    for b, t in np.ndindex(positions.shape):
        if positions[b, t] < old.shape[2]:
            result[b, :, positions[b, t]] = new[b, t]
    return result


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_keys_and_values(layer):
    lead = () if layer is None else (LAYERS,)
    old = [random(*lead, BATCH, HEADS, LENGTH, WIDTH, seed=seed) for seed in (1, 2)]
    k, v = (random(BATCH, 3, HEADS, WIDTH, seed=seed) for seed in (3, 4))
    index = None if layer is None else jnp.int32(layer)
    cache = jax.jit(KvCache.write)(KvCache(*map(jnp.asarray, old)), k, v, POSITIONS, index)
    assert cache.length == LENGTH
    for before, new, after, read in zip(old, (k, v), (cache.k, cache.v), cache.read(index), strict=True):
        one = before if layer is None else before[layer]
        np.testing.assert_array_equal(read, expected(one, new))
        others = [i for i in range(LAYERS) if i != layer] if lead else []
        np.testing.assert_array_equal(np.asarray(after)[others], before[others])


@pytest.mark.parametrize("width", [WIDTH, 6])
def test_latent_vectors(width):
    """A cache that is wider than the vectors holds zeros beside them."""
    old, new = np.zeros((BATCH, 1, LENGTH, width), np.float32), random(BATCH, 3, WIDTH)
    cache = jax.jit(LatentCache.write)(LatentCache(jnp.asarray(old)), new, POSITIONS, None)
    wide = np.pad(new, [(0, 0), (0, 0), (0, width - WIDTH)])[:, :, None]
    np.testing.assert_array_equal(cache.read(None), expected(old, wide)[:, 0])


@pytest.mark.parametrize("spec", [("data", "tensor"), (None, None, "expert"), ("data", None, ("expert", "tensor"))])
def test_each_device_writes_the_positions_that_it_has(mesh_of_sizes, spec):
    mesh = mesh_of_sizes((2, 2, 2))
    old, new = random(BATCH, HEADS, LENGTH, WIDTH, seed=1), random(BATCH, 3, HEADS, WIDTH, seed=2)
    batch, heads = spec[0], spec[1]

    def placed(array, *entries):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*entries)))

    with jax.set_mesh(mesh):
        cache = KvCache(placed(old, *spec), placed(old, *spec))
        k = placed(new, batch, None, heads)
        cache = jax.jit(KvCache.write)(cache, k, k, placed(POSITIONS, batch), None)
    assert cache.k.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), 4)
    np.testing.assert_array_equal(cache.k, expected(old, new))
    np.testing.assert_array_equal(cache.v, expected(old, new))


def test_one_token_of_one_sequence():
    """The scatter of a single token, which is written twice so that XLA updates in place."""
    old, new, at = random(1, HEADS, LENGTH, WIDTH), random(1, 1, HEADS, WIDTH, seed=1), np.array([[3]], np.int32)
    cache = KvCache(jnp.asarray(old), jnp.asarray(old)).write(new, new, at, None)
    np.testing.assert_array_equal(cache.k, expected(old, new, at))
