from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from glm_jax import configs
from glm_jax.model import Transformer
from glm_jax.sharding import weights_by_name
from glm_jax.training import MatrixAxes, matrix_axes, scale_by_muon
from glm_jax.training.muon import orthogonalize
from tests.sharding.compiled import collectives

# Shape -> its matrix axes, and the same in optax's words (reduction, output).
SHAPES = {
    (24, 16): (MatrixAxes(0, 1, 1), MuonDimensionNumbers((1,), (0,))),
    (3, 16, 24): (MatrixAxes(1, 1, 1), MuonDimensionNumbers((2,), (1,))),
    (3, 4, 2, 8, 16): (MatrixAxes(3, 1, 1), MuonDimensionNumbers((4,), (3,))),
    (3, 4, 8, 16): (MatrixAxes(1, 2, 1), MuonDimensionNumbers((3,), (1, 2))),
    (3, 16, 4, 8): (MatrixAxes(1, 1, 2), MuonDimensionNumbers((2, 3), (1,))),
}


def gradients(seed):
    rng = np.random.default_rng(seed)
    return {str(shape): jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SHAPES}


@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_optax(nesterov):
    ours = scale_by_muon({str(shape): axes for shape, (axes, _) in SHAPES.items()}, nesterov=nesterov)
    numbers = {str(shape): number for shape, (_, number) in SHAPES.items()}
    theirs = optax.contrib.muon(
        1.0, nesterov=nesterov, weight_decay=0.0, consistent_rms=0.2, muon_weight_dimension_numbers=numbers
    )
    state, expected_state = ours.init(gradients(0)), theirs.init(gradients(0))
    # optax corrects the bias of gradient and momentum apart, which turns a Nesterov step from the second one on.
    for seed in range(1 if nesterov else 3):
        update, state = jax.jit(ours.update)(gradients(seed), state)
        expected, expected_state = jax.jit(theirs.update)(gradients(seed), expected_state, gradients(0))
        for name in update:
            np.testing.assert_allclose(update[name], -expected[name], atol=3e-5)


@pytest.mark.parametrize(
    ("shape", "spec", "exchanges"),
    [
        ((24, 16), P("tensor", ("data", "expert")), {"all-gather"}),  # one matrix: whole everywhere
        ((3, 16, 24), P(None, "tensor", ("data", "expert")), {"all-to-all"}),  # three, filled up to eight
        ((3, 4, 2, 8, 16), P(None, "expert", None, "tensor", "data"), {"all-to-all"}),
        ((3, 4, 8, 16), P(None, "tensor", None, ("expert", "data")), {"all-to-all"}),
        ((3, 16, 4, 8), P(None, ("data", "expert"), "tensor", None), {"all-to-all"}),
        ((2, 16, 24), P("data", "tensor", None), {"all-gather"}),  # the batch is split, and cannot be filled up
    ],
)
def test_split_matrices_are_turned_as_whole_ones(mesh_of_sizes, shape, spec, exchanges):
    axes = SHAPES.get(shape, SHAPES[(3, 16, 24)])[0]
    muon, mesh = scale_by_muon({"w": axes}), mesh_of_sizes((2, 2, 2))
    gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected, _ = muon.update({"w": gradient}, muon.init({"w": gradient}))
    with jax.set_mesh(mesh):
        split = {"w": jax.device_put(gradient, jax.NamedSharding(mesh, spec))}
        compiled = jax.jit(muon.update).lower(split, muon.init(split)).compile()
        update, state = compiled(split, muon.init(split))
    np.testing.assert_allclose(update["w"], expected["w"], atol=1e-5)
    assert update["w"].sharding == state.momentum["w"].sharding == split["w"].sharding
    assert {kind for kind, elements in collectives(compiled) if elements > 1} == exchanges


def test_nesterov_looks_ahead_along_the_momentum():
    name, axes = "(24, 16)", {"(24, 16)": MatrixAxes(0, 1, 1)}
    muon = scale_by_muon(axes, momentum=0.9)
    first, second = ({name: gradients(seed)[name]} for seed in (1, 2))
    update, _ = muon.update(second, muon.update(first, muon.init(first))[1])
    momentum = 0.9 * 0.1 * first[name] + 0.1 * second[name]
    ahead = 0.9 * momentum + 0.1 * second[name]
    np.testing.assert_allclose(update[name], orthogonalize(ahead) * 0.2 * np.sqrt(24), atol=1e-5)


def test_singular_values_come_near_one():
    x = orthogonalize(gradients(0)["(3, 16, 24)"])
    values = np.linalg.svd(np.asarray(x), compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_matrices_follow_from_the_declarations():
    weights = weights_by_name(Transformer(configs.get("tiny-glm")))
    axes = {name: matrix_axes(weight) for name, weight in weights.items()}
    assert axes["moe.attention.q"] == MatrixAxes(1, 2, 1)
    assert axes["moe.attention.k"] == MatrixAxes(1, 2, 1)
    assert axes["moe.attention.o"] == MatrixAxes(1, 1, 2)
    assert axes["moe.moe.experts.gate_up"] == MatrixAxes(3, 1, 1)
    assert axes["moe.moe.experts.down"] == MatrixAxes(2, 1, 1)
    assert axes["moe.moe.shared.gate_up"] == MatrixAxes(2, 1, 1)
    assert axes["mtp.layer.attention.q"] == MatrixAxes(0, 2, 1)
    assert axes["mtp.projection"] == axes["head.weight"] == MatrixAxes(0, 1, 1)
    assert axes["moe.moe.router.weight"] == MatrixAxes(1, 1, 1)
    none = [name for name, found in axes.items() if found is None]
    assert none == [name for name in axes if name.endswith(("scale", "_bias", ".bias"))]


def test_matrices_of_latent_attention():
    axes = {name: matrix_axes(w) for name, w in weights_by_name(Transformer(configs.get("tiny-deepseek"))).items()}
    assert axes["moe.attention.q_a"] == axes["moe.attention.kv_a"] == MatrixAxes(1, 1, 1)
    assert axes["moe.attention.q_b"] == axes["moe.attention.kv_b"] == MatrixAxes(1, 2, 1)
    assert axes["moe.attention.o"] == MatrixAxes(1, 1, 2)
    assert axes["mtp.layer.attention.kv_b"] == MatrixAxes(0, 2, 1)
    none = [name for name, found in axes.items() if found is None]
    assert none == [name for name in axes if name.endswith(("scale", ".bias"))]
