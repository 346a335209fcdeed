"""Greedy speculative decoding with the model's own MTP layer: the compiled programs, and the count of what they gain.

A round verifies k drafts in one pass of the main model over k + 1 tokens a sequence, keeps those that it would have
chosen itself and one token more, and drafts the next k. The tokens are therefore the main model's own choices.

Row t of the MTP layer's cache comes from the hidden state of token t and the embedding of token t + 1. A first draft
needs main hidden states only. Further ones feed the layer its own output, which is normalised for the head (the
un-normalised one loses nearly all of them): their rows are guesses. Every round writes the rows of the k + 1 tokens
that it verified anew, from the main model's hidden states; guessed and rejected rows lie among them or beyond the
sequence's position, where no query looks, until the next round overwrites them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.inference.runner import Pace, place_prompts
from glm_jax.inference.sampling import likeliest
from glm_jax.inference.turned import Compiled, Forms
from glm_jax.layers.step import Kernels
from glm_jax.model import Cache, Transformer, create_cache
from glm_jax.sharding import ahead, take_position
from glm_jax.sharding.host_arrays import to_host

MAX_IN_FLIGHT = 2  # calls: each is longer than what happens between two; the second may be behind the end
SMALL_ROUNDS = 2  # a round of a small model is no longer than the start of a program; its tokens come in bunches anyway


class SpeculativeState(NamedTuple):
    """Where a batch of sequences stands.

    Attributes:
        cache: rows of all tokens before `positions`, those of the MTP layer included.
        tokens: int32 [B], the newest token of each sequence, not yet in the cache.
        positions: int32 [B], its position.
        drafts: int32 [B, k], the tokens guessed to follow it.
    """

    cache: Cache
    tokens: jax.Array
    positions: jax.Array
    drafts: jax.Array


class Speculator:
    """Runs the compiled programs of speculation with `drafts` drafts a round, beside `Runner` for plain decoding."""

    def __init__(
        self,
        model: Transformer,
        drafts: int,
        *,
        kernels: Kernels | None = None,
        steps_per_call: int | None = None,
    ) -> None:
        """`steps_per_call` is by default what suits the model, its platform and the number of sequences."""
        self.model, self.drafts = model, drafts
        self.mesh = model.mesh
        programs = functools.partial(_programs, kernels=kernels or Kernels(), count=drafts)
        self._forms = Forms(model, programs)
        pace = Pace.of(self.mesh, steps_per_call)
        self._pace = Pace(-(-pace.steps // (drafts + 1)), min(pace.in_flight, MAX_IN_FLIGHT))
        self._small = self._pace if steps_per_call else Pace(SMALL_ROUNDS, MAX_IN_FLIGHT)

    def pace(self, batch: int) -> Pace:
        """How rounds of so many sequences are taken."""
        return self._pace if self._form(batch) is self._forms.plain else self._small

    def prefill(self, prompts: list[list[int]], *, padded_length: int, room: int) -> SpeculativeState:
        """Run prompts, padded to a common length, into a new cache of `room` rows; choose and draft their tokens."""
        placed = place_prompts(self.model, prompts, padded_length)
        with jax.set_mesh(self.mesh):
            cache = create_cache(self.model, len(prompts), room, mtp=True)
            leaves, programs = self._forms.plain
            return SpeculativeState(*programs.prefill(leaves, *placed, cache))

    def decode(self, state: SpeculativeState, *, rounds: int) -> tuple[SpeculativeState, np.ndarray, np.ndarray]:
        """Take `rounds` rounds. Donates the state.

        Returns:
            The new state, the tokens that the main model chose, int32 [rounds, B, k + 1], and how many of the drafts
            it accepted, int32 [rounds, B]: with a drafts accepted, the first a + 1 tokens of a row are new ones.
        """
        state, taken = self.start(state, rounds=rounds)
        return state, *self.fetch(taken)

    def start(self, state: SpeculativeState, *, rounds: int) -> tuple[SpeculativeState, list[jax.Array]]:
        """As `decode`, but without waiting for the tokens: `fetch` makes them arrays."""
        batch = state.tokens.size
        leaves, programs = self._form(batch)
        with jax.set_mesh(self.mesh):
            if self.pace(batch).steps > 1:
                after, taken = programs.decode(leaves, *state, rounds)
                return SpeculativeState(*after), [taken]
            each = []
            for _ in range(rounds):
                after, taken = programs.round(leaves, *state)
                state = SpeculativeState(*after)
                each.append(taken)
            return state, each

    def fetch(self, taken: list[jax.Array]) -> tuple[np.ndarray, np.ndarray]:
        """What rounds that were started chose, int32 [rounds, B, k + 1], and accepted, int32 [rounds, B]."""
        rounds = np.concatenate([to_host(each).reshape(-1, *each.shape[-2:]) for each in taken])
        return rounds[..., :-1], rounds[..., -1]

    def _form(self, batch: int) -> Compiled[_Programs]:
        """The model as rounds of so many sequences take it, with their programs."""
        return self._forms.of(batch * (self.drafts + 1), mtp=batch > 1)


class _Programs(NamedTuple):
    prefill: Any
    round: Any
    decode: Any


@functools.lru_cache(maxsize=16)
def _programs(structure: Any, kernels: Kernels, count: int) -> _Programs:
    """The jitted functions over the leaves of models of one structure, for `count` drafts a round."""

    def prefill(leaves, tokens, lengths, cache):
        model = jax.tree.unflatten(structure, leaves)
        positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        step = model.step(positions, fresh=True, kernels=kernels)
        hidden, cache, _ = model.hidden_states(tokens, step=step, cache=cache)
        first = _likeliest(model, take_position(hidden, lengths - 1))
        # The MTP layer sees the tokens shifted by one, the token just chosen after each prompt's last.
        following = jnp.where(positions == lengths[:, None] - 1, first, ahead(tokens, 1))
        drafts, cache = draft(model, step, (following, hidden, lengths - 1), cache)
        return cache, first[:, 0], lengths, drafts

    def draft(model, step, rows, cache):
        """Run the MTP layer over the main model's rows (following tokens, hidden states, index of the last of them)."""
        following, hidden, last = rows
        state, mtp, _ = model.mtp(model.embedding(following), hidden, step, cache.mtp, only=last)
        drafts = [_likeliest(model, state)]
        position = step.positions[:, :1] + last[:, None]
        for distance in range(1, count):
            after = model.step(position + distance, fresh=False, kernels=kernels)
            state, mtp, _ = model.mtp(model.embedding(drafts[-1]), state, after, mtp)
            drafts.append(_likeliest(model, state))
        return jnp.concatenate(drafts, axis=1), dataclasses.replace(cache, mtp=mtp)

    def round_(leaves, cache, tokens, positions, drafts):
        model = jax.tree.unflatten(structure, leaves)
        tokens = jnp.concatenate([tokens[:, None], drafts], axis=1)
        step = model.step(positions[:, None] + jnp.arange(count + 1, dtype=jnp.int32), fresh=False, kernels=kernels)
        hidden, cache, _ = model.hidden_states(tokens, step=step, cache=cache)
        chosen = _likeliest(model, hidden)
        accepted = jnp.sum(jnp.cumprod((drafts == chosen[:, :-1]).astype(jnp.int32), axis=1), axis=1)
        drafts, cache = draft(model, step, (chosen, hidden, accepted), cache)
        # The token at index `accepted` of each row, without a gather: jax cannot tell the layout of one over rows.
        newest = jnp.sum(jnp.where(jnp.arange(count + 1) == accepted[:, None], chosen, 0), axis=1)
        # Both in one array: each that is handed to the host takes some of the microseconds of a small model's round.
        taken = jnp.concatenate([chosen, accepted[:, None]], axis=1)
        return (cache, newest, positions + accepted + 1, drafts), taken

    def decode(leaves, cache, tokens, positions, drafts, rounds):
        def body(state, _):
            return round_(leaves, *state)

        return jax.lax.scan(body, (cache, tokens, positions, drafts), length=rounds)

    return _Programs(
        prefill=jax.jit(prefill, donate_argnums=3),
        round=jax.jit(round_, donate_argnums=1),
        decode=jax.jit(decode, static_argnums=5, donate_argnums=1),
    )


def _likeliest(model: Transformer, hidden: jax.Array) -> jax.Array:
    """The likeliest token int32 [B, T] after each hidden state [B, T, D]."""
    return likeliest(model.logits(hidden))
