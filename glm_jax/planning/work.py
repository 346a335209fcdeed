"""What one device does in one step: operations, bytes to and from its memory, collectives with their bytes.

Counted for the arithmetic that the job needs, not for what an implementation adds: each chosen expert once, causal
attention over half the square. Experts that no token chose are not read, with choices taken as independent and even.
"""

from __future__ import annotations

import dataclasses
import math

from glm_jax.configs import GqaConfig
from glm_jax.planning.job import DECODE, TRAIN, Job
from glm_jax.planning.memory import SCORE_BYTES, Bytes, Optimizer, Shares, pair_width, shares
from glm_jax.planning.placement import Part, Placement

ALL_REDUCE, ALL_GATHER = "all-reduce", "all-gather"
REDUCE_SCATTER, ALL_TO_ALL = "reduce-scatter", "all-to-all"
NEWTON_SCHULZ_STEPS = 5
# A training step does the forward pass, recomputes it, and takes two gradients of each product.
PASSES = {TRAIN: 4}
COLLECTIVE_PASSES = {TRAIN: 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """The same exchange, `times` in a step; `nbytes` are those of the whole array, before or after it was split."""

    what: str
    kind: str
    axes: tuple[str, ...]
    nbytes: int
    times: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One step of one device."""

    operations: float
    traffic: float
    collectives: tuple[Collective, ...]


def step_work(job: Job, placement: Placement, held: Bytes, optimizer: Optimizer | None = None) -> Work:
    """Return the work of a step of a device that holds `held`; training needs the optimizer."""
    share = shares(job, placement)
    size, passes = job.dtype.itemsize, PASSES.get(job.kind, 1)
    operations = traffic = 0.0
    for part in placement.matrices(job):
        group = placement.devices(tuple(axis for axis in part.fsdp if axis in share.token_axes))
        rows = _rows(part, job, share) * group  # this device's tokens with the whole, or the group's with a part
        operations += 2.0 * part.size / _copies(part) * rows * passes
        moved = rows * (part.size / _copies(part)) * (1 / part.inputs + 1 / part.outputs) * size
        read = part.nbytes * (group if part.gathered_for(_tokens(part, job, share), share.token_axes, placement) else 1)
        traffic += (read * _touched(part, job, share) + moved) * passes
    operations += _attention_operations(job, placement, share) * passes
    traffic += held.cache
    if optimizer is not None:
        operations += sum(_muon_operations(placement.parts[name], placement) for name in optimizer.muon)
        traffic += 2 * (held.weights + held.optimizer + held.gradients)
    found = [
        *_products(job, placement, share),
        *_fsdp(job, placement, share),
        *_sequences(job, placement, share),
        *_expert_exchange(job, placement, share),
    ]
    if job.kind == TRAIN:
        found = [dataclasses.replace(each, times=each.times * COLLECTIVE_PASSES[TRAIN]) for each in found]
        found += _gradients(placement, share)
    return Work(operations=operations, traffic=traffic, collectives=_among_several(found, placement))


def _copies(part: Part) -> int:
    """Experts that a part holds, or 1: each row meets one of them."""
    stacked = len(part.shape) - len(part.weight.axes)
    return part.local[stacked + part.weight.axes.index("expert")] if part.is_experts else 1


def _tokens(part: Part, job: Job, share: Shares) -> int:
    """A device's tokens that meet a matrix: the head sees the last of each sequence only, except in training."""
    return share.batch if part.owner == "head" and job.kind != TRAIN else share.tokens


def _rows(part: Part, job: Job, share: Shares) -> float:
    """Tokens that a part is multiplied with, of experts those that choose one that is here."""
    if part.is_experts:
        here = _copies(part) / job.config.moe.num_experts
        return share.gathered * job.config.moe.num_experts_per_token * here
    if part.owner in ("head", "embedding"):
        return share.tokens * (1 + job.config.num_mtp_layers) if job.kind == TRAIN else share.batch
    return share.tokens


def _touched(part: Part, job: Job, share: Shares) -> float:
    """The fraction of a part that a step reads."""
    if not part.is_experts:
        return 1.0
    idle = 1 - job.config.moe.num_experts_per_token / job.config.moe.num_experts
    return 1 - idle**share.gathered


def _attention_operations(job: Job, placement: Placement, share: Shares) -> float:
    config = job.config
    heads = config.attention.num_heads // placement.devices(job.rules.mesh_axes("heads"))
    pairs = job.length if job.kind == DECODE else job.length * (job.length + 1) / 2
    layers = config.num_layers + (config.num_mtp_layers if job.kind == TRAIN else 0)
    split = share.cache_axes if job.kind == DECODE else tuple(a for a in share.token_axes if a not in share.batch_axes)
    return 2.0 * share.batch * pairs * heads * pair_width(job) * layers / placement.devices(split)


def _muon_operations(part: Part, placement: Placement) -> float:
    """A device's share of Newton-Schulz: of each matrix two products with its smaller side, and one of that side."""
    assert part.matrix is not None
    first, last = part.matrix.batch, part.matrix.batch + part.matrix.outputs
    small, large = sorted((math.prod(part.shape[first:last]), math.prod(part.shape[last:])))
    matrices = math.prod(part.shape[:first]) / placement.devices(part.axes)
    return NEWTON_SCHULZ_STEPS * matrices * (4.0 * small * small * large + 2.0 * small**3)


def _products(job: Job, placement: Placement, share: Shares) -> list[Collective]:
    """Sums of products whose inputs are split."""
    found = []
    for part in placement.matrices(job):
        if part.is_experts:
            continue
        summed = tuple(axis for axis in part.input_axes if axis not in part.fsdp or axis not in share.token_axes)
        # Of a part of the outputs the products are of the whole group's tokens.
        fsdp = tuple(axis for axis in part.fsdp if axis in share.token_axes and axis not in part.input_axes)
        outputs, what = part.outputs * placement.devices(fsdp), f"{part.name} product"
        nbytes = share.tokens * outputs * job.dtype.itemsize
        found.append(Collective(what=what, kind=ALL_REDUCE, axes=summed, nbytes=nbytes, times=part.layers))
    return found


def _fsdp(job: Job, placement: Placement, share: Shares) -> list[Collective]:
    """Matrices that FSDP splits, gathered where they are used; or the tokens that move to them and back.

    In training two passes gather, and the third sums the gradients and splits them again, which is as many bytes.
    Matrices of a module that multiply the same tokens (queries, keys, values) share the exchange that moves these:
    the compiler sees that it is the same one.
    """
    found: list[Collective] = []
    moved: set[tuple[str, str | None, tuple[str, ...]]] = set()
    for part in placement.parts.values():
        axes = tuple(axis for axis in part.fsdp if axis in share.token_axes)
        if part.matrix is None or not axes or (job.kind != TRAIN and part.name.startswith("mtp.")):
            continue
        group, size = placement.devices(axes), job.dtype.itemsize
        tokens = _tokens(part, job, share)

        def collective(kind: str, nbytes: int, part: Part = part, axes: tuple[str, ...] = axes) -> Collective:
            return Collective(what=part.name, kind=kind, axes=axes, nbytes=nbytes, times=part.layers)

        if part.gathered_for(tokens, share.token_axes, placement):
            found.append(collective(ALL_GATHER, part.nbytes // part.layers * group))
            continue
        inputs, outputs = (tokens * group * count * size for count in (part.inputs, part.outputs))
        if set(axes) <= set(part.input_axes) and part.owner != "embedding":
            reader = (part.name.rpartition(".")[0], part.weight.axes[-1], axes)
            if reader not in moved:
                found.append(collective(ALL_TO_ALL, inputs * group))
            moved.add(reader)
            found.append(collective(REDUCE_SCATTER, outputs))
        elif part.owner == "embedding":
            indices = tokens * group * 4  # int32
            found += [collective(ALL_GATHER, indices), collective(ALL_TO_ALL, inputs * group)]
        else:
            found += [collective(ALL_GATHER, inputs), collective(ALL_TO_ALL, outputs * group)]
    return found


def _sequences(job: Job, placement: Placement, share: Shares) -> list[Collective]:
    """Keys and values of prompts that are split over devices; in decode the combined results of split caches."""
    layers = job.config.num_layers + (job.config.num_mtp_layers if job.kind == TRAIN else 0)
    attention = job.config.attention
    if job.kind == DECODE:
        heads = attention.num_heads // placement.devices(job.rules.mesh_axes("heads"))
        nbytes = share.tokens * heads * (pair_width(job) // 2 + 1) * SCORE_BYTES
        return [Collective(what="attention", kind=ALL_REDUCE, axes=share.cache_axes, nbytes=nbytes, times=layers)]
    axes = tuple(axis for axis in share.token_axes if axis not in share.batch_axes)
    if isinstance(attention, GqaConfig):
        kv_heads = attention.num_kv_heads // placement.devices(job.rules.mesh_axes("kv_heads"))
        width = 2 * kv_heads * attention.head_dim
    else:
        width = attention.latent_dim
    nbytes = share.batch * job.length * width * job.dtype.itemsize
    return [Collective(what="keys and values", kind=ALL_GATHER, axes=axes, nbytes=nbytes, times=layers)]


def _expert_exchange(job: Job, placement: Placement, share: Shares) -> list[Collective]:
    """Tokens to the experts and back, as `layers.dispatch` exchanges them."""
    layers = job.config.num_moe_layers + (job.config.num_mtp_layers if job.kind == TRAIN else 0)
    if not layers:
        return []
    shared, size = share.shared_axes, job.config.embed_dim * job.dtype.itemsize
    split = (*job.rules.mesh_axes("expert"), *job.rules.mesh_axes("mlp"))
    summed = tuple(axis for axis in split if axis not in shared)

    def collective(what: str, kind: str, axes: tuple[str, ...], nbytes: int) -> Collective:
        return Collective(what=what, kind=kind, axes=axes, nbytes=nbytes, times=layers)

    if share.exchanged is not None:
        rows = share.exchanged * placement.devices(shared)
        return [
            collective("rows to experts", ALL_TO_ALL, shared, rows * (size + 4)),  # with the int32 of their expert
            collective("rows back", ALL_TO_ALL, shared, rows * size),
            collective("experts' sum", ALL_REDUCE, summed, share.tokens * size),
        ]
    tokens = share.gathered * size
    routed = tokens + share.gathered * job.config.moe.num_experts_per_token * 8  # int32 choices, float32 weights
    return [
        collective("tokens to experts", ALL_GATHER, shared, routed),
        collective("tokens back", REDUCE_SCATTER, shared, tokens),
        collective("experts' sum", ALL_REDUCE, summed, tokens),
    ]


def _gradients(placement: Placement, share: Shares) -> list[Collective]:
    """Sums of gradients over the devices that saw other tokens."""
    found: dict[tuple[str, ...], int] = {}
    for part in placement.parts.values():
        axes = tuple(axis for axis in share.token_axes if axis not in part.axes)
        found[axes] = found.get(axes, 0) + part.nbytes
    return [Collective(what="gradients", kind=ALL_REDUCE, axes=a, nbytes=n, times=1) for a, n in found.items()]


def _among_several(found: list[Collective], placement: Placement) -> tuple[Collective, ...]:
    """Those of groups of more than one device, named by the axes that have several."""
    several = []
    for each in found:
        axes = tuple(axis for axis in each.axes if placement.mesh.shape[axis] > 1)
        if axes:
            several.append(dataclasses.replace(each, axes=axes))
    return tuple(several)
