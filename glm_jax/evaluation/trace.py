"""A model's residual stream, layer by layer, on the host.

Each layer runs by itself, so that no more than one layer's activations are held and a layer can be given another
input than the one before it left: the reference's, which shows what this layer alone does.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.layers.context import ForwardContext
from glm_jax.model import Output, Transformer, stack
from glm_jax.model.decoder_layer import DecoderLayer, MtpLayer
from glm_jax.model.transformer import check_tokens, forward
from glm_jax.sharding import batch_sharding, short_repr

EMBEDDING, FINAL_NORM, MTP = "embedding", "final norm", "MTP layer"


def layer_name(number: int) -> str:
    """What decoder layer `number` is called in a trace."""
    return f"layer {number}"


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a pass over tokens [B, T] left behind.

    Attributes:
        stream: float32 [B, T, D] by place, in the order of the pass: after the embedding, after each decoder layer,
            after the final norm, and, [B, T - 1, D], after the MTP layer and its norm.
        experts: the experts chosen, integers [B, T, K], by the place of each layer that has a router.
    """

    stream: dict[str, np.ndarray]
    experts: dict[str, np.ndarray]

    __repr__ = short_repr


def trace(model: Transformer, tokens: Any, *, mtp: bool = False, given: Trace | None = None) -> Trace:
    """Run tokens [B, T] through the model, recording after each layer.

    Args:
        model: with stacked or unrolled layers, on any mesh.
        tokens: [B, T] token ids.
        mtp: also run the MTP layer, if there is more than one token.
        given: every layer starts from what stands before its place there, instead of from the layer before it.

    Raises:
        InputError: the tokens are not the model's.
    """
    tokens = check_tokens(tokens, model.config)
    placing = batch_sharding(tokens.shape[0], model.mesh, model.rules)
    recorded = Trace({}, {})

    def record(place: str, x: jax.Array, experts: jax.Array | None = None) -> jax.Array:
        recorded.stream[place] = np.asarray(x.astype(jnp.float32))
        if experts is not None:
            recorded.experts[place] = np.asarray(experts)
        return x if given is None else jax.device_put(jnp.asarray(given.stream[place], model.dtype), placing)

    with jax.set_mesh(model.mesh):
        ids = jax.device_put(tokens, placing)
        x = record(EMBEDDING, _embed(model, ids))
        context = _context(model, ids)
        number = 0
        for group in (model.dense, model.moe):
            for layer in stack.layers(group):
                x = record(layer_name(number), *_run_layer(layer, x, context))
                number += 1
        x = record(FINAL_NORM, _final_norm(model, x))
        if mtp and tokens.shape[1] > 1:
            assert model.mtp is not None
            embedded = recorded.stream[EMBEDDING] if given is None else given.stream[EMBEDDING]
            after = jax.device_put(jnp.asarray(embedded[:, 1:], model.dtype), placing)
            record(MTP, *_run_mtp(model.mtp, after, x[:, :-1], _context(model, ids[:, :-1])))
    return recorded


@dataclasses.dataclass(frozen=True)
class WholePass:
    """What the model as it is used, one compiled program, makes of tokens [B, T].

    Attributes:
        logits: float32 [B, T, V].
        mtp_logits: float32 [B, T - 1, V], None unless asked for.
        experts: as in `Trace`.
    """

    logits: np.ndarray
    mtp_logits: np.ndarray | None
    experts: dict[str, np.ndarray]


def whole_pass(model: Transformer, tokens: Any, *, mtp: bool = False) -> WholePass:
    """Run tokens [B, T] through the whole model at once.

    Raises:
        InputError: the tokens are not the model's.
    """
    tokens = check_tokens(tokens, model.config)
    with jax.set_mesh(model.mesh):
        placed = jax.device_put(tokens, batch_sharding(tokens.shape[0], model.mesh, model.rules))
        out = _forward(model, placed, mtp=mtp)
    experts = {}
    if out.expert_ids is not None:
        first = model.config.num_dense_layers
        experts = {layer_name(first + i): ids for i, ids in enumerate(np.asarray(out.expert_ids))}
    if out.mtp_expert_ids is not None:
        experts[MTP] = np.asarray(out.mtp_expert_ids)
    return WholePass(np.asarray(out.logits), None if out.mtp_logits is None else np.asarray(out.mtp_logits), experts)


def first_attention(model: Transformer, given: np.ndarray, *, interleaved: bool) -> np.ndarray:
    """What the first layer's attention makes of the stream `given` [B, T, D], with either order of rotary pairs."""
    placing = batch_sharding(given.shape[0], model.mesh, model.rules)
    with jax.set_mesh(model.mesh):
        context = _context(model, jax.device_put(np.zeros(given.shape[:2], np.int32), placing))
        context = dataclasses.replace(context, rotation=dataclasses.replace(context.rotation, interleaved=interleaved))
        layer = next(layer for group in (model.dense, model.moe) for layer in stack.layers(group))
        x = jax.device_put(jnp.asarray(given, model.dtype), placing)
        return np.asarray(_attend(layer, x, context).astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("mtp",))
def _forward(model: Transformer, tokens: jax.Array, *, mtp: bool) -> Output:
    return forward(model, tokens, mtp=mtp, routing=True)


def _context(model: Transformer, tokens: jax.Array) -> ForwardContext:
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return model.context(positions, prefill=True)


@jax.jit
def _embed(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model.embedding(tokens)


@jax.jit
def _run_layer(layer: DecoderLayer, x: jax.Array, context: ForwardContext) -> tuple[jax.Array, jax.Array | None]:
    x, _, experts = layer(x, context, None, None)
    return x, experts


@jax.jit
def _final_norm(model: Transformer, x: jax.Array) -> jax.Array:
    return model.final_norm(x)


@jax.jit
def _run_mtp(
    layer: MtpLayer, embedded: jax.Array, hidden: jax.Array, context: ForwardContext
) -> tuple[jax.Array, jax.Array | None]:
    x, _, experts = layer(embedded, hidden, context, None)
    return x, experts


@jax.jit
def _attend(layer: DecoderLayer, x: jax.Array, context: ForwardContext) -> jax.Array:
    return layer.attention(layer.attention_norm(x), context, None, None)[0]
