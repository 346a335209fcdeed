from __future__ import annotations

import numpy as np
import pytest

import glm_jax
from glm_jax.checkpoint.divergence import divergence, fits
from tests import published


def test_the_divergence_of_two_checkpoints(tmp_path):
    """Against its definition in numpy; zero for a checkpoint and itself, more for fewer bits."""
    source = published.checkpoint(tmp_path / "hf", dtype="float32")
    other = published.checkpoint(tmp_path / "other", dtype="float32", seed=1)
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    p, q = (np.asarray(glm_jax.load(d)(tokens).logits, np.float64) for d in (source, other))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    assert divergence(source, other, tokens) == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert divergence(source, source) == pytest.approx(0, abs=1e-6)
    found = []
    for method in ("int8", "fp8", "int4"):
        glm_jax.convert(source, tmp_path / method, quantize=method)
        found.append(divergence(source, tmp_path / method))
    assert 0 < found[0] < found[1] < found[2]
    assert fits(glm_jax.configs.from_hf(source))
