"""Choosing the next token, inside the compiled step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from glm_jax.inference.config import Sampling
from glm_jax.sharding import axes_of
from glm_jax.sharding.rules import spec_of

Argmax = Callable[[jax.Array], jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "key"],
    meta_fields=["greedy", "filtered"],
)
@dataclasses.dataclass(frozen=True)
class Sampler:
    """The settings of a batch as arrays, so that other values need no new compilation.

    `greedy` and `filtered` are part of the program: without a temperature nothing is drawn, without top_k and top_p
    nothing is sorted.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    key: jax.Array
    greedy: bool
    filtered: bool

    @classmethod
    def create(cls, sampling: Sampling) -> Sampler:
        """The sampler of one set of settings for the whole batch."""
        return cls(
            temperature=jnp.float32(sampling.temperature),
            top_k=jnp.int32(min(sampling.top_k, 2**31 - 1)),
            top_p=jnp.float32(sampling.top_p),
            key=jax.random.key(sampling.seed),
            greedy=sampling.greedy,
            filtered=sampling.top_k > 0 or sampling.top_p < 1,
        )

    def __call__(self, logits: jax.Array, positions: jax.Array, *, argmax: Argmax) -> jax.Array:
        """Choose tokens int32 [B] from float32 logits [B, V]; `positions` [B] are those that the tokens will have.

        `argmax` is the operation of the pass.
        """
        if self.greedy:
            return argmax(logits)
        logits = _whole_vocabulary(logits) / self.temperature
        order = None
        if self.filtered:
            order = jnp.argsort(logits, axis=-1, descending=True)
            logits = self._filter(jnp.take_along_axis(logits, order, axis=-1))
        index = jnp.zeros_like(positions) + jnp.arange(positions.shape[0])
        noise = jax.vmap(lambda i, position: _gumbel(self.key, i, position, logits.shape[-1]))(index, positions)
        choice = argmax(logits + noise)
        if order is not None:
            chosen = jnp.arange(order.shape[-1]) == choice[:, None]
            choice = jnp.sum(jnp.where(chosen, order, 0), axis=-1)
        return choice.astype(jnp.int32)

    def _filter(self, logits: jax.Array) -> jax.Array:
        """Set what top_k and top_p exclude to -inf, of logits sorted from high to low; the first always stays."""
        ranks = jnp.arange(logits.shape[-1])
        in_top_k = (ranks < self.top_k) | (self.top_k == 0)
        probabilities = jax.nn.softmax(jnp.where(in_top_k, logits, -jnp.inf), axis=-1)
        reached_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        return jnp.where(in_top_k & (reached_before < self.top_p), logits, -jnp.inf)


def _gumbel(key: jax.Array, sequence: jax.Array, position: jax.Array, size: int) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, sequence), position), (size,))


def _whole_vocabulary(logits: jax.Array) -> jax.Array:
    """The logits with the whole vocabulary on each device: jax cannot sort along a dimension that is split."""
    if jax.sharding.get_abstract_mesh().empty:
        return logits
    return jax.reshard(logits, spec_of(axes_of(logits, 0), None))
