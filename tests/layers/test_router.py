"""The router against a plain numpy statement of it: groups, biases of both signs, weights without the bias."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.configs import MoeConfig
from glm_jax.layers.router import Router
from tests.operations import CPU

EXPERTS, WIDTH = 32, 16


def moe(groups: int, kept: int, choices: int, *, normalize: bool = True) -> MoeConfig:
    return MoeConfig(
        num_experts=EXPERTS,
        num_experts_per_token=choices,
        expert_width=8,
        num_shared_experts=1,
        num_groups=groups,
        num_groups_per_token=kept,
        normalize_weights=normalize,
        routed_scaling=2.5,
    )


def filled(config: MoeConfig, weight: np.ndarray, bias: np.ndarray) -> Router:
    router = Router(config, WIDTH, initializer_range=0.02)
    router.weight.set_raw_value(jnp.asarray(weight))
    router.bias.set_raw_value(jnp.asarray(bias))
    return router


def by_numpy(config: MoeConfig, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, mask: float) -> list[dict]:
    """For each token the chosen experts with their weights; experts outside the kept groups score `mask`."""
    found = []
    for token in x.reshape(-1, WIDTH):
        scores = 1 / (1 + np.exp(-(weight.astype(np.float64) @ token)))
        grouped = (scores + bias).reshape(config.num_groups, -1)
        best = np.argsort(-np.sort(grouped, axis=1)[:, -2:].sum(axis=1))[: config.num_groups_per_token]
        choice = np.full_like(grouped, mask)
        choice[best] = grouped[best]
        ids = np.argsort(-choice.ravel(), kind="stable")[: config.num_experts_per_token]
        total = scores[ids].sum() if config.normalize_weights else 1.0
        found.append({int(i): scores[i] / total * config.routed_scaling for i in ids})
    return found


def routed(config: MoeConfig, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> list[dict]:
    out = jax.jit(functools.partial(filled(config, weight, bias), ops=CPU))(jnp.asarray(x))
    ids, weights = np.asarray(out.ids).reshape(len(x[0]), -1), np.asarray(out.weights).reshape(len(x[0]), -1)
    return [dict(zip(i.tolist(), w.tolist(), strict=True)) for i, w in zip(ids, weights, strict=True)]


def case(seed: int, mean_bias: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(1, 50, WIDTH)), rng.normal(0, WIDTH**-0.5, (EXPERTS, WIDTH))
    return tuple(a.astype(np.float32) for a in (x, weight, rng.normal(mean_bias, 0.2, EXPERTS)))


@pytest.mark.parametrize("mean_bias", [0.0, -0.6, -2.0, 1.0])
@pytest.mark.parametrize(
    ("groups", "kept", "choices"), [(1, 1, 8), (2, 1, 8), (4, 2, 8), (8, 4, 8), (8, 2, 8), (4, 4, 3)]
)
def test_choices_and_weights(groups, kept, choices, mean_bias):
    config, arrays = moe(groups, kept, choices), case(groups, mean_bias)
    for ours, expected in zip(routed(config, *arrays), by_numpy(config, *arrays, mask=-np.inf), strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


def test_a_mask_of_zero_would_be_another_router():
    """With negative biases an excluded expert at 0 would win; the test above must be able to tell."""
    config, arrays = moe(8, 4, 8), case(0, -2.0)
    right, wrong = by_numpy(config, *arrays, mask=-np.inf), by_numpy(config, *arrays, mask=0.0)
    assert all(a.keys() != b.keys() for a, b in zip(right, wrong, strict=True))


def test_weights_are_left_as_they_are_where_they_are_not_normalised():
    config, arrays = moe(4, 2, 6, normalize=False), case(7, -0.5)
    for ours, expected in zip(routed(config, *arrays), by_numpy(config, *arrays, mask=-np.inf), strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


def test_scores_that_vanish_divide_by_no_zero():
    weight = np.full((EXPERTS, WIDTH), -100.0, np.float32)
    out = routed(moe(4, 2, 8), np.ones((1, 3, WIDTH), np.float32), weight, np.zeros(EXPERTS, np.float32))
    assert all(np.isfinite(list(token.values())).all() for token in out)
