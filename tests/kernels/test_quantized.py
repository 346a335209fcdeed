"""Products with quantised weights equal those with the weights that they stand for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.kernels import cpu, expert_loop, quantized, with_implementations
from glm_jax.kernels.cpu import multiply_row
from glm_jax.kernels.quantized import absorb_into_query, expand_values
from glm_jax.layers.dispatch import run_experts
from glm_jax.layers.linear import project, project_pair
from glm_jax.sharding import QuantizedArray
from tests.operations import CPU, EXPERTS, MATMUL

FORMS = {
    "int8": (jnp.int8, None),
    "fp8": (jnp.float8_e4m3fn, None),
    "int4": (jnp.int4, 8),
    "fp8 blocks": (jnp.float8_e4m3fn, 4),
    "fp8 bits": (jnp.uint8, None),
    "fp8 bits in blocks": (jnp.uint8, 4),
}
parametrize_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def random_weight(form: tuple, shape: tuple[int, ...], *, inputs: int = 1, seed: int = 0) -> QuantizedArray:
    """Random values over the whole range, and scales of very different sizes."""
    (dtype, group), rng = form, np.random.default_rng(seed)
    limit = {jnp.int8: 127, jnp.int4: 7}.get(dtype, 200)
    values = jnp.asarray(rng.integers(-limit, limit, shape, endpoint=True), jnp.float32)
    if dtype == jnp.uint8:
        values = jnp.asarray(np.asarray(values).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    values = values.astype(dtype)
    outputs = shape[: len(shape) - inputs]
    groups = () if group is None else (int(np.prod(shape[len(outputs) :])) // group,)
    return QuantizedArray(values, jnp.asarray(10.0 ** rng.uniform(-4, -2, outputs + groups), jnp.float32), inputs)


def random_x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def assert_close(ours: jax.Array, reference: jax.Array) -> None:
    np.testing.assert_allclose(ours, reference, atol=1e-5 * float(jnp.abs(reference).max()), rtol=0)


@parametrize_form
def test_the_matrix_is_values_times_scales(form):
    weight = random_weight(form, (3, 5, 16))
    values, scale = np.asarray(weight.values), np.asarray(weight.scale)
    values = (values.view(ml_dtypes.float8_e4m3fn) if form[0] == jnp.uint8 else values).astype(np.float32)
    expected = values * (scale[..., None] if form[1] is None else np.repeat(scale, form[1], axis=-1))
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_every_float8_number():
    bits = np.arange(256, dtype=np.uint8)
    numbers = jax.jit(QuantizedArray.numbers, static_argnums=1)(jnp.asarray(bits), jnp.float32)
    np.testing.assert_array_equal(numbers, bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def numpy_product(x: jax.Array, weight: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


parametrize_reorders = pytest.mark.parametrize("reorders", [True, False], ids=["fused", "strips"])


@parametrize_form
@parametrize_reorders
@pytest.mark.parametrize("inputs", [64, 96, 4096, 5128])
def test_one_row_by_a_matrix_of_a_stack(form, inputs, reorders, monkeypatch):
    monkeypatch.setattr(cpu, "REORDERS_SUMS", reorders)
    weight, x = random_weight(form, (3, 5, inputs)), random_x(1, inputs)
    multiply = jax.jit(lambda x, weight, index: multiply_row(x, weight, index))
    for index in (0, 2):
        expected = numpy_product(x, weight.dequantize()[index])
        assert_close(multiply(x, weight, index), expected)
        assert_close(multiply(x, weight.dequantize(), index), expected)


@parametrize_reorders
def test_a_row_is_multiplied_without_writing_the_matrix_out(reorders, monkeypatch):
    """What XLA's CPU backend fuses it does not copy: the compiled program needs no memory beside its results."""
    monkeypatch.setattr(cpu, "REORDERS_SUMS", reorders)
    x, weights = random_x(1, 5120), random_weight(FORMS["fp8 bits in blocks"], (2, 64, 5120))
    if jax.default_backend() != "cpu":
        pytest.skip("a matter of XLA's CPU backend")
    for weight in (weights, weights.dequantize()):

        def looped(x, weight):
            return jax.lax.fori_loop(0, 2, lambda i, y: y + multiply_row(x, weight, i), jnp.zeros((1, 64)))

        memory = jax.jit(looped).lower(x, weight).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 64 * 5120


@parametrize_form
@pytest.mark.parametrize("tokens", [2, 4, 5])
def test_experts_of_few_rows(form, tokens, monkeypatch):
    """By strips, which narrow groups of inputs, or part of one, fill."""
    monkeypatch.setattr(expert_loop, "MIN_STRIP_BYTES", 0)
    for group in (form[1] and 32, form[1] and 96):
        gate_up = random_weight((form[0], group), (3, 2, 96, 192))
        down = random_weight((form[0], group), (3, 192, 96), seed=3)
        ids = jnp.zeros((tokens, 1), jnp.int32)
        x, weights = random_x(tokens, 192), jnp.ones((tokens, 1), jnp.float32)
        run = jax.jit(expert_loop.expert_loop)
        ours = run(x, ids, weights, gate_up_E2FD=gate_up, down_EDF=down)
        whole = {"gate_up_E2FD": gate_up.dequantize(), "down_EDF": down.dequantize()}
        assert_close(ours, EXPERTS["dense"](x, ids, weights, **whole))


@parametrize_form
@pytest.mark.parametrize("one_by_one", [False, True], ids=["at once", "one group after the other"])
def test_einsums(form, one_by_one, monkeypatch):
    if one_by_one:
        monkeypatch.setattr(quantized, "MAX_GROUP_VALUES", 0)
    weight, x = random_weight(form, (3, 6, 16)), random_x(2, 3, 16)
    ours = jax.jit(quantized.scaled_einsum, static_argnums=0)("bed,eod->beo", x, weight)
    assert_close(ours, jnp.einsum("bed,eod->beo", x, weight.dequantize()))


@parametrize_form
@pytest.mark.parametrize("name", MATMUL)
@pytest.mark.parametrize("one_by_one", [False, True], ids=["at once", "one group after the other"])
def test_projections(form, name, one_by_one, monkeypatch):
    if one_by_one:
        monkeypatch.setattr(quantized, "MAX_GROUP_VALUES", 0)
    heads, out = random_weight(form, (4, 6, 16)), random_weight(form, (10, 4, 8), inputs=2)
    pair, x, per_head = random_weight(form, (2, 8, 16)), random_x(2, 3, 16), random_x(2, 3, 4, 8)
    columns = functools.partial(project, ops=MATMUL[name])
    rows = functools.partial(project, ops=MATMUL[name], row_parallel=True)
    assert_close(jax.jit(columns)(x, heads), columns(x, heads.dequantize()))
    assert_close(jax.jit(rows)(per_head, out), rows(per_head, out.dequantize()))
    references = project_pair(x, pair.dequantize(), MATMUL[name])
    for ours, reference in zip(project_pair(x, pair, MATMUL[name]), references, strict=True):
        assert_close(ours, reference)


@parametrize_form
def test_products_of_latent_attention(form):
    weight, q, latent = random_weight(form, (4, 9, 16)), random_x(2, 3, 4, 6), random_x(2, 3, 4, 16)
    whole = weight.dequantize()
    ours = jax.jit(functools.partial(absorb_into_query, count=6))(q, weight)
    assert_close(ours, jnp.einsum("btnh,nhr->btnr", q, whole[:, :6]))
    ours = jax.jit(functools.partial(expand_values, count=3))(latent, weight)
    assert_close(ours, jnp.einsum("btnr,nhr->btnh", latent, whole[:, 6:]))


@parametrize_form
@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, tokens, form):
    gate_up, down = random_weight(form, (6, 2, 8, 16)), random_weight(form, (6, 16, 8), seed=3)
    rng = np.random.default_rng(tokens)
    ids = jnp.asarray(np.stack([rng.permutation(6)[:2] for _ in range(tokens)])[:, None], jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 1, (tokens, 1, 2)), jnp.float32)
    run = jax.jit(functools.partial(run_experts, ops=with_implementations(CPU, experts=name)))
    x = random_x(tokens, 1, 16)
    reference = run(x, ids, weights, gate_up=gate_up.dequantize(), down=down.dequantize())
    assert_close(run(x, ids, weights, gate_up=gate_up, down=down), reference)


@parametrize_form
@pytest.mark.parametrize("one_by_one", [False, True], ids=["at once", "one group after the other"])
def test_projections_over_devices(form, one_by_one, monkeypatch, mesh_of_sizes):
    if one_by_one:
        monkeypatch.setattr(quantized, "MAX_GROUP_VALUES", 0)
    mesh = mesh_of_sizes((2, 2, 2))

    def placed(array: jax.Array, *spec: str | None) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    def split(weight: QuantizedArray, *spec: str | None) -> QuantizedArray:
        return QuantizedArray(
            placed(weight.values, *spec), placed(weight.scale, *spec[: weight.scale.ndim]), weight.contracting_dims
        )

    heads, out = random_weight(form, (4, 6, 16)), random_weight(form, (10, 4, 8), inputs=2)
    pair, down = random_weight(form, (2, 8, 16)), random_weight(form, (16, 16))
    x, per_head, wide = random_x(4, 3, 16), random_x(4, 3, 4, 8), random_x(4, 3, 16)
    columns = functools.partial(project, ops=CPU)
    rows = functools.partial(project, ops=CPU, row_parallel=True)
    with jax.set_mesh(mesh):
        batch, tensor = ("data", "expert"), "tensor"
        ours = jax.jit(columns)(placed(x, batch), split(heads, tensor))
        assert_close(ours, columns(np.asarray(x), heads.dequantize()))
        ours = jax.jit(rows)(placed(per_head, batch, None, tensor), split(out, None, tensor))
        assert_close(ours, rows(np.asarray(per_head), out.dequantize()))
        ours = jax.jit(rows)(placed(wide, batch, None, tensor), split(down, None, tensor))
        assert_close(ours, rows(np.asarray(wide), down.dequantize()))
        both = functools.partial(project_pair, ops=CPU)
        ours = jax.jit(both)(placed(x, batch), split(pair, None, tensor))
        for one, reference in zip(ours, both(np.asarray(x), pair.dequantize()), strict=True):
            assert_close(one, reference)
