"""Greedy speculative decoding with the model's own MTP layer: the compiled programs, and the count of what they gain.

A round verifies k drafts in one pass of the main model over k + 1 tokens a sequence, keeps those that it would have
chosen itself and one token more, and drafts the next k. The tokens are therefore the main model's own choices.

Entry t of the MTP layer's cache comes from the hidden state of token t and the embedding of token t + 1. A first draft
needs main hidden states only. Further ones feed the layer its own output, which is normalised for the head (the
un-normalised one loses nearly all of them): their entries are guesses. Every round rewrites the entries of the k + 1
tokens that it verified, from the main model's hidden states; guessed and rejected entries lie among them or beyond the
sequence's position, where no query looks, until the next round overwrites them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.inference.runner import pace, place_prompts
from glm_jax.kernels import Ops
from glm_jax.model import Cache, Transformer, create_cache
from glm_jax.sharding import select_token, shift_left
from glm_jax.sharding.host_arrays import to_host

MAX_IN_FLIGHT = 2  # calls: each is longer than what happens between two, and the second may be behind the end


class SpeculativeState(NamedTuple):
    """Where a batch of sequences stands.

    Attributes:
        cache: of all tokens before `positions`, those of the MTP layer included.
        tokens: int32 [B], the newest token of each sequence, not yet in the cache.
        positions: int32 [B], its position.
        drafts: int32 [B, k], the tokens guessed to follow it.
    """

    cache: Cache
    tokens: jax.Array
    positions: jax.Array
    drafts: jax.Array


class Speculator:
    """Runs the compiled programs of speculation with `drafts` drafts a round, beside `Runner` for plain decoding.

    Attributes:
        model: on its mesh.
        drafts: of the MTP layer in a round.
        rounds_per_call: rounds that are one program.
        max_in_flight: calls on their way while the tokens of the first are read.
    """

    def __init__(
        self, model: Transformer, drafts: int, *, ops: Ops | None = None, steps_per_call: int | None = None
    ) -> None:
        """As many rounds are one program as may give `steps_per_call` tokens, by default what suits the operations."""
        ops = model.ops if ops is None else ops
        self.model, self.drafts = model, drafts
        steps, in_flight = pace(ops, steps_per_call)
        self.rounds_per_call, self.max_in_flight = -(-steps // (drafts + 1)), min(in_flight, MAX_IN_FLIGHT)
        self._leaves, structure = jax.tree.flatten(model)
        self._programs = _programs(structure, ops, drafts)

    def prefill(self, prompts: list[list[int]], *, padded_length: int, cache_length: int) -> SpeculativeState:
        """Run prompts, padded to a common length, into a new cache; choose their first tokens and draft the next."""
        placed = place_prompts(self.model, prompts, padded_length)
        with jax.set_mesh(self.model.mesh):
            cache = create_cache(self.model, len(prompts), cache_length, mtp=True)
            return SpeculativeState(*self._programs.prefill(self._leaves, *placed, cache))

    def decode(self, state: SpeculativeState, *, rounds: int) -> tuple[SpeculativeState, np.ndarray, np.ndarray]:
        """Take `rounds` rounds. Donates the state.

        Returns:
            The new state, the tokens that the main model chose, int32 [rounds, B, k + 1], and how many of the drafts
            it accepted, int32 [rounds, B]: with a drafts accepted, the first a + 1 tokens of a sequence are new ones.
        """
        state, taken = self.start(state, rounds=rounds)
        return state, *self.fetch(taken)

    def start(self, state: SpeculativeState, *, rounds: int) -> tuple[SpeculativeState, list[jax.Array]]:
        """As `decode`, but without waiting for the tokens: `fetch` makes them arrays."""
        with jax.set_mesh(self.model.mesh):
            if self.rounds_per_call > 1:
                after, taken = self._programs.decode(self._leaves, *state, rounds)
                return SpeculativeState(*after), [taken]
            each = []
            for _ in range(rounds):
                after, taken = self._programs.round(self._leaves, *state)
                state = SpeculativeState(*after)
                each.append(taken)
            return state, each

    def fetch(self, taken: list[jax.Array]) -> tuple[np.ndarray, np.ndarray]:
        """What rounds that were started chose, int32 [rounds, B, k + 1], and accepted, int32 [rounds, B]."""
        rounds = np.concatenate([to_host(each).reshape(-1, *each.shape[-2:]) for each in taken])
        return rounds[..., :-1], rounds[..., -1]


class _Programs(NamedTuple):
    prefill: Any
    round: Any
    decode: Any


@functools.lru_cache(maxsize=16)
def _programs(structure: Any, ops: Ops, count: int) -> _Programs:
    """The jitted functions over the leaves of models of one structure, for `count` drafts a round."""

    def choose(model, hidden):
        """The likeliest token int32 [B, T] after each hidden state [B, T, D]."""
        return ops.argmax.by_row(model.logits(hidden, ops=ops))

    def prefill(leaves, tokens, lengths, cache):
        model = jax.tree.unflatten(structure, leaves)
        positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        context = model.context(positions, prefill=True, ops=ops)
        hidden, cache, _ = model.hidden_states(tokens, context=context, cache=cache)
        first = choose(model, select_token(hidden, lengths - 1))
        # The MTP layer sees the tokens shifted by one, the token just chosen after each prompt's last.
        following = jnp.where(positions == lengths[:, None] - 1, first, shift_left(tokens, 1))
        drafts, cache = draft(model, context, (following, hidden, lengths - 1), cache)
        return cache, first[:, 0], lengths, drafts

    def draft(model, context, states, cache):
        """Run the MTP layer over the main model's (following tokens, hidden states, index of the last of them)."""
        following, hidden, last = states
        state, mtp, _ = model.mtp(model.embedding(following), hidden, context, cache.mtp, query_index=last)
        drafts = [choose(model, state)]
        position = context.positions[:, :1] + last[:, None]
        for distance in range(1, count):
            after = model.context(position + distance, prefill=False, ops=ops)
            state, mtp, _ = model.mtp(model.embedding(drafts[-1]), state, after, mtp)
            drafts.append(choose(model, state))
        return jnp.concatenate(drafts, axis=1), dataclasses.replace(cache, mtp=mtp)

    def round_(leaves, cache, tokens, positions, drafts):
        model = jax.tree.unflatten(structure, leaves)
        tokens = jnp.concatenate([tokens[:, None], drafts], axis=1)
        positions_BT = positions[:, None] + jnp.arange(count + 1, dtype=jnp.int32)
        context = model.context(positions_BT, prefill=False, ops=ops)
        hidden, cache, _ = model.hidden_states(tokens, context=context, cache=cache)
        chosen = choose(model, hidden)
        accepted = jnp.sum(jnp.cumprod((drafts == chosen[:, :-1]).astype(jnp.int32), axis=1), axis=1)
        drafts, cache = draft(model, context, (chosen, hidden, accepted), cache)
        # The token at index `accepted` of each sequence, without a gather, whose layout jax cannot tell.
        newest = jnp.sum(jnp.where(jnp.arange(count + 1) == accepted[:, None], chosen, 0), axis=1)
        return (cache, newest, positions + accepted + 1, drafts), jnp.concatenate([chosen, accepted[:, None]], axis=1)

    def decode(leaves, cache, tokens, positions, drafts, rounds):
        def body(state, _):
            return round_(leaves, *state)

        return jax.lax.scan(body, (cache, tokens, positions, drafts), length=rounds)

    return _Programs(
        prefill=jax.jit(prefill, donate_argnums=3),
        round=jax.jit(round_, donate_argnums=1),
        decode=jax.jit(decode, static_argnums=5, donate_argnums=1),
    )
