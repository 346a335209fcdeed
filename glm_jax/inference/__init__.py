"""Generation: compiled prefill and decode, sampling, one batch at a time."""

from __future__ import annotations

from glm_jax.inference.config import Sampling
from glm_jax.inference.generate import generate, stream

__all__ = ["Sampling", "generate", "stream"]
