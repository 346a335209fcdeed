"""A job on a cluster: every mesh, ranked, with its bytes, its time and its room; and why the others are refused.

With several rules each mesh is planned with each of them that places something otherwise than those before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from glm_jax.errors import ShardingError
from glm_jax.model import Transformer
from glm_jax.planning.devices import Cluster
from glm_jax.planning.job import MAX_BATCH, TRAIN, Job
from glm_jax.planning.memory import Bytes, Optimizer, measure, shares
from glm_jax.planning.mesh_plan import MeshPlan
from glm_jax.planning.meshes import meshes
from glm_jax.planning.placement import Placement, abstract_model, place
from glm_jax.planning.ranking import on_mesh, ranked
from glm_jax.planning.roofline import step_times
from glm_jax.planning.work import step_work
from glm_jax.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A mesh that cannot hold the model by any of the rules, and the sentence with which loading refuses the first."""

    mesh: Mesh
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """All meshes of a cluster: those that work, best first, and those that do not.

    Attributes:
        job: with the rules of the first mesh.
        cluster: the devices.
        meshes: those that can hold the model, and some of which may not fit; see `ranking`.
        refused: the others.
        rules: all that were tried.
    """

    job: Job
    cluster: Cluster
    meshes: tuple[MeshPlan, ...]
    refused: tuple[Refusal, ...]
    rules: tuple[Rules, ...]


def make_plan(job: Job, cluster: Cluster, *, rules: Sequence[Rules] | None = None) -> Plan:
    """Return the plan of a job on a cluster: what fits, by the time of a step; then what does not, by its bytes.

    Args:
        job: what to run.
        cluster: on what.
        rules: ranked together with the meshes, instead of those of the job (`ranking.candidates` are for its kind).
    """
    tried = (job.rules,) if rules is None else tuple(rules)
    model = abstract_model(job)
    optimizer = Optimizer.of(model) if job.kind == TRAIN else None
    found: list[MeshPlan] = []
    refused = []
    for mesh in meshes(cluster.count, cluster.device.platform):
        placed, reasons = _placements(model, job, mesh, tried)
        for own, placement in placed:
            found.append(_plan_mesh(_Placed(model, optimizer, placement), own, cluster))
        if not placed:
            refused.append(Refusal(mesh, reasons[0]))
    order = ranked(found, rules=len(tried))
    chosen = dataclasses.replace(job, rules=order[0].rules if order else tried[0])
    return Plan(chosen, cluster, tuple(order), tuple(refused), tried)


def holds(job: Job, cluster: Cluster, *, rules: Sequence[Rules]) -> bool:
    """Whether a job fits on any mesh of a cluster by any of the rules: a plan has one that `fits`, and takes longer."""
    model = abstract_model(job)
    optimizer = Optimizer.of(model) if job.kind == TRAIN else None
    for mesh in meshes(cluster.count, cluster.device.platform):
        for own, placement in _placements(model, job, mesh, rules)[0]:
            if measure(model, own, placement, optimizer).total <= cluster.device.memory:
                return True
    return False


def _placements(
    model: Transformer, job: Job, mesh: Mesh, tried: Sequence[Rules]
) -> tuple[list[tuple[Job, Placement]], list[str]]:
    """A mesh by each of the rules that differ on it, and why some of them are refused."""
    placed, reasons, seen = [], [], set()
    for rules in tried:
        if (come_to := on_mesh(rules, mesh)) in seen:
            continue
        seen.add(come_to)
        own = dataclasses.replace(job, rules=rules)
        try:
            placed.append((own, place(model, own, mesh)))
        except ShardingError as error:
            reasons.append(str(error))
    return placed, reasons


@dataclasses.dataclass(frozen=True)
class _Placed:
    """What stays the same on one mesh whatever the batch and the length."""

    model: Transformer
    optimizer: Optimizer | None
    placement: Placement

    def held(self, job: Job, **changed: Any) -> Bytes:
        return measure(self.model, dataclasses.replace(job, **changed), self.placement, self.optimizer)


def _plan_mesh(placed: _Placed, job: Job, cluster: Cluster) -> MeshPlan:
    placement, memory = placed.placement, cluster.device.memory
    held = placed.held(job)
    work = step_work(job, placement, held, placed.optimizer)

    def batch_fits(batch: int) -> bool:
        return placed.held(job, batch=batch).total <= memory

    return MeshPlan(
        mesh=placement.mesh,
        rules=job.rules,
        held=held,
        fits=held.total <= memory,
        largest_batch=_largest_batch(job, placement, batch_fits),
        largest_length=_largest(job.config.max_positions, lambda n: placed.held(job, length=n).total <= memory),
        work=work,
        times=step_times(work, job, placement, cluster.device),
        notes=tuple(_notes(job, placement)),
    )


def _largest_batch(job: Job, placement: Placement, fits: Callable[[int], bool]) -> int:
    """The largest batch: whole rounds over all devices that can split it, or less where not one such round fits."""
    axes = job.rules.batch
    split = placement.devices(axes)
    found = split * _largest(MAX_BATCH // split, lambda rounds: fits(split * rounds))
    while not found and axes:
        axes = axes[:-1]
        smaller = placement.devices(axes)
        found = smaller if fits(smaller) else 0
    return max(found, job.batch if fits(job.batch) else 0)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number of 1..limit that fits, or 0; what fits stays so for every smaller one."""
    low, high = 0, limit + 1
    probe = 1
    while high - low > 1:
        if fits(probe):
            low = probe
        else:
            high = probe
        # Double while nothing was too large yet, then halve the rest.
        probe = min(2 * low, limit) if high == limit + 1 and low < limit else (low + high) // 2
    return low


def _notes(job: Job, placement: Placement) -> list[str]:
    repeats = shares(job, placement).repeats
    if repeats == 1:
        return [*placement.notes]
    axes = job.rules.batch
    return [
        *placement.notes,
        f"batch {job.batch} does not divide over mesh axis {'x'.join(axes)} = {placement.devices(axes)}: "
        f"{repeats} devices each compute the same sequences",
    ]
