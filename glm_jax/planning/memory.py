"""Bytes on each device, by part.

Weights, cache, gradients and optimizer are counted exactly: they are the arrays that a run holds between its steps, or
passes from one half of a step to the other. Activations and the buffers of collectives are estimates of what a compiled
step needs beside them: the widest moment of a layer, in the forms of `glm_jax.layers` that keep nothing they need not
(grouped products over the chosen experts, scores in blocks). Training is estimated with each layer recomputed in the
backward pass.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from glm_jax.configs import GqaConfig
from glm_jax.kernels import ops_for_platform
from glm_jax.kernels.attention import QUERY_BLOCK
from glm_jax.layers.dispatch import GATHER, SLACK, choose_dispatch
from glm_jax.model import Transformer
from glm_jax.planning.job import DECODE, TRAIN, Job
from glm_jax.planning.placement import Placement, cache_parts, nbytes
from glm_jax.sharding import weights_by_name
from glm_jax.sharding.rules import batch_axes, length_axes
from glm_jax.training.optimizer import MUON, OptimizerConfig, build_optimizer, optimizer_labels

SCORE_BYTES = 4  # scores and logits are float32
LOGIT_COPIES = 3  # of training: the logits, their exponentials, their gradient
UPDATE_COPIES = 3  # of a weight while Muon turns its momentum: iterate, its product, the update


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes of one device by part."""

    weights: int
    cache: int
    gradients: int
    optimizer: int
    activations: int
    collectives: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Shares:
    """What one device sees of a job's tokens.

    Attributes:
        batch: sequences that its attention works on.
        tokens: tokens of these in one step.
        gathered: tokens of all devices whose experts work on the same ones.
        exchanged: rows that its experts get where only those are sent that they are for; None where all are gathered.
        batch_axes: the mesh axes over which the batch is split.
        token_axes: these, and those over which the tokens of a sequence are split.
        cache_axes: the mesh axes over which the rows of a sequence's cache are split.
        shared_axes: those of the tokens' axes that split the experts, too.
        repeats: how many devices repeat the same sequences because the batch does not divide.
    """

    batch: int
    tokens: int
    gathered: int
    exchanged: int | None
    batch_axes: tuple[str, ...]
    token_axes: tuple[str, ...]
    cache_axes: tuple[str, ...]
    shared_axes: tuple[str, ...]
    repeats: int


def shares(job: Job, placement: Placement) -> Shares:
    """Return what each device of a mesh sees of a job's tokens."""
    axes = batch_axes(job.batch, placement.mesh, job.rules)
    batch = job.batch // placement.devices(axes)
    experts, choices = job.rules.mesh_axes("expert"), job.config.moe.num_experts_per_token
    along, kept = (length_axes(job.batch, n, placement.mesh, job.rules) for n in (job.queries, job.length))
    shared = tuple(axis for axis in (*axes, *along) if axis in experts)
    tokens = batch * job.queries // placement.devices(along)
    gathered, way = tokens * placement.devices(shared), job.rules.dispatch
    if way is None:  # accelerators alike
        way = choose_dispatch(ops_for_platform("gpu").exchange, tokens * choices, placement.devices(shared))
    return Shares(
        batch=batch,
        tokens=tokens,
        gathered=gathered,
        exchanged=None if way == GATHER else gathered * choices // placement.devices(experts),
        batch_axes=axes,
        token_axes=(*axes, *along),
        cache_axes=() if job.kind == TRAIN else kept,
        shared_axes=shared,
        repeats=placement.devices(job.rules.batch) // placement.devices(axes),
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What the optimizer of `glm_jax.training` keeps and does.

    Attributes:
        kept: by weight, bytes a number for each array that is laid out like the weight.
        counters: bytes of arrays that belong to no weight.
        muon: the weights that Muon moves.
    """

    kept: dict[str, list[int]]
    counters: int
    muon: frozenset[str]

    @classmethod
    def of(cls, model: Transformer) -> Optimizer:
        """The optimizer of an abstract model, by asking it for its state."""
        config = OptimizerConfig(steps=2, warmup_steps=1)
        values = {name: weight.get_raw_value() for name, weight in weights_by_name(model).items()}
        state = jax.eval_shape(build_optimizer(model, config).init, values)
        kept: dict[str, list[int]] = {}
        counters = 0
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
            name = next((key.key for key in reversed(path) if getattr(key, "key", None) in values), None)
            if name is None:
                counters += leaf.size * leaf.dtype.itemsize
                continue
            assert leaf.shape == values[name].shape, f"the optimizer keeps {leaf.shape} of {name}"
            kept.setdefault(name, []).append(leaf.dtype.itemsize)
        return cls(
            kept, counters, frozenset(name for name, kind in optimizer_labels(model, config).items() if kind == MUON)
        )


def measure(model: Transformer, job: Job, placement: Placement, optimizer: Optimizer | None = None) -> Bytes:
    """Return the bytes of each device; training needs the optimizer."""
    share = shares(job, placement)
    weights = sum(part.nbytes for part in placement.parts.values())
    layer, logits = _layer_bytes(job, placement, share), _logit_bytes(job, placement, share)
    buffers = _buffers(job, placement, share)
    if optimizer is None:
        cache = cache_bytes(model, job, placement)
        return Bytes(
            weights=weights, cache=cache, gradients=0, optimizer=0, activations=layer + logits, collectives=buffers
        )
    # Twice a layer: recomputed, and its gradients. The update comes after all of that is gone. A TPU's compiler holds
    # the stack of experts once more, laid out for the loop over the layers.
    stacks = sum(part.nbytes for part in placement.parts.values() if part.is_experts and part.layers > 1)
    backward = 2 * layer + logits + _kept_inputs(job, share) + stacks
    return Bytes(
        weights=weights,
        cache=0,
        gradients=weights,
        optimizer=optimizer.counters
        + sum(sum(sizes) * placement.parts[name].size for name, sizes in optimizer.kept.items()),
        activations=max(backward, UPDATE_COPIES * max(placement.parts[name].nbytes for name in optimizer.muon)),
        collectives=buffers,
    )


def cache_bytes(model: Transformer, job: Job, placement: Placement) -> int:
    """What all layers cache on one device."""
    total = 0
    for part in cache_parts(model, job, placement.mesh):
        total += nbytes(part.shape, part.dtype)
        if job.cache_storage.scaled:
            total += nbytes(part.shape[:-1], jnp.float32)
    return job.config.num_layers * total


def pair_width(job: Job) -> int:
    """Products for each pair of a query and a key, of one head: of the scores and of the sum of values."""
    attention = job.config.attention
    if isinstance(attention, GqaConfig):
        return 2 * attention.head_dim
    if job.kind == DECODE:
        return 2 * attention.latent_dim  # over the latent vectors as they are cached
    return attention.qk_dim + attention.value_dim


def _layer_bytes(job: Job, placement: Placement, share: Shares) -> int:
    """The widest moment of a layer: its attention, or its experts."""
    size = job.dtype.itemsize
    stream = 2 * share.tokens * job.config.embed_dim * size
    return stream + max(_attention(job, placement, share), _experts(job, placement, share))


def _attention(job: Job, placement: Placement, share: Shares) -> int:
    size, config = job.dtype.itemsize, job.config.attention
    heads = config.num_heads // placement.devices(job.rules.mesh_axes("heads"))
    queries = share.tokens // share.batch
    # Of one block of queries at a time; in the backward pass their gradients, too, and where they saw no key.
    each = 2 * (SCORE_BYTES + size) + 1 if job.kind == TRAIN else SCORE_BYTES + size
    keys = job.length // placement.devices(share.cache_axes) if job.kind == DECODE else job.length
    scores = share.batch * heads * min(queries, QUERY_BLOCK) * keys * each
    projected = share.tokens * heads * 2 * pair_width(job) * size  # queries, keys and values made, results
    return scores + projected


def _experts(job: Job, placement: Placement, share: Shares) -> int:
    """Rows of the chosen experts, gathered before the products and their results before the sum."""
    config, size = job.config, job.dtype.itemsize
    if not config.num_moe_layers:
        return 0
    width = config.moe.expert_width // placement.devices(job.rules.mesh_axes("mlp"))
    rows = share.gathered * config.moe.num_experts_per_token
    if share.exchanged is not None:
        rows = int(SLACK * share.exchanged)
    return rows * (2 * config.embed_dim + 3 * width) * size


def _logit_bytes(job: Job, placement: Placement, share: Shares) -> int:
    """The float32 logits: of every token in training, the MTP layers' too; of the last of each sequence otherwise."""
    training = LOGIT_COPIES * (1 + job.config.num_mtp_layers)
    tokens, copies = (share.tokens, training) if job.kind == TRAIN else (share.batch, 1)
    vocabulary = job.config.vocab_size
    if not job.config.tie_embeddings:
        vocabulary //= placement.devices(job.rules.mesh_axes("vocab"))
    return copies * tokens * vocabulary * SCORE_BYTES


def _kept_inputs(job: Job, share: Shares) -> int:
    """The input of each layer, kept for the backward pass."""
    layers = job.config.num_layers + job.config.num_mtp_layers
    return layers * share.tokens * job.config.embed_dim * job.dtype.itemsize


def _buffers(job: Job, placement: Placement, share: Shares) -> int:
    """What collectives make: the largest matrix gathered for a product, tokens for the experts, partial results.

    In training the gradient of a gathered matrix is as large, until it is summed and split.
    """
    copies = 2 if job.kind == TRAIN else 1
    gathered = (
        part.nbytes // part.layers * placement.devices(part.fsdp)
        for part in placement.parts.values()
        if part.matrix is not None and part.gathered_for(share.tokens, share.token_axes, placement)
    )
    return copies * max(gathered, default=0) + _expert_buffers(job, placement, share)


def _expert_buffers(job: Job, placement: Placement, share: Shares) -> int:
    if not job.config.num_moe_layers:
        return 0
    if share.exchanged is not None:
        return int(2 * SLACK * share.exchanged) * job.config.embed_dim * job.dtype.itemsize
    tokens = share.gathered * job.config.embed_dim * job.dtype.itemsize
    gathers = placement.devices(share.shared_axes) > 1
    reduces = placement.devices((*job.rules.mesh_axes("expert"), *job.rules.mesh_axes("mlp"))) > 1
    return tokens * (int(gathers) + int(reduces))
