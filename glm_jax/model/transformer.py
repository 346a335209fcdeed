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
from glm_jax.configs.notebook import html_table
from glm_jax.errors import InputError, ShardingError
from glm_jax.kernels import Ops, check_ops, ops_for, ops_for_platform
from glm_jax.layers.context import ForwardContext
from glm_jax.layers.embedding import Embedding, Head
from glm_jax.layers.linear import project
from glm_jax.layers.norm import RmsNorm
from glm_jax.layers.rope import rotation
from glm_jax.model import stack
from glm_jax.model.cache import Cache
from glm_jax.model.decoder_layer import DecoderLayer, MtpLayer
from glm_jax.model.summary import summary_rows
from glm_jax.sharding import (
    PackedBfloat16,
    Rules,
    all_gather_dim,
    axes_of,
    batch_sharding,
    default_mesh,
    map_weights,
    shift_left,
    short_repr,
    with_shardings,
)
from glm_jax.sharding.rules import mesh_of
from glm_jax.sharding.weight import initial_value

DTYPES = ("bfloat16", "float16", "float32")


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
        mtp_logits: float32 [B, T - 1, V], position t predicting token t + 2; None unless asked for.
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

    __repr__ = short_repr


class Transformer(nnx.Module):
    """A decoder of any configuration. The constructor builds it abstractly, with stacked groups, in bfloat16."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.rules = Rules()  # of the placement; those of `create` and `load` stand here when the weights have values
        self.ops = ops_for_platform("reference")  # likewise, those of the mesh
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
        return with_layer_layout(model, stacked=model.ops.stacked_layers if stacked is None else stacked)

    @property
    def dtype(self) -> Any:
        """The dtype of the activations."""
        return self.embedding.weight.get_raw_value().dtype

    @property
    def weights_dtype(self) -> Any:
        """The dtype of the weights that are not quantised: bfloat16 on a CPU, too, where activations are float32."""
        value = self.embedding.weight.get_raw_value()
        return jnp.dtype(jnp.bfloat16) if isinstance(value, PackedBfloat16) else value.dtype

    @property
    def mesh(self) -> Mesh:
        """The mesh that the weights lie on."""
        return mesh_of(self.embedding)  # as all of them do; the whole tree takes long to walk

    def __repr__(self) -> str:
        rows = summary_rows(self, self.config, self.ops)
        return "\n".join([f"Transformer({self.config.model_type})", *(f"  {name:<12}{text}" for name, text in rows)])

    def _repr_html_(self) -> str:
        return html_table(f"Transformer({self.config.model_type})", summary_rows(self, self.config, self.ops))

    def __call__(self, tokens: Any, *, mtp: bool = False, ops: Ops | None = None) -> Output:
        """Return the logits of every position of tokens int32 [B, T].

        Called with arrays it compiles once per shape and enters the model's mesh; inside a user's own jit or grad it
        is traced like any function, under the mesh that is set there.

        Args:
            tokens: [B, T] token ids.
            mtp: also run the MTP layer.
            ops: the operations to use, by default the model's own (`glm_jax.kernels.ops_for`).

        Raises:
            InputError: tokens are not [B, T] of at least one, out of the vocabulary, or longer than the positions.
        """
        check_ops(ops)
        if mtp and self.mtp is None:
            raise InputError("this model has no MTP layer (num_mtp_layers is 0)")
        if isinstance(tokens, jax.core.Tracer):
            return forward(self, tokens, mtp=mtp, ops=ops)
        tokens = check_tokens(tokens, self.config)
        mesh = self.mesh
        with jax.set_mesh(mesh):
            placed = jax.device_put(tokens, batch_sharding(len(tokens), mesh, self.rules, length=tokens.shape[1]))
            return _forward_jit(self, placed, mtp=mtp, ops=ops)

    def hidden_states(
        self, tokens: jax.Array, *, context: ForwardContext, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """Run tokens [B, T] through the decoder, without MTP and head.

        Returns the hidden states [B, T, D] after the final norm, the cache with this pass's tokens, and the experts
        chosen in each MoE layer, int32 [L, B, T, K].
        """
        x, ids = self.embedding(tokens), None
        dense, moe = (None, None) if cache is None else (cache.dense, cache.moe)
        if self.dense is not None:
            x, dense, _ = stack.run(self.dense, x, context, dense)
        if self.moe is not None:
            x, moe, ids = stack.run(self.moe, x, context, moe)
        return self.final_norm(x), None if cache is None else Cache(dense, moe, cache.mtp), ids

    def logits(self, hidden: jax.Array, *, ops: Ops | None = None) -> jax.Array:
        """Hidden states [B, T, D] -> float32 logits [B, T, V]."""
        head = self.embedding if self.head is None else self.head
        return project(hidden, head.weight[...], self.ops if ops is None else ops, dtype=jnp.float32)

    def context(
        self, positions: jax.Array, *, prefill: bool, ops: Ops | None = None, remat: bool = False
    ) -> ForwardContext:
        """What all layers share in a pass over `positions` [B, T], by default with the model's own operations."""
        ops, rotary = self.ops if ops is None else ops, rotation(positions, self.config.attention.rope)
        dispatch = ops.dispatch or self.rules.dispatch
        return ForwardContext(positions, rotary, prefill=prefill, ops=ops, dispatch=dispatch, remat=remat)


def forward(
    model: Transformer,
    tokens: jax.Array,
    *,
    mtp: bool,
    ops: Ops | None = None,
    routing: bool = False,
    remat: bool = False,
    keep_last: bool = False,
) -> Output:
    """The forward pass over whole sequences, as a pure function to trace.

    Args:
        model: with values.
        tokens: int32 [B, T].
        mtp: also run the MTP layer.
        ops: the operations to use, by default the model's own.
        routing: also return the experts chosen.
        remat: the backward pass recomputes each layer from its input.
        keep_last: where sequences are split over devices, leave the MTP results with T positions, of which the last
            means nothing. Without it, all devices get all positions.
    """
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    context = model.context(positions, prefill=True, ops=ops, remat=remat)
    hidden, _, ids = model.hidden_states(tokens, context=context)
    logits = model.logits(hidden, ops=ops)
    mtp_logits, mtp_hidden = (logits[:, :0], hidden[:, :0]) if mtp else (None, None)
    mtp_ids: jax.Array | None = None
    if mtp and tokens.shape[1] > 1:
        assert model.mtp is not None
        split = axes_of(tokens, 1)
        if split:  # a split sequence keeps its length
            following = jax.sharding.reshard(shift_left(tokens, 1), jax.typeof(tokens).sharding.spec)
        else:
            following, positions = tokens[:, 1:], positions[:, :-1]
        context = model.context(positions, prefill=True, ops=ops, remat=remat)
        before = hidden if split else hidden[:, :-1]
        mtp_hidden, mtp_ids = run_mtp(model, model.embedding(following), before, context)
        mtp_logits = model.logits(mtp_hidden, ops=ops)
        if split and not keep_last:
            results = (mtp_logits, mtp_hidden, mtp_ids)
            mtp_logits, mtp_hidden, mtp_ids = (all_gather_dim(result, 1)[:, :-1] for result in results)
    return Output(logits, hidden, mtp_logits, mtp_hidden, *((ids, mtp_ids) if routing else (None, None)))


def run_mtp(
    model: Transformer, embedded: jax.Array, hidden: jax.Array, context: ForwardContext
) -> tuple[jax.Array, Any]:
    """The MTP layer over whole sequences, its hidden states and the experts chosen."""

    def run(mtp: Any, embedded: jax.Array, hidden: jax.Array) -> tuple[jax.Array, Any]:
        out, _, ids = mtp(embedded, hidden, context, None)
        return out, ids

    return (jax.checkpoint(run) if context.remat else run)(model.mtp, embedded, hidden)


_forward_jit = jax.jit(forward, static_argnames=("mtp", "ops"))


def _group(config: ModelConfig, count: int, *, experts: bool) -> DecoderLayer | None:
    return stack.stack_abstract(DecoderLayer(config, experts=experts), count) if count else None


def runtime_model(config: ModelConfig, mesh: Mesh, *, dtype: Any = None, rules: Rules | None = None) -> Transformer:
    """The abstract model that a run holds: without the MTP copies, as the mesh's platform holds the run's dtype.

    Raises:
        InputError: a dtype that no model computes in.
        ShardingError: rules of another type.
    """
    check_run_dtype(dtype)
    check_rules(rules)
    model, ops = Transformer(dataclasses.replace(config, mtp_copies=())), ops_for(mesh)
    model = ops.storage.prepare(model, dtype)
    model.rules, model.ops = rules or Rules(), ops
    return model


def with_layer_layout(model: Transformer, *, stacked: bool) -> Transformer:
    """The model with both groups stacked or both unrolled; arrays keep their sharding, abstract weights stay so."""
    turn = stack.stack if stacked else stack.unroll
    copy = jax.tree.map(lambda leaf: leaf, model)
    for name in ("dense", "moe"):
        group = getattr(model, name)
        if group is not None:
            abstract = isinstance(jax.tree.leaves(group)[0], jax.ShapeDtypeStruct)
            setattr(copy, name, turn(group) if abstract else jax.jit(turn)(group))
    return copy


def check_run_dtype(dtype: Any) -> None:
    """Check a run's dtype, None being the platform's own.

    Raises:
        InputError: it is none, or none that a model computes in; quantised weights are another matter.
    """
    try:
        known = dtype is None or jnp.dtype(dtype) in map(jnp.dtype, DTYPES)
    except TypeError:
        known = False
    if not known:
        raise InputError(
            f"dtype {dtype!r} is none that a model computes in; right would be one of {', '.join(map(repr, DTYPES))} "
            "(quantised weights stay as they are stored, whatever the dtype)"
        )


def check_rules(rules: object) -> None:
    """Check that rules of the placement are such, or None.

    Raises:
        ShardingError: they are not, such as the name of a preset.
    """
    if not isinstance(rules, Rules | None):
        raise ShardingError(
            f"rules {rules!r} are no Rules; right would be glm_jax.Rules(...), or of a preset "
            "glm_jax.sharding.rules_named('serve_latency')"
        )


def check_tokens(tokens: Any, config: ModelConfig) -> np.ndarray:
    """Return tokens as int32 [B, T] on the host.

    Raises:
        InputError: the shape, the type or a value is wrong.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise InputError("tokens must be [batch, length]; the sequences given have different lengths") from None
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
