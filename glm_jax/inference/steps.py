"""The two compiled programs of generation: prefill of padded prompts, and several decode steps in one call.

Prompts are padded on the right to a common bucket. What padding writes into the cache is never seen: a query sees the
rows up to its own position only, and decoding overwrites them one by one.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from glm_jax.inference.sampling import Sampler
from glm_jax.layers.step import Kernels
from glm_jax.model import Cache, Transformer


@functools.partial(jax.tree_util.register_dataclass, data_fields=["cache", "tokens", "positions"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where a batch of sequences stands.

    Attributes:
        cache: rows of all tokens before `positions`.
        tokens: int32 [B], the newest token of each sequence, not yet in the cache.
        positions: int32 [B], its position.
    """

    cache: Cache
    tokens: jax.Array
    positions: jax.Array


@functools.partial(jax.jit, static_argnames="kernels", donate_argnames="cache")
def prefill(
    model: Transformer, tokens: jax.Array, lengths: jax.Array, cache: Cache, sampler: Sampler, *, kernels: Kernels
) -> DecodeState:
    """Run prompts [B, T], right-padded, of `lengths` [B] into an empty cache and choose the first new tokens."""
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    step = model.step(positions, fresh=True, kernels=kernels)
    hidden, cache = model.hidden_states(tokens, step=step, cache=cache)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return DecodeState(cache, sampler(model.logits(last)[:, 0], lengths), lengths)


@functools.partial(jax.jit, static_argnames=("steps", "kernels"), donate_argnames="state")
def decode(
    model: Transformer, state: DecodeState, sampler: Sampler, *, steps: int, kernels: Kernels
) -> tuple[DecodeState, jax.Array]:
    """Take `steps` decode steps; returns the new state and the new tokens int32 [steps, B].

    The weights are closed over, not carried, and the cache is donated: it is written in place.
    """

    def body(state: DecodeState, _) -> tuple[DecodeState, jax.Array]:
        step = model.step(state.positions[:, None], fresh=False, kernels=kernels)
        hidden, cache = model.hidden_states(state.tokens[:, None], step=step, cache=state.cache)
        positions = state.positions + 1
        tokens = sampler(model.logits(hidden)[:, 0], positions)
        return DecodeState(cache, tokens, positions), tokens

    return jax.lax.scan(body, state, length=steps)
