"""Token embedding and output head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.configs import ModelConfig
from glm_jax.layers.linear import few_rows, precision_of, project
from glm_jax.sharding import (
    Normal,
    QuantizedArray,
    TurnedArray,
    WeightArray,
    apart_axes,
    declare,
    multiply_apart,
    spread_outputs,
    take_rows,
)


class Embedding(nnx.Module):
    """A table [V, D] whose rows are looked up. Its rows are replicated, so that the look-up stays local."""

    def __init__(self, config: ModelConfig):
        shape, initializer = (config.vocab_size, config.embed_dim), Normal(config.initializer_range)
        self.weight = declare(shape, (None, "embed"), initializer=initializer, bits=True)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B, T] -> embeddings [B, T, D]."""
        table = self.weight[...]
        if apart := apart_axes(table, 1):
            return spread_outputs(lambda t, w: _take(w, t), tokens, table, apart=apart, dimension=1)
        return _take(table, tokens)


def _take(table: WeightArray, tokens: jax.Array) -> jax.Array:
    if not isinstance(table, QuantizedArray):
        return take_rows(table, tokens)
    return QuantizedArray(take_rows(table.values, tokens), None).dequantize()  # bits: it is never quantised otherwise


class Head(nnx.Module):
    """The output projection [V, D], split over the vocabulary."""

    def __init__(self, config: ModelConfig):
        shape, initializer = (config.vocab_size, config.embed_dim), Normal(config.initializer_range)
        self.weight = declare(shape, ("vocab", "embed"), initializer=initializer, bits=True)


def logits(x: jax.Array, weight: WeightArray | TurnedArray) -> jax.Array:
    """Hidden states [B, T, D] and a head or embedding [V, D] -> float32 logits [B, T, V]."""
    if isinstance(weight, TurnedArray):
        return project(x, weight)
    values = weight.values if isinstance(weight, QuantizedArray) else weight
    if apart := apart_axes(weight, 1):
        return multiply_apart(logits, x, weight, apart=apart, layout=((x, 0), (x, 1), (values, 0)))
    if isinstance(weight, QuantizedArray) or few_rows(x):
        return project(x, weight)
    return jnp.einsum("btd,vd->btv", x, weight, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
