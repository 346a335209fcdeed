"""Attention of sequences that are split over devices, or are taken in parts, is attention of whole ones."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.layers import attention_core
from glm_jax.layers.attention_core import attend

BATCH, HEADS, ROOM, WIDTH, VALUE = 2, 4, 24, 8, 6
# The mesh axes of the batch, of the queries, of the keys, of the heads of q, and of those of k and v
LAYOUTS = {
    "queries": (None, "expert", None, None, None),
    "keys": (None, None, "expert", "tensor", "tensor"),
    "keys over two axes": (None, None, ("data", "expert"), None, None),
    "both alike": (None, "expert", "expert", "tensor", "tensor"),
    "keys over more": ("data", "expert", ("expert", "tensor"), None, None),
    "queries over more": (None, ("data", "expert"), "expert", None, None),
}


def by_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, last_key: np.ndarray) -> np.ndarray:
    """The softmax of each query's own keys, one after the other."""
    result = np.zeros((*q.shape[:3], v.shape[-1]))
    group = q.shape[2] // k.shape[1]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = last_key[b, t] + 1
        scores = k[b, n // group, :seen] @ q[b, t, n] * q.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max())
        result[b, t, n] = weights / weights.sum() @ v[b, n // group, :seen]
    return result


@pytest.mark.parametrize("queries", [8, 20])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_sequences(mesh_of_sizes, monkeypatch, layout, kv_heads, queries):
    """Queries that continue sequences at different places; the longer ones by blocks."""
    batch, of_queries, of_keys, of_heads, of_kv_heads = LAYOUTS[layout]
    of_kv_heads = None if kv_heads == 1 else of_kv_heads
    monkeypatch.setattr(attention_core, "QUERY_BLOCK", 4)
    rng = np.random.default_rng(queries)
    q = rng.normal(size=(BATCH, queries, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(BATCH, kv_heads, ROOM, n)).astype(np.float32) for n in (WIDTH, VALUE))
    last_key = (np.array([[0], [ROOM - queries]]) + np.arange(queries)).astype(np.int32)
    mesh = mesh_of_sizes((2, 2, 2))

    def placed(array: np.ndarray, *spec: object) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    with jax.set_mesh(mesh):
        keys = [placed(each, batch, of_kv_heads, of_keys) for each in (k, v)]
        ours = placed(q, batch, of_queries, of_heads)
        out = jax.jit(lambda q, k, v, last: attend(q, k, v, last_key=last))(
            ours, *keys, placed(last_key, batch, of_queries)
        )
    assert out.sharding.is_equivalent_to(ours.sharding, 4)
    np.testing.assert_allclose(out, by_numpy(q, k, v, last_key), atol=1e-5)


@pytest.mark.parametrize("queries", [1, 3, 4, 5, 6, 21, 32])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_a_prompt_in_parts(mesh_of_sizes, monkeypatch, sizes, queries):
    """Each part sees the keys up to its end; parts of all lengths, the longer ones by blocks."""
    monkeypatch.setattr(attention_core, "MIN_CAUSAL", 4)
    monkeypatch.setattr(attention_core, "QUERY_BLOCK", 3)
    rng = np.random.default_rng(queries)
    q = rng.normal(size=(BATCH, queries, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(BATCH, 2, queries, n)).astype(np.float32) for n in (WIDTH, VALUE))
    last_key = np.broadcast_to(np.arange(queries, dtype=np.int32), (BATCH, queries))
    mesh = mesh_of_sizes(sizes)
    with jax.set_mesh(mesh):
        specs = (
            PartitionSpec("data", None, "tensor"),
            PartitionSpec("data", "tensor"),
            PartitionSpec("data", "tensor"),
        )
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((q, k, v), specs, strict=True)]
        at = jax.device_put(last_key, NamedSharding(mesh, PartitionSpec("data")))
        out = jax.jit(lambda q, k, v, last: attend(q, k, v, last_key=last, fresh=True))(*placed, at)
    np.testing.assert_allclose(out, by_numpy(q, k, v, last_key), atol=1e-5)


def test_the_backward_pass_is_handed_no_scores(monkeypatch):
    """It makes those of each block anew: what is kept of a prompt grows with its length, not with the square."""
    monkeypatch.setattr(attention_core, "QUERY_BLOCK", 8)
    length = 64
    rng = np.random.default_rng(0)
    q = rng.normal(size=(BATCH, length, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(BATCH, 2, length, n)).astype(np.float32) for n in (WIDTH, VALUE))
    last_key = np.broadcast_to(np.arange(length, dtype=np.int32), (BATCH, length))

    def attention(q, k, v):
        return attend(q, k, v, last_key=jax.numpy.asarray(last_key), fresh=True)

    kept = jax.tree.leaves(jax.eval_shape(lambda *inputs: jax.vjp(attention, *inputs)[1], q, k, v))
    assert max(leaf.size for leaf in kept) < BATCH * HEADS * length * length / 4
    weight = rng.normal(size=(BATCH, length, HEADS, VALUE)).astype(np.float32)
    loss = jax.jit(jax.grad(lambda *inputs: (attention(*inputs) * weight).sum(), argnums=(0, 1, 2)))
    by_blocks = loss(q, k, v)
    monkeypatch.setattr(attention_core, "QUERY_BLOCK", length)
    loss.clear_cache()
    for ours, at_once in zip(by_blocks, loss(q, k, v), strict=True):
        np.testing.assert_allclose(ours, at_once, atol=1e-5)


@pytest.mark.parametrize("room", [24, 64, 96])
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("splits", [True, False])
def test_few_queries_continue_sequences(kv_heads, queries, room, splits, monkeypatch):
    """Every form that a CPU has for them, large scores among them, and rows of which a query sees one or all."""
    monkeypatch.setattr(attention_core, "SPLITS_BATCHES", splits)
    monkeypatch.setattr(attention_core, "MIN_SPLIT", 2**11)
    rng = np.random.default_rng(queries)
    q = 40 * rng.normal(size=(3, queries, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(3, kv_heads, room, n)).astype(np.float32) for n in (WIDTH, VALUE))
    k[:, :, -1] = 1e4  # what no query but the last sequence's last one sees
    last_key = (np.array([[0], [7], [room - queries]]) + np.arange(queries)).astype(np.int32)
    out = jax.jit(lambda q, k, v, last: attend(q, k, v, last_key=last))(q, k, v, last_key)
    np.testing.assert_allclose(out, by_numpy(q, k, v, last_key), atol=1e-4)


@pytest.mark.parametrize(("queries", "kv_heads"), [(1, 4), (2, 2), (3, 1)])
@pytest.mark.parametrize("splits", [True, False])
def test_gradient_of_few_queries(queries, kv_heads, splits, monkeypatch):
    monkeypatch.setattr(attention_core, "SPLITS_BATCHES", splits)
    monkeypatch.setattr(attention_core, "MIN_SPLIT", 0)
    rng = np.random.default_rng(queries)
    q = rng.normal(size=(2, queries, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(2, kv_heads, 32, n)).astype(np.float32) for n in (WIDTH, VALUE))
    last_key = (np.array([[0], [9]]) + np.arange(queries)).astype(np.int32)

    def gradients() -> list[jax.Array]:
        def loss(*arrays: jax.Array) -> jax.Array:
            return (attend(*arrays, last_key=last_key) ** 2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    ours = gradients()
    monkeypatch.setattr(attention_core, "MAX_LANE_ROWS", 0)
    monkeypatch.setattr(attention_core, "MAX_KEYS_FIRST", 0)
    monkeypatch.setattr(attention_core, "SPLITS_BATCHES", False)
    for one, other in zip(ours, gradients(), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=1e-5)
