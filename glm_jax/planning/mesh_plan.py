"""What a plan says of one mesh."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from glm_jax.planning.memory import Bytes
from glm_jax.planning.roofline import Times
from glm_jax.planning.work import Work
from glm_jax.sharding import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """A job on one mesh.

    Attributes:
        mesh: abstract.
        rules: where the logical axes go.
        held: bytes of each device.
        fits: they are no more than the device has.
        largest_batch: of the job's length that still fits, split as evenly as the mesh can; 0 if not one sequence does.
        largest_length: of the job's batch that still fits; 0 if not one token does.
        work: of one step of one device.
        times: of one step; None if the device's speed is not known.
        notes: what is odd about it, for people.
    """

    mesh: Mesh
    rules: Rules
    held: Bytes
    fits: bool
    largest_batch: int
    largest_length: int
    work: Work
    times: Times | None
    notes: tuple[str, ...]
