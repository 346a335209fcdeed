"""Attention of sequences that are split over devices is attention of whole ones."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.kernels import attention
from glm_jax.layers.attention_core import attend
from glm_jax.layers.context import ForwardContext
from glm_jax.layers.rope import Rotation
from tests.kernels.test_attention import by_numpy
from tests.operations import CPU

BATCH, HEADS, LENGTH, WIDTH, VALUE = 2, 4, 24, 8, 6
# The mesh axes of the batch, of the queries, of the keys, of the heads of q, and of those of k and v
LAYOUTS = {
    "queries": (None, "expert", None, None, None),
    "keys": (None, None, "expert", "tensor", "tensor"),
    "keys over two axes": (None, None, ("data", "expert"), None, None),
    "both alike": (None, "expert", "expert", "tensor", "tensor"),
    "keys over more": ("data", "expert", ("expert", "tensor"), None, None),
    "queries over more": (None, ("data", "expert"), "expert", None, None),
}


@pytest.mark.parametrize("queries", [8, 20])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_sequences(mesh_of_sizes, monkeypatch, layout, kv_heads, queries):
    """Queries that continue sequences at different places; the longer ones by blocks."""
    batch, of_queries, of_keys, of_heads, of_kv_heads = LAYOUTS[layout]
    of_kv_heads = None if kv_heads == 1 else of_kv_heads
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    rng = np.random.default_rng(queries)
    q = rng.normal(size=(BATCH, queries, HEADS, WIDTH)).astype(np.float32)
    k, v = (rng.normal(size=(BATCH, kv_heads, LENGTH, n)).astype(np.float32) for n in (WIDTH, VALUE))
    query_positions = (np.array([[0], [LENGTH - queries]]) + np.arange(queries)).astype(np.int32)
    mesh = mesh_of_sizes((2, 2, 2))

    def placed(array: np.ndarray, *spec: object) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    with jax.set_mesh(mesh):
        keys = [placed(each, batch, of_kv_heads, of_keys) for each in (k, v)]
        ours = placed(q, batch, of_queries, of_heads)
        rotation = Rotation(ours, ours, interleaved=False)  # attention does not look at it
        context = ForwardContext(placed(query_positions, batch, of_queries), rotation, prefill=False, ops=CPU)
        out = jax.jit(attend)(ours, *keys, context)
    assert out.sharding.is_equivalent_to(ours.sharding, 4)
    np.testing.assert_allclose(out, by_numpy(q, k, v, query_positions), atol=1e-5)
