"""Packed bfloat16, as a CPU holds it: multiplied as float32 by one row and as bfloat16 by several."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import glm_jax
from glm_jax.kernels import with_implementations
from glm_jax.kernels.quantized import absorb_into_query, expand_values
from glm_jax.layers.dispatch import run_experts
from glm_jax.layers.linear import project, project_pair
from glm_jax.sharding import PackedBfloat16, weights_by_name
from tests import published
from tests.operations import CPU, EXPERTS

FAMILIES = ["glm4_moe", "deepseek_v3"]


def random_packed(*shape: int, seed: int = 0) -> tuple[PackedBfloat16, np.ndarray]:
    """A weight, and the numbers that it holds."""
    values = np.random.default_rng(seed).normal(size=shape).astype(ml_dtypes.bfloat16)
    return PackedBfloat16(jnp.asarray(values.view(np.uint16))), values.astype(np.float64)


def random_x(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """What several rows are multiplied as."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def test_every_number_survives():
    values = np.arange(2**16, dtype=np.uint16)
    finite = np.isfinite(values.view(ml_dtypes.bfloat16).astype(np.float32))
    back = np.asarray(PackedBfloat16(jnp.asarray(values)).dequantize())
    np.testing.assert_array_equal(back[finite], values.view(ml_dtypes.bfloat16).astype(np.float32)[finite])


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (2, 40)], ids=str)
def test_projections(shape):
    exact = shape == (1, 1)
    (heads, heads_f), (out, out_f) = random_packed(4, 6, 32), random_packed(10, 4, 8)
    (pair, pair_f), (x, wide) = random_packed(2, 8, 32, seed=2), (random_x(*shape, 32), random_x(*shape, 4, 8))
    columns = jax.jit(functools.partial(project, ops=CPU))
    rows = jax.jit(functools.partial(project, ops=CPU, row_parallel=True))
    seen = (lambda array: array.astype(np.float64)) if exact else rounded
    expected = np.einsum("btd,nhd->btnh", seen(x), heads_f)
    np.testing.assert_allclose(columns(x, heads), expected, atol=2e-5 * np.abs(expected).max())
    expected = np.einsum("btnh,dnh->btd", seen(wide), out_f)
    np.testing.assert_allclose(rows(wide, out), expected, atol=2e-5 * np.abs(expected).max())
    expected = np.einsum("btd,cfd->cbtf", seen(x), pair_f)
    pairs = jax.jit(functools.partial(project_pair, ops=CPU))(x, pair)
    for ours, reference in zip(pairs, expected, strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-5 * np.abs(expected).max())


def test_products_of_latent_attention():
    (weight, weight_f), q, latent = random_packed(4, 9, 16), random_x(2, 3, 4, 6), random_x(2, 3, 4, 16)
    expected = np.einsum("btnh,nhr->btnr", q.astype(np.float64), weight_f[:, :6])
    ours = jax.jit(functools.partial(absorb_into_query, count=6))(q, weight)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
    expected = np.einsum("btnr,nhr->btnh", latent.astype(np.float64), weight_f[:, 6:])
    ours = jax.jit(functools.partial(expand_values, count=3))(latent, weight)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("tokens", [1, 3, 12, 60])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, tokens):
    (gate_up, _), (down, _) = random_packed(6, 2, 512, 256), random_packed(6, 256, 512, seed=3)
    rng = np.random.default_rng(tokens)
    ids = jnp.asarray(np.stack([rng.permutation(6)[:2] for _ in range(tokens)])[:, None], jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 1, (tokens, 1, 2)), jnp.float32)
    run = jax.jit(functools.partial(run_experts, ops=with_implementations(CPU, experts=name)))
    x = jnp.asarray(random_x(tokens, 1, 256)) / 16
    ours = run(x, ids, weights, gate_up=gate_up, down=down)
    reference = np.asarray(run(x, ids, weights, gate_up=gate_up.dequantize(), down=down.dequantize()))
    assert np.abs(ours - reference).max() <= (1e-5 if tokens == 1 else 2e-2) * np.abs(reference).max()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_in_bfloat16(tmp_path, one_device, mesh_of_sizes, model_type):
    source = published.checkpoint(tmp_path / "hf", model_type=model_type)
    single, exact = (glm_jax.load(source, mesh=one_device, dtype=dtype) for dtype in ("bfloat16", "float32"))
    held = {name: weight.get_raw_value() for name, weight in weights_by_name(single).items()}
    assert isinstance(held["embedding.weight"], PackedBfloat16) and single.dtype == jnp.float32
    assert all(isinstance(value, PackedBfloat16) or "router" in name or value.ndim < 3 for name, value in held.items())
    tokens = np.random.default_rng(0).integers(0, 128, (4, 11)).astype(np.int32)
    reference = np.asarray(exact(tokens, mtp=True).logits)
    logits = np.asarray(single(tokens, mtp=True).logits)
    assert np.median(np.abs(logits - reference)) <= 0.01 * reference.std()
    one = np.asarray(exact(tokens[:1, :1]).logits)
    np.testing.assert_allclose(single(tokens[:1, :1]).logits, one, atol=1e-4 * one.std())
    many = glm_jax.load(source, mesh=mesh_of_sizes((2, 2, 2)), dtype="bfloat16", stacked=True)
    assert np.median(np.abs(np.asarray(many(tokens).logits) - reference)) <= 0.01 * reference.std()


@pytest.mark.parametrize("speculative", [0, 2])
def test_generation_in_bfloat16(tmp_path, one_device, speculative):
    """One row at a time is exact but for the weights' rounding: the tokens are those of float32 on these weights."""
    source = published.checkpoint(tmp_path / "hf", seed=3)
    single, exact = (glm_jax.load(source, mesh=one_device, dtype=dtype) for dtype in ("bfloat16", "float32"))
    new = glm_jax.generate(single, [[5]], max_new_tokens=16, speculative=speculative)
    assert len(new[0]) == 16
    if not speculative:
        assert new == glm_jax.generate(exact, [[5]], max_new_tokens=16)


def test_a_new_model_draws_the_same_numbers(one_device):
    config = glm_jax.configs.get("tiny-glm")
    packed, plain = (glm_jax.Transformer.create(config, mesh=one_device, dtype=d) for d in ("bfloat16", "float32"))
    for name, weight in weights_by_name(plain).items():
        held, value = weights_by_name(packed)[name].get_raw_value(), np.asarray(weight.get_raw_value())
        if isinstance(held, PackedBfloat16):
            held, value = held.dequantize(), value.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(held, value, err_msg=name)
