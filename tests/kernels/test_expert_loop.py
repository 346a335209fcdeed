"""The CPU's experts against a plain loop over experts in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from glm_jax.kernels import expert_loop as loop_module
from glm_jax.kernels.cpu import count_strips
from glm_jax.kernels.expert_loop import expert_loop

run = jax.jit(expert_loop)
run_strips = jax.jit(lambda *args, **weights: expert_loop(*args, **weights))  # traced with strips for any size


def reference(x, ids, weights, gate_up, down):
    """Each expert on the rows that chose it, in float64."""
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    y = np.zeros_like(x)
    for expert in range(len(down)):
        tokens, choices = np.nonzero(np.asarray(ids) == expert)
        gate, up = x[tokens] @ gate_up[expert, 0].T, x[tokens] @ gate_up[expert, 1].T
        out = (gate / (1 + np.exp(-gate)) * up) @ down[expert].T
        np.add.at(y, tokens, out * weights[tokens, choices][:, None])
    return y


def random_weights(rng, experts, width, embed):
    gate_up = rng.standard_normal((experts, 2, width, embed)) / np.sqrt(embed)
    return gate_up.astype(np.float32), (rng.standard_normal((experts, embed, width)) / np.sqrt(width)).astype(
        np.float32
    )


def random_tokens(rng, tokens, choices, embed):
    return (
        rng.standard_normal((tokens, embed)).astype(np.float32),
        rng.random((tokens, choices)).astype(np.float32),
    )


def random_ids(rng, tokens, experts, choices, skew=0.0):
    """Distinct experts for each token; with more skew the first are chosen ever more often."""
    scores = rng.gumbel(size=(tokens, experts)) - skew * np.arange(experts)
    return np.argsort(-scores, axis=1)[:, :choices].astype(np.int32)


def check(x, ids, weights, gate_up, down):
    got = run(x, ids, weights, gate_up_E2FD=gate_up, down_EDF=down)
    assert got.dtype == x.dtype
    np.testing.assert_allclose(got, reference(x, ids, weights, gate_up, down), rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.sampled_from([1, 10]),
    shape=st.sampled_from([(1, 1, 5, 7), (4, 4, 3, 1), (16, 3, 16, 48)]),
    skew=st.sampled_from([0.0, 0.5, 4.0]),
    offset=st.integers(-3, 3),
    seed=st.integers(0, 99),
)
def test_equals_a_loop_over_experts(tokens, shape, skew, offset, seed):
    experts, choices, width, embed = shape
    rng = np.random.default_rng(seed)
    x, weights = random_tokens(rng, tokens, choices, embed)
    # The offset moves some ids out of 0..E-1, as where a device holds only some of the experts.
    ids = random_ids(rng, tokens, experts, choices, skew) + offset
    check(x, ids, weights, *random_weights(rng, experts, width, embed))


@pytest.mark.parametrize("tokens", [1, 3, 9, 70])
@pytest.mark.parametrize("skew", [0.0, 9.0])
def test_equals_a_loop_over_experts_where_products_run_in_strips(tokens, skew, monkeypatch):
    monkeypatch.setattr(loop_module, "MIN_STRIP_BYTES", 0)
    rng = np.random.default_rng(tokens)
    x, weights = random_tokens(rng, tokens, 3, 64)
    ids = random_ids(rng, tokens, 8, 3, skew)
    gate_up, down = random_weights(rng, 8, 32, 64)
    got = run_strips(x, ids, weights, gate_up_E2FD=gate_up, down_EDF=down)
    np.testing.assert_allclose(got, reference(x, ids, weights, gate_up, down), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_all_tokens_choose_one_expert(tokens):
    rng = np.random.default_rng(0)
    x, weights = random_tokens(rng, tokens, 1, 8)
    check(x, np.full((tokens, 1), 2, np.int32), weights, *random_weights(rng, 5, 4, 8))


@pytest.mark.parametrize("tokens", [1, 5])
def test_nothing_is_added_where_every_expert_is_elsewhere(tokens):
    rng = np.random.default_rng(0)
    x, weights = random_tokens(rng, tokens, 2, 8)
    gate_up, down = random_weights(rng, 3, 4, 8)
    ids = np.tile(np.array([-1, 3], np.int32), (tokens, 1))
    got = run(x, ids, weights, gate_up_E2FD=gate_up, down_EDF=down)
    np.testing.assert_array_equal(got, np.zeros_like(x))


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_token_that_is_not_finite_spoils_no_other(tokens):
    rng = np.random.default_rng(0)
    x, weights = random_tokens(rng, tokens + 1, 2, 8)
    x[0] = np.nan
    ids = random_ids(rng, tokens + 1, 4, 2)
    gate_up, down = random_weights(rng, 4, 4, 8)
    got = run(x, ids, weights, gate_up_E2FD=gate_up, down_EDF=down)
    assert np.isfinite(np.asarray(got)[1:]).all()


@pytest.mark.parametrize("tokens", [1, 6])
def test_bfloat16_is_accumulated_in_float32(tokens):
    rng = np.random.default_rng(0)
    x, weights = random_tokens(rng, tokens, 4, 32)
    ids = random_ids(rng, tokens, 8, 4)
    x, gate_up, down = (jnp.asarray(a, jnp.bfloat16) for a in (x, *random_weights(rng, 8, 16, 32)))
    got = run(x, ids, weights, gate_up_E2FD=gate_up, down_EDF=down)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(got, np.float32), reference(x, ids, weights, gate_up, down), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("tokens", [1, 6])
def test_experts_over_devices_sum_to_all_experts(tokens):
    rng = np.random.default_rng(0)
    x, weights = random_tokens(rng, tokens, 3, 8)
    ids = random_ids(rng, tokens, 8, 3)
    gate_up, down = random_weights(rng, 8, 4, 8)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("expert", "tensor"), axis_types=(AxisType.Explicit,) * 2)

    def region(x, ids, weights, gate_up, down):
        ids = ids - jax.lax.axis_index("expert") * gate_up.shape[0]
        y = expert_loop(x, ids, weights, gate_up_E2FD=gate_up, down_EDF=down)
        return jax.lax.psum(y, ("expert", "tensor"))

    specs = (P(), P(), P(), P("expert", None, "tensor", None), P("expert", None, "tensor"))
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(array, jax.NamedSharding(mesh, spec))
            for array, spec in zip((x, ids, weights, gate_up, down), specs, strict=True)
        ]
        got = jax.jit(jax.shard_map(region, in_specs=specs, out_specs=P()))(*arrays)
    np.testing.assert_allclose(got, reference(x, ids, weights, gate_up, down), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 8, 63, 64, 65, 192, 193, 512, 4097])
@pytest.mark.parametrize("mean", [0, 1, 16, 64, 5000])
def test_buckets_grow_and_the_last_holds_all_tokens(tokens, mean):
    buckets = loop_module._buckets(tokens, mean)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] >= tokens
    assert len(buckets) == 1 or buckets[-2] < tokens


@pytest.mark.parametrize(
    ("inputs", "strips"), [(512, 32), (256, 16), (4096, 32), (1408, 22), (96, 6), (16, 1), (40, 1)]
)
def test_strips_are_equal_and_of_whole_registers(inputs, strips):
    assert count_strips(jnp.zeros((2, 3, inputs))) == strips


def test_weights_are_not_copied_for_few_rows():
    """What makes it fast: no temporary as large as an expert's weights, for one token or for few rows."""
    experts, width, embed = 4, 256, 512
    for tokens in (1, 2):
        shapes = ((tokens, embed), (tokens, 2), (tokens, 2), (experts, 2, width, embed), (experts, embed, width))
        x, ids, weights, gate_up, down = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        ids = jax.ShapeDtypeStruct(ids.shape, jnp.int32)
        compiled = run.lower(x, ids, weights, gate_up_E2FD=gate_up, down_EDF=down).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * width * embed * 4 / 2
