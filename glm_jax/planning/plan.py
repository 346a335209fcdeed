"""A job on a cluster: every mesh, ranked, with its bytes, its time and its room; and why the others are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from glm_jax.errors import ShardingError
from glm_jax.model import Transformer
from glm_jax.planning.devices import Cluster
from glm_jax.planning.job import MAX_BATCH, TRAIN, Job
from glm_jax.planning.memory import Bytes, Optimizer, measure, shares
from glm_jax.planning.meshes import meshes
from glm_jax.planning.placement import Placement, abstract_model, place
from glm_jax.planning.roofline import Times, step_times
from glm_jax.planning.work import Work, step_work


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """A job on one mesh.

    Attributes:
        mesh: abstract.
        held: bytes of each device.
        fits: they are no more than the device has.
        largest_batch: of the job's length that still fits, split as evenly as the mesh can; 0 if not one sequence does.
        largest_length: of the job's batch that still fits; 0 if not one token does.
        work: of one step of one device.
        times: of one step; None if the device's speed is not known.
        notes: what is odd about it, for people.
    """

    mesh: Mesh
    held: Bytes
    fits: bool
    largest_batch: int
    largest_length: int
    work: Work
    times: Times | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A mesh that cannot hold the model, and the sentence with which loading refuses it."""

    mesh: Mesh
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """All meshes of a cluster: those that work, best first, and those that do not."""

    job: Job
    cluster: Cluster
    meshes: tuple[MeshPlan, ...]
    refused: tuple[Refusal, ...]


def make_plan(job: Job, cluster: Cluster) -> Plan:
    """Return the plan of a job on a cluster: what fits, by the time of a step; then what does not, by its bytes."""
    model = abstract_model(job)
    optimizer = Optimizer.of(model) if job.kind == TRAIN else None
    found, refused = [], []
    for mesh in meshes(cluster.count, cluster.device.platform):
        try:
            placement = place(model, job, mesh)
        except ShardingError as error:
            refused.append(Refusal(mesh, str(error)))
            continue
        found.append(_plan_mesh(_Placed(model, optimizer, placement), job, cluster))
    found.sort(key=_rank)
    return Plan(job, cluster, tuple(found), tuple(refused))


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
        held=held,
        fits=held.total <= memory,
        largest_batch=_largest_batch(job, placement, batch_fits),
        largest_length=_largest(job.config.max_positions, lambda n: placed.held(job, length=n).total <= memory),
        work=work,
        times=step_times(work, job, placement, cluster.device),
        notes=tuple(_notes(job, placement)),
    )


def _rank(entry: MeshPlan) -> tuple[Any, ...]:
    by_time = entry.fits and entry.times is not None
    seconds = entry.times.step if by_time and entry.times is not None else 0.0
    return not entry.fits, seconds, entry.held.total, tuple(entry.mesh.shape.values())


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
        return []
    axes = job.rules.batch
    return [
        f"batch {job.batch} does not divide over mesh axis {'x'.join(axes)} = {placement.devices(axes)}: "
        f"{repeats} devices each compute the same sequences"
    ]
