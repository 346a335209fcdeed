"""The compiled programs of generation: prefill of padded prompts, and decode steps.

Prompts are padded on the right to a common bucket. What padding writes into the cache is never seen: a query sees the
rows up to its own position only, and decoding overwrites them one by one.

A model of many unrolled layers is a tree of thousands of nodes. The runner flattens it once and hands the compiled
programs the flat list, so that a decode step does not walk the tree.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from glm_jax.inference.sampling import Sampler
from glm_jax.inference.turned import Forms
from glm_jax.layers.step import Kernels
from glm_jax.model import Cache, Transformer, abstract_cache, create_cache
from glm_jax.sharding import batch_sharding, take_position
from glm_jax.sharding.host_arrays import to_devices, to_host

STEPS_PER_CALL = 16  # elsewhere than on a CPU
CPU_IN_FLIGHT = 4  # single steps: enough to hide what happens between them


class DecodeState(NamedTuple):
    """Where a batch of sequences stands.

    Attributes:
        cache: rows of all tokens before `positions`.
        tokens: int32 [B], the newest token of each sequence, not yet in the cache.
        positions: int32 [B], its position.
    """

    cache: Cache
    tokens: jax.Array
    positions: jax.Array


class Runner:
    """Runs one model's compiled programs on its mesh. The only part of generation that touches arrays."""

    def __init__(
        self, model: Transformer, *, kernels: Kernels | None = None, steps_per_call: int | None = None
    ) -> None:
        """`steps_per_call` is by default what suits the platform."""
        self.model = model
        self.mesh = model.mesh
        self._forms = Forms(model, functools.partial(_programs, kernels=kernels or Kernels()))
        self.pace = Pace.of(self.mesh, steps_per_call)

    def prefill(self, prompts: list[list[int]], sampler: Sampler, *, padded_length: int, room: int) -> DecodeState:
        """Run prompts, padded to a common length, into a new cache of `room` rows and choose their first tokens."""
        placed = place_prompts(self.model, prompts, padded_length)
        with jax.set_mesh(self.mesh):
            cache = create_cache(self.model, len(prompts), room)
            leaves, programs = self._forms.plain
            return programs.prefill(leaves, *placed, cache, sampler)

    def decode(self, state: DecodeState, sampler: Sampler, *, steps: int) -> tuple[DecodeState, np.ndarray]:
        """Take `steps` decode steps; returns the new state and the new tokens int32 [steps, B]. Donates the state."""
        state, tokens = self.start(state, sampler, steps=steps)
        return state, self.fetch(tokens)

    def start(self, state: DecodeState, sampler: Sampler, *, steps: int) -> tuple[DecodeState, list[jax.Array]]:
        """As `decode`, but without waiting for the tokens: `fetch` makes them an array."""
        leaves, programs = self._forms.of(state.tokens.size)
        with jax.set_mesh(self.mesh):
            if self.pace.steps > 1:
                after, tokens = programs.decode(leaves, *state, sampler, steps)
                return DecodeState(*after), [tokens]
            taken = []
            for _ in range(steps):
                state = DecodeState(*programs.decode_one(leaves, *state, sampler))
                taken.append(state.tokens)
            return state, taken

    def fetch(self, tokens: list[jax.Array]) -> np.ndarray:
        """The tokens of steps that were started, int32 [steps, B]."""
        return np.concatenate([np.atleast_2d(to_host(each)) for each in tokens])

    def lower_prefill(self, batch: int, sampler: Sampler, *, padded_length: int, room: int) -> Any:
        """What `prefill` compiles for so many prompts, lowered; the model may be abstract."""
        tokens, lengths = abstract_prompts(self.model, batch, padded_length)
        leaves, programs = self._forms.plain
        with jax.set_mesh(self.mesh):
            cache = abstract_cache(self.model, batch, room)
            return programs.prefill.lower(leaves, tokens, lengths, cache, sampler)

    def lower_decode(self, batch: int, sampler: Sampler, *, room: int) -> Any:
        """What a call of decoding compiles for so many sequences, lowered; the model may be abstract."""
        _, each = abstract_prompts(self.model, batch, room)
        leaves, programs = self._forms.plain
        with jax.set_mesh(self.mesh):
            cache = abstract_cache(self.model, batch, room)
            if self.pace.steps > 1:
                return programs.decode.lower(leaves, cache, each, each, sampler, self.pace.steps)
            return programs.decode_one.lower(leaves, cache, each, each, sampler)


@dataclasses.dataclass(frozen=True)
class Pace:
    """How many steps are taken.

    Attributes:
        steps: of decoding, or rounds of speculation, that are one program, by whose end their tokens come. Together
            they start fewer programs; on a CPU XLA runs what is in a loop part by part, so that only a small model
            gains by it.
        in_flight: calls that are on their way while the results of the first are looked at. What runs on behind a stop
            token is wasted: elsewhere than on a CPU, where calls are of many steps, they go one at a time.
    """

    steps: int
    in_flight: int

    @classmethod
    def of(cls, mesh: Mesh, steps: int | None = None) -> Pace:
        """What suits a mesh's platform; `steps` where the caller knows better."""
        if mesh.devices.flat[0].platform != "cpu":
            return cls(steps or STEPS_PER_CALL, 1)
        steps = steps or 1
        return cls(steps, max(2, CPU_IN_FLIGHT // steps))


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
def _programs(structure: Any, kernels: Kernels) -> Programs:
    """The jitted programs of models of one structure; shapes are left to jit's own cache."""
    plain = programs(structure, kernels)
    return Programs(
        prefill=jax.jit(plain.prefill, donate_argnums=3),
        decode=jax.jit(plain.decode, static_argnums=5, donate_argnums=1),
        decode_one=jax.jit(plain.decode_one, donate_argnums=1),
    )


def programs(structure: Any, kernels: Kernels) -> Programs:
    """The programs of models of one structure, as functions to compile."""

    def prefill(leaves, tokens, lengths, cache, sampler):
        model = jax.tree.unflatten(structure, leaves)
        positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        step = model.step(positions, fresh=True, kernels=kernels)
        hidden, cache, _ = model.hidden_states(tokens, step=step, cache=cache)
        last = take_position(hidden, lengths - 1)
        return DecodeState(cache, sampler(model.logits(last)[:, 0], lengths), lengths)

    def decode_one(leaves, cache, tokens, positions, sampler):
        model = jax.tree.unflatten(structure, leaves)
        step = model.step(positions[:, None], fresh=False, kernels=kernels)
        hidden, cache, _ = model.hidden_states(tokens[:, None], step=step, cache=cache)
        return cache, sampler(model.logits(hidden)[:, 0], positions + 1), positions + 1

    def decode(leaves, cache, tokens, positions, sampler, steps):
        def body(state, _):
            # The weights are closed over, not carried, and the cache is donated: it is written in place.
            state = decode_one(leaves, state[0], state[1], state[2], sampler)
            return state, state[1]

        return jax.lax.scan(body, (cache, tokens, positions), length=steps)

    return Programs(prefill, decode, decode_one)
