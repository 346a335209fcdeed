"""The likeliest token is the first of the highest, on a CPU as elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.reference import argmax as likeliest


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 512), (1, 4097)], ids=str)
def test_it_is_the_first_of_the_highest(shape):
    """Of few different numbers, so that most rows have several highest."""
    logits = np.random.default_rng(0).integers(-3, 3, shape).astype(np.float32)
    found = jax.jit(likeliest)(logits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(logits, axis=-1))


def test_infinities_and_what_is_no_number():
    rows = [[-np.inf, -np.inf, 1.0], [-np.inf] * 3, [2.0, np.inf, np.inf], [-0.0, 0.0, -1.0]]
    np.testing.assert_array_equal(likeliest(jnp.asarray(rows)), [2, 0, 1, 0])
    assert 0 <= int(likeliest(jnp.full((5,), jnp.nan))) < 5
