"""How far a quantised checkpoint's predictions are from those of the one it was made of, on one sample."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.checkpoint.load import load
from glm_jax.configs import ModelConfig
from glm_jax.model import count_parameters

SAMPLE_TOKENS = 64
_MEMORY_SHARE = 0.25  # of what is free, that two models in float32 may take


def fits(config: ModelConfig) -> bool:
    """Whether two models of an architecture, in float32, fit this machine's free memory with room to spare."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * count_parameters(config).total <= _MEMORY_SHARE * free


def divergence(
    reference: str | Path, other: str | Path, tokens: Any = None, *, allow_unknown: Collection[str] = ()
) -> float:
    """The Kullback-Leibler divergence of the next token's distribution, in nats, as a mean over a sample's positions.

    Args:
        reference: a checkpoint directory of either kind.
        other: one of the same architecture.
        tokens: int32 [B, T]; by default one sequence of `SAMPLE_TOKENS` drawn by a fixed seed.
        allow_unknown: keys of either config.json to pass over although they may change what the model computes.
    """
    first = load(reference, quantized="dequantize", dtype="float32", allow_unknown=allow_unknown)
    if tokens is None:
        length = min(SAMPLE_TOKENS, first.config.max_positions)
        tokens = np.random.default_rng(0).integers(0, first.config.vocab_size, (1, length)).astype(np.int32)
    expected = jax.nn.log_softmax(jnp.asarray(np.asarray(first(tokens).logits)))
    del first
    second = load(other, quantized="dequantize", dtype="float32", allow_unknown=allow_unknown)
    found = jax.nn.log_softmax(jnp.asarray(np.asarray(second(tokens).logits)))
    return float(jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)))
