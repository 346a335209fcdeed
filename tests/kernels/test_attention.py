"""Attention of grouped queries: the reference and the one by blocks against a loop in numpy, whole and over devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.kernels import attention
from glm_jax.kernels.ops import IMPLEMENTATIONS

BATCH, HEADS, WIDTH, VALUE = 2, 4, 8, 6
SCALE = WIDTH**-0.5


def by_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, query_positions: np.ndarray) -> np.ndarray:
    """The softmax of each query's own keys, one after the other."""
    result = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[1]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = query_positions[b, t] + 1
        scores = k[b, n // group, :seen] @ q[b, t, n] * q.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max())
        result[b, t, n] = weights / weights.sum() @ v[b, n // group, :seen]
    return result


@pytest.mark.parametrize("name", IMPLEMENTATIONS["attend"])
@pytest.mark.parametrize("length", [24, 64])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_queries_continue_sequences(name, kv_heads, queries, length):
    """Large scores among them, and queries that see one key or all."""
    rng = np.random.default_rng(queries)
    q = 40 * rng.normal(size=(3, queries, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(3, kv_heads, length, n)).astype(np.float32) for n in (WIDTH, VALUE))
    k[:, :, -1] = 1e4  # no query but the last one of the last sequence sees this key
    positions = (np.array([[0], [7], [length - queries]]) + np.arange(queries)).astype(np.int32)
    attend = jax.jit(IMPLEMENTATIONS["attend"][name].function, static_argnames="scale")
    out = attend(q, k, v, query_positions=positions, scale=SCALE)
    np.testing.assert_allclose(out, by_numpy(q, k, v, positions), atol=1e-4)


@pytest.mark.parametrize("queries", [1, 3, 4, 5, 6, 21, 32])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_a_prompt_in_parts(mesh_of_sizes, monkeypatch, sizes, queries):
    """Each part sees the keys up to its end; parts of all lengths, the longer ones by blocks."""
    monkeypatch.setattr(attention, "MIN_CAUSAL", 4)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)
    rng = np.random.default_rng(queries)
    q = rng.normal(size=(BATCH, queries, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(BATCH, 2, queries, n)).astype(np.float32) for n in (WIDTH, VALUE))
    positions = np.broadcast_to(np.arange(queries, dtype=np.int32), (BATCH, queries))
    mesh = mesh_of_sizes(sizes)
    with jax.set_mesh(mesh):
        specs = (
            PartitionSpec("data", None, "tensor"),
            PartitionSpec("data", "tensor"),
            PartitionSpec("data", "tensor"),
        )
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((q, k, v), specs, strict=True)]
        at = jax.device_put(positions, NamedSharding(mesh, PartitionSpec("data")))
        attend = jax.jit(attention.blockwise_attend, static_argnames=("scale", "prefill"))
        out = attend(*placed, query_positions=at, scale=SCALE, prefill=True)
    np.testing.assert_allclose(out, by_numpy(q, k, v, positions), atol=1e-5)


def test_the_backward_pass_is_handed_no_scores(monkeypatch):
    """It recomputes those of each block: what is kept of a prompt grows with its length, not with the square."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    length = 64
    rng = np.random.default_rng(0)
    q = rng.normal(size=(BATCH, length, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(BATCH, 2, length, n)).astype(np.float32) for n in (WIDTH, VALUE))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (BATCH, length))

    def attended(q, k, v):
        at = jax.numpy.asarray(positions)
        return attention.blockwise_attend(q, k, v, query_positions=at, scale=SCALE, prefill=True)

    kept = jax.tree.leaves(jax.eval_shape(lambda *inputs: jax.vjp(attended, *inputs)[1], q, k, v))
    assert max(leaf.size for leaf in kept) < BATCH * HEADS * length * length / 4
    weight = rng.normal(size=(BATCH, length, HEADS, VALUE)).astype(np.float32)
    loss = jax.jit(jax.grad(lambda *inputs: (attended(*inputs) * weight).sum(), argnums=(0, 1, 2)))
    by_blocks = loss(q, k, v)
    monkeypatch.setattr(attention, "QUERY_BLOCK", length)
    loss.clear_cache()
    for ours, at_once in zip(by_blocks, loss(q, k, v), strict=True):
        np.testing.assert_allclose(ours, at_once, atol=1e-5)
