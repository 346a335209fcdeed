"""Projections by every `matmul` and storage of a weight: the same sums, on one device and on several."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.layers.linear import project
from glm_jax.sharding import QuantizedArray, make_mesh
from glm_jax.sharding.rules import spec_of
from tests.operations import CPU, MATMUL

SIZE, HEADS, HEAD = 16, 4, 6
ROWS = [(1, 1), (1, 2), (2, 1), (3, 1), (1, 4), (2, 3)]


def arrays(shape: tuple[int, ...]) -> tuple[jax.Array, QuantizedArray, np.ndarray, np.ndarray]:
    """A weight, a quantised one of the same shape, and the numbers of both."""
    rng = np.random.default_rng(0)
    plain, values = rng.normal(size=shape).astype(np.float32), rng.integers(-127, 128, shape, np.int8)
    scale = rng.uniform(0.5, 1.5, shape[:1]).astype(np.float32)
    numbers = values * scale.reshape(-1, *(1,) * (len(shape) - 1))
    return jnp.asarray(plain), QuantizedArray(jnp.asarray(values), jnp.asarray(scale), len(shape) - 1), plain, numbers


@pytest.mark.parametrize("name", MATMUL)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_projections(rows, name):
    x = np.random.default_rng(1).normal(size=(*rows, SIZE)).astype(np.float32)
    plain, narrow, plain_numbers, numbers = arrays((10, SIZE))
    for weight, matrix in ((plain, plain_numbers), (narrow, numbers)):
        expected = x @ matrix.T
        for row_parallel in (False, True):
            product = jax.jit(functools.partial(project, ops=MATMUL[name], row_parallel=row_parallel))
            np.testing.assert_allclose(product(x, weight), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MATMUL)
@pytest.mark.parametrize("rows", [(1, 1), (2, 3)], ids=str)
def test_split_over_devices(rows, name):
    """Heads as outputs, then as inputs whose products are summed over the devices; sequences split too."""
    rng = np.random.default_rng(2)
    q, o = (rng.normal(size=shape).astype(np.float32) for shape in ((HEADS, HEAD, SIZE), (SIZE, HEADS, HEAD)))
    x = rng.normal(size=(*rows, SIZE)).astype(np.float32)
    sizes = {"data": 2 if rows[0] == 2 else 1, "tensor": 2}
    mesh = make_mesh(**sizes, devices=jax.devices()[: sizes["data"] * sizes["tensor"]])
    ops = MATMUL[name]
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, jax.NamedSharding(mesh, spec))
            for array, spec in ((x, spec_of("data")), (q, spec_of("tensor")), (o, spec_of(None, "tensor")))
        ]
        out = jax.jit(lambda x, q, o: project(project(x, q, ops), o, ops, row_parallel=True))(*placed)
    expected = np.einsum("btnh,dnh->btd", np.einsum("btd,nhd->btnh", x, q), o)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


def test_gradient_of_few_rows():
    x, weight = np.random.default_rng(0).normal(size=(1, 3, SIZE)), np.random.default_rng(1).normal(size=(5, SIZE))
    x, weight = x.astype(np.float32), weight.astype(np.float32)
    ours = jax.grad(lambda x, w: jnp.sum(project(x, w, CPU) ** 2), argnums=(0, 1))(x, weight)
    made = 2 * (x @ weight.T)
    np.testing.assert_allclose(ours[0], made @ weight, rtol=1e-4)
    np.testing.assert_allclose(ours[1], made[0].T @ x[0], rtol=1e-4)
