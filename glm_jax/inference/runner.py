"""The compiled programs of generation: prefill of padded prompts, and decode steps.

Prompts are padded on the right to a common bucket. What padding writes into the cache is never seen: a query sees the
tokens up to its own position only, and decoding overwrites the padding one by one.

A model of many unrolled layers is a tree of thousands of nodes. The runner flattens it once and hands the compiled
programs the flat list, so that a decode step does not walk the tree.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.inference.sampling import Sampler
from glm_jax.kernels import Ops
from glm_jax.model import Cache, Transformer, abstract_cache, create_cache
from glm_jax.sharding import batch_sharding, select_token
from glm_jax.sharding.host_arrays import to_devices, to_host


class DecodeState(NamedTuple):
    """Where a batch of sequences stands.

    Attributes:
        cache: of all tokens before `positions`.
        tokens: int32 [B], the newest token of each sequence, not yet in the cache.
        positions: int32 [B], its position.
    """

    cache: Cache
    tokens: jax.Array
    positions: jax.Array


class Runner:
    """Runs one model's compiled programs on its mesh. The only part of generation that touches arrays.

    Attributes:
        model: on its mesh.
        steps_per_call: decode steps that are one program, by whose end their tokens come.
        max_in_flight: calls on their way while the tokens of the first are read. What runs on behind a stop token is
            wasted, so that calls of many steps go one at a time.
    """

    def __init__(self, model: Transformer, *, ops: Ops | None = None, steps_per_call: int | None = None) -> None:
        """`ops` are by default the model's own, and `steps_per_call` is what suits them."""
        ops = model.ops if ops is None else ops
        self.model = model
        self.steps_per_call, self.max_in_flight = pace(ops, steps_per_call)
        self._leaves, structure = jax.tree.flatten(model)
        self._programs = _programs(structure, ops)

    def prefill(
        self, prompts: list[list[int]], sampler: Sampler, *, padded_length: int, cache_length: int
    ) -> DecodeState:
        """Run prompts, padded to a common length, into a new cache and choose their first tokens."""
        placed = place_prompts(self.model, prompts, padded_length)
        with jax.set_mesh(self.model.mesh):
            cache = create_cache(self.model, len(prompts), cache_length)
            return self._programs.prefill(self._leaves, *placed, cache, sampler)

    def decode(self, state: DecodeState, sampler: Sampler, *, steps: int) -> tuple[DecodeState, np.ndarray]:
        """Take `steps` decode steps; returns the new state and the new tokens int32 [steps, B]. Donates the state."""
        state, tokens = self.start(state, sampler, steps=steps)
        return state, self.fetch(tokens)

    def start(self, state: DecodeState, sampler: Sampler, *, steps: int) -> tuple[DecodeState, list[jax.Array]]:
        """As `decode`, but without waiting for the tokens: `fetch` makes them an array."""
        with jax.set_mesh(self.model.mesh):
            if self.steps_per_call > 1:
                after, tokens = self._programs.decode(self._leaves, *state, sampler, steps)
                return DecodeState(*after), [tokens]
            taken = []
            for _ in range(steps):
                state = DecodeState(*self._programs.decode_one(self._leaves, *state, sampler))
                taken.append(state.tokens)
            return state, taken

    def fetch(self, tokens: list[jax.Array]) -> np.ndarray:
        """The tokens of steps that were started, int32 [steps, B]."""
        return np.concatenate([np.atleast_2d(to_host(each)) for each in tokens])

    def lower_prefill(self, batch: int, sampler: Sampler, *, padded_length: int, cache_length: int) -> Any:
        """What `prefill` compiles for so many prompts, lowered; the model may be abstract."""
        tokens, lengths = abstract_prompts(self.model, batch, padded_length)
        with jax.set_mesh(self.model.mesh):
            cache = abstract_cache(self.model, batch, cache_length)
            return self._programs.prefill.lower(self._leaves, tokens, lengths, cache, sampler)

    def lower_decode(self, batch: int, sampler: Sampler, *, cache_length: int) -> Any:
        """What a call of decoding compiles for so many sequences, lowered; the model may be abstract."""
        _, each = abstract_prompts(self.model, batch, cache_length)
        with jax.set_mesh(self.model.mesh):
            cache = abstract_cache(self.model, batch, cache_length)
            if self.steps_per_call > 1:
                return self._programs.decode.lower(self._leaves, cache, each, each, sampler, self.steps_per_call)
            return self._programs.decode_one.lower(self._leaves, cache, each, each, sampler)


def pace(ops: Ops, steps_per_call: int | None) -> tuple[int, int]:
    """Steps a call, the platform's or the caller's, and calls in flight.

    On a platform of single steps so many calls are in flight as have its number of steps, at least two; on others one.
    """
    steps = steps_per_call or ops.steps_per_call
    return steps, max(2, ops.max_in_flight // steps) if ops.max_in_flight > 1 else 1


def abstract_prompts(model: Transformer, batch: int, length: int) -> tuple[Any, Any]:
    """The shapes and shardings of tokens [B, length] and of one int32 a sequence [B], on a model's mesh."""
    mesh, rules = model.mesh, model.rules
    of_tokens = batch_sharding(batch, mesh, rules, length=length)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=of_tokens)
    return tokens, jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=batch_sharding(batch, mesh, rules))


def place_prompts(model: Transformer, prompts: list[list[int]], padded_length: int) -> tuple[jax.Array, jax.Array]:
    """The prompts padded on the right, int32 [B, padded_length], and their lengths [B], on the model's mesh."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), padded_length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    batch, mesh, rules = len(prompts), model.mesh, model.rules
    of_tokens = batch_sharding(batch, mesh, rules, length=padded_length)
    return to_devices(tokens, of_tokens), to_devices(lengths, batch_sharding(batch, mesh, rules))


class Programs(NamedTuple):
    """The programs of generation, to be traced: each takes the leaves of a model first.

    Attributes:
        prefill: (leaves, tokens [B, T], lengths [B], cache, sampler) -> DecodeState; consumes the cache.
        decode: (leaves, cache, tokens [B], positions [B], sampler, steps) -> state, tokens [steps, B]; consumes the
            cache.
        decode_one: (leaves, cache, tokens [B], positions [B], sampler) -> cache, tokens, positions; consumes the cache.
    """

    prefill: Any
    decode: Any
    decode_one: Any


@functools.lru_cache(maxsize=16)
def _programs(structure: Any, ops: Ops) -> Programs:
    """The jitted programs of models of one structure; shapes are left to jit's own cache."""
    plain = programs(structure, ops)
    return Programs(
        prefill=jax.jit(plain.prefill, donate_argnums=3),
        decode=jax.jit(plain.decode, static_argnums=5, donate_argnums=1),
        decode_one=jax.jit(plain.decode_one, donate_argnums=1),
    )


def programs(structure: Any, ops: Ops) -> Programs:
    """The programs of models of one structure, as functions to compile."""

    def prefill(leaves, tokens, lengths, cache, sampler):
        model = jax.tree.unflatten(structure, leaves)
        positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        context = model.context(positions, prefill=True, ops=ops)
        hidden, cache, _ = model.hidden_states(tokens, context=context, cache=cache)
        logits = model.logits(select_token(hidden, lengths - 1), ops=ops)
        return DecodeState(cache, sampler(logits[:, 0], lengths, argmax=ops.argmax.by_row), lengths)

    def decode_one(leaves, cache, tokens, positions, sampler):
        model = jax.tree.unflatten(structure, leaves)
        context = model.context(positions[:, None], prefill=False, ops=ops)
        hidden, cache, _ = model.hidden_states(tokens[:, None], context=context, cache=cache)
        logits = model.logits(hidden, ops=ops)
        return cache, sampler(logits[:, 0], positions + 1, argmax=ops.argmax.by_row), positions + 1

    def decode(leaves, cache, tokens, positions, sampler, steps):
        def body(state, _):
            # The weights are closed over, not carried, and the cache is donated: it is written in place.
            state = decode_one(leaves, state[0], state[1], state[2], sampler)
            return state, state[1]

        return jax.lax.scan(body, (cache, tokens, positions), length=steps)

    return Programs(prefill, decode, decode_one)
