"""Prefill and decode with given tokens, written against the model alone: what generation must be equal to."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from glm_jax.kernels import Ops
from glm_jax.model import create_cache
from glm_jax.sharding import batch_sharding


@functools.partial(jax.jit, static_argnames=("prefill", "ops"), donate_argnames="cache")
def run(model: Any, tokens: jax.Array, positions: jax.Array, cache: Any, *, prefill: bool, ops: Ops) -> Any:
    """Logits [B, T, V] of tokens [B, T] at their positions, and the cache with their rows."""
    context = model.context(positions, prefill=prefill, ops=ops)
    hidden, cache, _ = model.hidden_states(tokens, context=context, cache=cache)
    return model.logits(hidden, ops=ops), cache


def teacher_forced(model: Any, tokens: np.ndarray, lengths: np.ndarray, *, ops: Ops | None = None) -> np.ndarray:
    """Logits of every position of tokens [B, T]: `lengths` of each row by prefill, the others one by one.

    Rows decode at different positions at the same time; what lies beyond a row's end is not part of the result (NaN).
    """
    batch, total = tokens.shape
    result = np.full((batch, total, model.config.vocab_size), np.nan, np.float32)

    def place(rows: np.ndarray) -> jax.Array:
        return jax.device_put(rows, batch_sharding(batch, model.mesh, model.rules, length=rows.shape[1]))

    with jax.set_mesh(model.mesh):
        cache = create_cache(model, batch, total)
        longest = int(lengths.max())
        prompt = np.where(np.arange(longest) < lengths[:, None], tokens[:, :longest], 0)
        positions = np.broadcast_to(np.arange(longest), prompt.shape)
        logits, cache = run(model, place(prompt), place(positions.astype(np.int32)), cache, prefill=True, ops=ops)
        logits = np.asarray(logits)
        for row, length in enumerate(lengths):
            result[row, :length] = logits[row, :length]
        for offset in range(total - int(lengths.min())):
            at = np.minimum(lengths + offset, total - 1).astype(np.int32)
            new = np.take_along_axis(tokens, at[:, None], axis=1)
            logits, cache = run(model, place(new), place(at[:, None]), cache, prefill=False, ops=ops)
            result[np.arange(batch), at] = np.asarray(logits)[:, 0]
    return result
