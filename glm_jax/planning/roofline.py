"""The time of a step at the hardware's best, and what it is spent on.

Arithmetic and memory traffic overlap, so the longer of the two counts; collectives lie between dependent layers, and
their time is added. Real programs reach a half to three quarters of this: it ranks meshes and bounds what to hope for.
"""

from __future__ import annotations

import dataclasses

from glm_jax.planning.job import Job
from glm_jax.planning.kinds import Device, Speed
from glm_jax.planning.meshes import span
from glm_jax.planning.placement import Placement
from glm_jax.planning.work import ALL_REDUCE, ALL_TO_ALL, Collective, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one step by what they are spent on."""

    compute: float
    memory: float
    communication: float

    @property
    def step(self) -> float:
        """Seconds of the step."""
        return max(self.compute, self.memory) + self.communication

    @property
    def bound(self) -> str:
        """What takes longest: `compute`, `memory` or `communication`."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def step_times(work: Work, job: Job, placement: Placement, device: Device) -> Times | None:
    """Return the times of a step, or None if the speed of the device is not known."""
    speed = device.speed
    if speed is None:
        return None
    peak = speed.float32 if job.dtype.itemsize == 4 else speed.bfloat16
    return Times(
        compute=work.operations / peak,
        memory=work.traffic / speed.memory,
        communication=sum(_seconds(each, placement, device, speed) for each in work.collectives),
    )


def _seconds(collective: Collective, placement: Placement, device: Device, speed: Speed) -> float:
    """A ring over the group: each device sends all but its own part of the array, for a sum twice.

    In an all-to-all it sends, of its own part, all but what stays with it.
    """
    direct = device.domain is None or span(placement.mesh, collective.axes) <= device.domain
    bandwidth, latency = (speed.link, speed.latency) if direct else (speed.network, speed.network_latency)
    members = placement.devices(collective.axes)
    sent = collective.nbytes * (members - 1) / members * (2 if collective.kind == ALL_REDUCE else 1)
    if collective.kind == ALL_TO_ALL:
        sent /= members
    return collective.times * (latency + sent / bandwidth)
