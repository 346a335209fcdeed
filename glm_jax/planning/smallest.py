"""The smallest number of devices that holds a job."""

from __future__ import annotations

import math
from collections.abc import Sequence

from glm_jax.planning.devices import Cluster, clusters
from glm_jax.planning.job import TRAIN, Job
from glm_jax.planning.kinds import Device
from glm_jax.planning.memory import Optimizer, measure
from glm_jax.planning.meshes import abstract_mesh
from glm_jax.planning.placement import abstract_model, place
from glm_jax.planning.plan import holds
from glm_jax.sharding import Rules

MAX_DEVICES = 4096
# What does not fit on so many times the devices that could hold its arrays fits on no number: something in it repeats.
_PATIENCE = 32


def smallest_cluster(job: Job, device: Device, *, rules: Sequence[Rules]) -> Cluster | None:
    """Return the smallest cluster of a kind (of `devices.clusters`) on which a job fits, or None if none is.

    Args:
        job: what to run.
        device: the kind.
        rules: any of which may place it.
    """
    least = math.ceil(_arrays(job, device) / device.memory)
    most = min(MAX_DEVICES, _PATIENCE * max(least, 8))
    for cluster in clusters(device):
        if cluster.count > most:
            return None
        if cluster.count >= least and holds(job, cluster, rules=rules):
            return cluster
    return None


def _arrays(job: Job, device: Device) -> int:
    """Bytes of all that a run keeps, each array held once, as such a device holds it: no mesh needs fewer."""
    model = abstract_model(job)
    optimizer = Optimizer.of(model) if job.kind == TRAIN else None
    held = measure(model, job, place(model, job, abstract_mesh((1, 1, 1), device.platform)), optimizer)
    return held.weights + held.cache + held.gradients + held.optimizer
