"""Tokens are drawn from the distributions that the settings say, computed here by numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from glm_jax.inference.config import Sampling
from glm_jax.inference.sampling import Sampler
from glm_jax.kernels.reference import argmax

DRAWS = 20_000
UNLIKELY = 1e-4  # a right sampler fails so often; the seeds are fixed, so that these draws do not
NO = -np.inf
LOGITS = [1.0, -0.5, 2.0, 0.25, 1.5, -2.0, 0.0, -1.0]
TIED = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, -1.0, -1.0]
MASKED = [1.0, NO, 2.0, NO, 1.5, -2.0, NO, NO]


def sampled(logits, positions, **settings) -> np.ndarray:
    """What the sampler chooses for logits [B, V]."""
    sampler = Sampler.create(Sampling(max_new_tokens=1, **settings))
    choose = jax.jit(lambda sampler, logits, positions: sampler(logits, positions, argmax=argmax))
    return np.asarray(choose(sampler, jnp.asarray(logits, jnp.float32), jnp.asarray(positions, jnp.int32)))


def draws(logits, *, first: int = 0, **settings) -> np.ndarray:
    """Draws from one distribution: a batch of equal rows, at positions of their own."""
    return sampled(np.tile(logits, (DRAWS, 1)), first + np.arange(DRAWS), **settings)


def distribution(logits, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Softmax of the logits over the temperature; then the k first; then the fewest that reach p together."""
    logits = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-logits, kind="stable")
    chances = np.exp(logits[order] - logits[order[0]])
    if top_k:
        chances[top_k:] = 0
    chances /= chances.sum()
    chances[np.cumsum(chances) - chances >= top_p] = 0
    result = np.zeros_like(chances)
    result[order] = chances / chances.sum()
    return result


def likelihood(tokens: np.ndarray, expected: np.ndarray) -> float:
    """How often draws from `expected` are as far from it as these (Pearson's chi-squared test)."""
    counts, possible = np.bincount(tokens, minlength=len(expected)), expected > 0
    assert counts[~possible].sum() == 0, "a token that cannot be"
    if possible.sum() == 1:
        return 1.0
    return stats.chisquare(counts[possible], len(tokens) * expected[possible]).pvalue


@pytest.mark.parametrize(
    ("logits", "settings"),
    [
        (LOGITS, {"temperature": 1.0}),
        (LOGITS, {"temperature": 0.4}),
        (LOGITS, {"temperature": 3.0}),
        (LOGITS, {"temperature": 1.0, "top_k": 1}),
        (LOGITS, {"temperature": 1.0, "top_k": 3}),
        (LOGITS, {"temperature": 2.0, "top_k": 8}),
        (LOGITS, {"temperature": 2.0, "top_k": 2**40}),
        (LOGITS, {"temperature": 1.0, "top_p": 1e-9}),
        (LOGITS, {"temperature": 1.0, "top_p": 0.5}),
        (LOGITS, {"temperature": 0.7, "top_p": 0.95}),
        (LOGITS, {"temperature": 5.0, "top_p": 0.95}),  # of what the temperature makes of it
        (LOGITS, {"temperature": 2.0, "top_k": 4, "top_p": 0.8}),  # of what top_k leaves
        (LOGITS, {"temperature": 2.0, "top_k": 2, "top_p": 0.99}),
        (TIED, {"temperature": 1.0}),
        (TIED, {"temperature": 1.0, "top_k": 2}),  # the first two of three equals
        (TIED, {"temperature": 1.0, "top_k": 5}),
        (TIED, {"temperature": 1.0, "top_p": 0.4}),
        (TIED, {"temperature": 1.0, "top_k": 4, "top_p": 0.6}),
        (MASKED, {"temperature": 1.0}),
        (MASKED, {"temperature": 1.0, "top_k": 6}),
        (MASKED, {"temperature": 1.0, "top_k": 3, "top_p": 0.7}),
        (MASKED, {"temperature": 1.0, "top_p": 0.999999}),
        ([NO, 3.0, NO, NO], {"temperature": 1.0}),
        ([NO, 3.0, NO, NO], {"temperature": 1.0, "top_k": 2, "top_p": 0.9}),
        ([1e4, 1e4, -1e4, NO], {"temperature": 1.0}),
    ],
)
def test_draws_are_of_the_exact_distribution(logits, settings):
    assert likelihood(draws(logits, **settings), distribution(logits, **settings)) > UNLIKELY


def test_draws_of_another_distribution_are_told_apart():
    assert likelihood(draws(LOGITS, temperature=1.0), distribution(LOGITS, temperature=1.1)) < UNLIKELY
    with pytest.raises(AssertionError, match="a token that cannot be"):
        likelihood(draws(LOGITS, temperature=1.0), distribution(LOGITS, top_p=0.9))


def of_positions(**settings) -> np.ndarray:
    """Draws of the one row of a batch at one position after the other."""
    logits, positions = np.broadcast_to(LOGITS, (DRAWS, 1, len(LOGITS))), np.arange(DRAWS)[:, None]
    sampler = Sampler.create(Sampling(max_new_tokens=1, **settings))
    choose = jax.jit(lambda sampler, *of: jax.vmap(functools.partial(sampler, argmax=argmax))(*of))
    return np.asarray(choose(sampler, jnp.asarray(logits, jnp.float32), jnp.asarray(positions)))[:, 0]


def of_rows(**settings) -> np.ndarray:
    """Draws of the rows of a batch at one position."""
    return sampled(np.tile(LOGITS, (DRAWS, 1)), np.full(DRAWS, 7), **settings)


@pytest.mark.parametrize("draw", [of_positions, of_rows])
def test_positions_and_rows_draw_independently(draw):
    """Each draw by itself is of the distribution, and with the next one of the product of two."""
    tokens = draw(temperature=1.0, seed=3)
    chances = distribution(LOGITS)
    assert likelihood(tokens, chances) > UNLIKELY
    pairs = tokens[::2] * len(LOGITS) + tokens[1::2]
    assert likelihood(pairs, np.outer(chances, chances).ravel()) > UNLIKELY


@pytest.mark.parametrize("settings", [{}, {"top_k": 6, "top_p": 0.97}], ids=["plain", "filtered"])
def test_seeds_draw_independently_and_a_seed_draws_the_same_again(settings):
    one, other = (draws(LOGITS, temperature=1.0, seed=seed, **settings) for seed in (0, 1))
    chances = distribution(LOGITS, **settings)
    assert likelihood(one * len(LOGITS) + other, np.outer(chances, chances).ravel()) > UNLIKELY
    np.testing.assert_array_equal(draws(LOGITS, temperature=1.0, seed=0, **settings), one)


def test_a_row_draws_the_same_whatever_stands_beside_it():
    rows = np.random.default_rng(0).normal(size=(5, 64))
    together = sampled(rows, np.arange(5), temperature=1.0, seed=2)
    for batch in range(1, 5):
        np.testing.assert_array_equal(
            sampled(rows[:batch], np.arange(batch), temperature=1.0, seed=2), together[:batch]
        )


def test_greedy_is_the_first_of_the_highest_whatever_the_seed():
    for seed in (0, 1):
        np.testing.assert_array_equal(sampled([TIED, MASKED, LOGITS], [0, 5, 9], seed=seed), [0, 2, 2])


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 512), (1, 4097)], ids=str)
def test_the_likeliest_is_the_first_of_the_highest(shape):
    """Of few different numbers, so that most rows have several highest."""
    logits = np.random.default_rng(0).integers(-3, 3, shape).astype(np.float32)
    found = jax.jit(argmax)(logits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(logits, axis=-1))


def test_infinities_and_what_is_no_number():
    rows = [[NO, NO, 1.0], [NO] * 3, [2.0, np.inf, np.inf], [-0.0, 0.0, -1.0]]
    np.testing.assert_array_equal(argmax(jnp.asarray(rows)), [2, 0, 1, 0])
    assert 0 <= int(argmax(jnp.full((5,), jnp.nan))) < 5
