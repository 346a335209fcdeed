from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.model import Output, Transformer
from glm_jax.sharding import rules_named
from glm_jax.training import OptimizerConfig, build_optimizer, create_state
from glm_jax.training.balance import expert_loads, imbalance, update_router_biases
from glm_jax.training.optimizer import ADAM, ADAM_NO_DECAY, FROZEN, MUON, optimizer_labels, schedule
from glm_jax.training.step import values_by_name
from tests.training.runs import BATCH, OPTIMIZER, REAL, TINY, build, train


@pytest.fixture(scope="module")
def on_one_device(one_device):
    state, step = build(one_device)
    return step, *train(one_device, step, state)


def test_steps_lower_the_loss(on_one_device):
    _, state, losses = on_one_device
    assert losses[-1] < losses[0] - 0.3
    assert int(state.step) == 4


@pytest.mark.parametrize("preset", [pytest.param("default", marks=pytest.mark.slow), "train"])
def test_a_split_model_trains_alike(mesh_of_sizes, on_one_device, preset):
    """The optimizer's state lies like the weights that it is of."""
    _, state, losses = on_one_device
    mesh = mesh_of_sizes((2, 2, 2))
    split, step = build(mesh, rules_named(preset))
    held = values_by_name(split.model)
    for path, leaf in jax.tree_util.tree_flatten_with_path(split.optimizer)[0]:
        name = next((key.key for key in reversed(path) if getattr(key, "key", None) in held), None)
        assert name is None or leaf.sharding.is_equivalent_to(held[name].sharding, leaf.ndim), name
    split, split_losses = train(mesh, step, split)
    np.testing.assert_allclose(split_losses, losses, rtol=2e-5)
    expected = values_by_name(state.model)
    for name, value in values_by_name(split.model).items():
        # Adam divides by the gradient's own size: where that is near 0, the order of a sum decides.
        np.testing.assert_allclose(value, expected[name], atol=5e-4, err_msg=name)


def test_what_pads_a_row_changes_nothing(one_device, on_one_device):
    step, _, losses = on_one_device
    noise = dataclasses.replace(BATCH, tokens=np.where(REAL, BATCH.tokens, 7).astype(np.int32))
    model = Transformer.create(TINY, mesh=one_device, dtype=jnp.float32, stacked=True)
    state = create_state(model, build_optimizer(model, OPTIMIZER))
    assert train(one_device, step, state, batch=noise, steps=2)[1] == pytest.approx(losses[:2], rel=1e-6)


def test_loads_count_the_real_tokens():
    ids = np.random.default_rng(0).integers(0, 8, (3, 8, 16, 2))
    zeros = jnp.zeros((8, 16, 4))
    loads = expert_loads(
        Output(zeros, zeros, None, None, jnp.asarray(ids), jnp.asarray(ids[0, :, 1:])), BATCH, experts=8
    )
    for layer in range(3):
        np.testing.assert_array_equal(loads["moe"][layer], np.bincount(ids[layer][REAL].reshape(-1), minlength=8))
    np.testing.assert_array_equal(loads["mtp"], np.bincount(ids[0, :, 1:][REAL[:, 1:]].reshape(-1), minlength=8))
    assert float(imbalance({"moe": jnp.asarray([[1.0, 1.0], [3.0, 1.0]])})) == 1.5


@pytest.mark.parametrize("stacked", [True, False])
def test_biases_move_against_the_loads(one_device, stacked):
    model = Transformer.create(TINY, mesh=one_device, dtype=jnp.float32, stacked=stacked)
    load = np.array([4, 0, 2, 2, 2, 2, 1, 3], np.float32)
    moved = values_by_name(
        update_router_biases(model, {"moe": jnp.asarray([load]), "mtp": jnp.asarray(load[::-1])}, 0.1)
    )
    expected = np.float32(0.1) * np.array([-1, 1, 0, 0, 0, 0, 1, -1], np.float32)
    name = "moe.moe.router.bias" if stacked else "moe.0.moe.router.bias"
    np.testing.assert_array_equal(moved[name].reshape(-1), expected)
    np.testing.assert_array_equal(moved["mtp.layer.moe.router.bias"], expected[::-1])


def test_every_weight_has_its_optimizer():
    found = optimizer_labels(Transformer(TINY), OPTIMIZER)
    assert found["embedding.weight"] == ADAM
    assert found["head.weight"] == found["moe.moe.router.weight"] == found["mtp.projection"] == MUON
    assert found["moe.attention.q_bias"] == found["final_norm.scale"] == ADAM_NO_DECAY
    assert [name for name, kind in found.items() if kind == FROZEN] == [n for n in found if n.endswith("router.bias")]


def test_the_schedule_warms_up_and_falls_to_its_end():
    rate = schedule(OptimizerConfig(steps=100, warmup_steps=10, final_fraction=0.1))
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 0.5, 1, 0.55, 0.1], atol=1e-6)
