"""The whole model: embedding, dense layers, MoE layers, final norm, head, and the MTP layer beside them.

A `Transformer` is a value. Constructed, it is abstract: every weight holds its shape and dtype only, in milliseconds
for 355B parameters. `create`, or the loader of `glm_jax.checkpoint`, gives the weights values on a mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from glm_jax.configs import ModelConfig
from glm_jax.errors import InputError
from glm_jax.layers import embedding as embedding_layer
from glm_jax.layers.embedding import Embedding, Head
from glm_jax.layers.norm import RmsNorm
from glm_jax.layers.rope import rotation
from glm_jax.layers.step import Kernels, Step
from glm_jax.model import stack
from glm_jax.model.cache import Cache
from glm_jax.model.decoder_layer import DecoderLayer, MtpLayer
from glm_jax.sharding import (
    QuantizedArray,
    Rules,
    ahead,
    axes_of,
    batch_sharding,
    default_mesh,
    initial_value,
    map_weights,
    mesh_of,
    whole,
    with_bits,
    with_dtype,
    with_shardings,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "hidden", "mtp_logits", "mtp_hidden", "expert_ids", "mtp_expert_ids"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Output:
    """One forward pass.

    Attributes:
        logits: float32 [B, T, V].
        hidden: [B, T, D], after the final norm.
        mtp_logits: float32 [B, T - 1, V], row t predicting token t + 2; None unless asked for.
        mtp_hidden: [B, T - 1, D], what these are made of: the MTP layer's output, normalised for the head.
        expert_ids: the experts that each MoE layer chose, int32 [L, B, T, K]; None unless asked for.
        mtp_expert_ids: those of the MTP layer, int32 [B, T - 1, K].
    """

    logits: jax.Array
    hidden: jax.Array
    mtp_logits: jax.Array | None
    mtp_hidden: jax.Array | None = None
    expert_ids: jax.Array | None = None
    mtp_expert_ids: jax.Array | None = None


class Transformer(nnx.Module):
    """A decoder of any configuration. The constructor builds it abstractly, with stacked groups, in bfloat16."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.rules = Rules()  # of the placement; those of `create` and `load` stand here when the weights have values
        self.notes: tuple[str, ...] = ()  # what was decided when the weights were loaded, in sentences
        self.embedding = Embedding(config)
        self.dense = _group(config, config.num_dense_layers, experts=False)
        self.moe = _group(config, config.num_moe_layers, experts=True)
        self.final_norm = RmsNorm(config.embed_dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else Head(config)
        self.mtp = MtpLayer(config) if config.num_mtp_layers else None

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        *,
        mesh: Mesh | None = None,
        seed: int = 0,
        dtype: Any = None,
        stacked: bool | None = None,
        rules: Rules | None = None,
    ) -> Transformer:
        """Return a model with random weights on a mesh.

        Args:
            config: the architecture.
            mesh: where the weights lie; over all devices by default.
            seed: each weight draws from a stream of its own, the same on every mesh.
            dtype: of all weights but the pinned ones; by default float32 on CPU and bfloat16 elsewhere.
            stacked: scan over the layers (True) or unroll them (False); by default what the platform decodes best.
            rules: placement of logical axes.

        Raises:
            ShardingError: the mesh does not divide the model.
        """
        mesh = default_mesh(config) if mesh is None else mesh
        abstract = runtime_model(config, mesh, dtype=dtype, rules=rules)
        placed = with_shardings(abstract, mesh, abstract.rules)

        with jax.set_mesh(mesh):
            key = jax.random.key(seed)
            model = map_weights(lambda name, weight: initial_value(name, weight, key), placed)
        return in_form(model, stacked=platform_stacks(mesh) if stacked is None else stacked)

    @property
    def dtype(self) -> Any:
        """The dtype of the activations."""
        return self.embedding.weight.get_raw_value().dtype

    @property
    def weights_dtype(self) -> Any:
        """The dtype of the weights that are not quantised: bfloat16 on a CPU, too, where activations are float32."""
        value = self.embedding.weight.get_raw_value()
        return jnp.dtype(jnp.bfloat16) if isinstance(value, QuantizedArray) else value.dtype

    @property
    def mesh(self) -> Mesh:
        """The mesh that the weights lie on."""
        return mesh_of(self.embedding)  # as all of them do; the whole tree takes long to walk

    def __call__(self, tokens: Any, *, mtp: bool = False, kernels: Kernels | None = None) -> Output:
        """Return the logits of every position of tokens int32 [B, T].

        Called with arrays it compiles once per shape and enters the model's mesh; inside a user's own jit or grad it
        is traced like any function, under the mesh that is set there.

        Args:
            tokens: [B, T] token ids.
            mtp: also run the MTP layer.
            kernels: named implementations, by default the platform's.

        Raises:
            InputError: tokens are not [B, T] of at least one, out of the vocabulary, or longer than the positions.
        """
        kernels = kernels or Kernels()
        if mtp and self.mtp is None:
            raise InputError("this model has no MTP layer (num_mtp_layers is 0)")
        if isinstance(tokens, jax.core.Tracer):
            return forward(self, tokens, mtp=mtp, kernels=kernels)
        tokens = check_tokens(tokens, self.config)
        mesh = self.mesh
        with jax.set_mesh(mesh):
            placed = jax.device_put(tokens, batch_sharding(len(tokens), mesh, self.rules, length=tokens.shape[1]))
            return _forward_jit(self, placed, mtp=mtp, kernels=kernels)

    def hidden_states(
        self, tokens: jax.Array, *, step: Step, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """Run tokens [B, T] through the decoder, without MTP and head.

        Returns the hidden states [B, T, D] after the final norm, the cache with this pass's rows, and the experts
        chosen in each MoE layer, int32 [L, B, T, K].
        """
        x, ids = self.embedding(tokens), None
        dense, moe = (None, None) if cache is None else (cache.dense, cache.moe)
        if self.dense is not None:
            x, dense, _ = stack.run(self.dense, x, step, dense)
        if self.moe is not None:
            x, moe, ids = stack.run(self.moe, x, step, moe)
        return self.final_norm(x), None if cache is None else Cache(dense, moe, cache.mtp), ids

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] -> float32 logits [B, T, V]."""
        head = self.embedding if self.head is None else self.head
        return embedding_layer.logits(hidden, head.weight[...])

    def step(self, positions: jax.Array, *, fresh: bool, kernels: Kernels, remat: bool = False) -> Step:
        """What all layers share in a pass over `positions` [B, T]."""
        if kernels.dispatch is None:
            kernels = dataclasses.replace(kernels, dispatch=self.rules.dispatch)
        rotary = rotation(positions, self.config.attention.rope)
        return Step(positions, rotary, fresh=fresh, kernels=kernels, remat=remat)


def forward(
    model: Transformer,
    tokens: jax.Array,
    *,
    mtp: bool,
    kernels: Kernels,
    routing: bool = False,
    remat: bool = False,
    keep_rows: bool = False,
) -> Output:
    """The forward pass over whole sequences, as a pure function to trace.

    Args:
        model: with values.
        tokens: int32 [B, T].
        mtp: also run the MTP layer.
        kernels: named implementations.
        routing: also return the experts chosen.
        remat: in the backward pass compute each layer anew instead of keeping what it made.
        keep_rows: where sequences are split over devices, leave the MTP results with T rows, of which the last means
            nothing: without it, all devices would get all of them.
    """
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    hidden, _, ids = model.hidden_states(tokens, step=model.step(positions, fresh=True, kernels=kernels, remat=remat))
    logits = model.logits(hidden)
    mtp_logits, mtp_hidden = (logits[:, :0], hidden[:, :0]) if mtp else (None, None)
    mtp_ids: jax.Array | None = None
    if mtp and tokens.shape[1] > 1:
        assert model.mtp is not None
        split = axes_of(tokens, 1)
        if split:  # a split sequence keeps its length
            following = jax.sharding.reshard(ahead(tokens, 1), jax.typeof(tokens).sharding.spec)
        else:
            following, hidden_before, positions = tokens[:, 1:], hidden[:, :-1], positions[:, :-1]
        step = model.step(positions, fresh=True, kernels=kernels, remat=remat)
        before = hidden if split else hidden_before
        mtp_hidden, mtp_ids = run_mtp(model, model.embedding(following), before, step)
        mtp_logits = model.logits(mtp_hidden)
        if split and not keep_rows:
            mtp_logits, mtp_hidden, mtp_ids = (whole(rows, 1)[:, :-1] for rows in (mtp_logits, mtp_hidden, mtp_ids))
    return Output(logits, hidden, mtp_logits, mtp_hidden, *((ids, mtp_ids) if routing else (None, None)))


def run_mtp(model: Transformer, embedded: jax.Array, hidden: jax.Array, step: Step) -> tuple[jax.Array, Any]:
    """The MTP layer over whole sequences, its hidden states and the experts chosen."""

    def run(mtp: Any, embedded: jax.Array, hidden: jax.Array) -> tuple[jax.Array, Any]:
        out, _, ids = mtp(embedded, hidden, step, None)
        return out, ids

    return (jax.checkpoint(run) if step.remat else run)(model.mtp, embedded, hidden)


_forward_jit = jax.jit(forward, static_argnames=("mtp", "kernels"))


def _group(config: ModelConfig, count: int, *, experts: bool) -> DecoderLayer | None:
    return stack.stack_abstract(DecoderLayer(config, experts=experts), count) if count else None


def runtime_model(config: ModelConfig, mesh: Mesh, *, dtype: Any = None, rules: Rules | None = None) -> Transformer:
    """The abstract model that a run holds: without the MTP copies, in the run's dtype, with the run's rules."""
    platform = mesh.devices.flat[0].platform
    dtype = (jnp.float32 if platform == "cpu" else jnp.bfloat16) if dtype is None else dtype
    model = Transformer(dataclasses.replace(config, mtp_copies=()))
    on_cpu_in_bfloat16 = platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16
    model = with_bits(model) if on_cpu_in_bfloat16 else with_dtype(model, dtype)
    model.rules = rules or Rules()
    return model


def platform_stacks(mesh: Mesh) -> bool:
    """Whether the platform decodes best from stacked groups (TPU) or from unrolled ones (GPU, CPU)."""
    return mesh.devices.flat[0].platform == "tpu"


def in_form(model: Transformer, *, stacked: bool) -> Transformer:
    """The model with both groups stacked or both unrolled; arrays keep their sharding, abstract weights stay so."""
    turn = stack.stack if stacked else stack.unroll
    copy = jax.tree.map(lambda leaf: leaf, model)
    for name in ("dense", "moe"):
        group = getattr(model, name)
        if group is not None:
            abstract = isinstance(jax.tree.leaves(group)[0], jax.ShapeDtypeStruct)
            setattr(copy, name, turn(group) if abstract else jax.jit(turn)(group))
    return copy


def check_tokens(tokens: Any, config: ModelConfig) -> np.ndarray:
    """Return tokens as int32 [B, T] on the host.

    Raises:
        InputError: the shape, the type or a value is wrong.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise InputError("tokens must be [batch, length]; the rows given have different lengths") from None
    if array.ndim != 2 or 0 in array.shape or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"tokens must be integers [batch, length], at least one of each; got {array.dtype} {array.shape}"
        )
    if array.shape[1] > config.max_positions:
        raise InputError(f"{array.shape[1]} tokens exceed the model's {config.max_positions} positions")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"token {wrong} is outside the vocabulary 0..{config.vocab_size - 1}")
    return array.astype(np.int32)
