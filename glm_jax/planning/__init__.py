"""What a job takes on a mesh that need not exist: bytes of each device, time of a step, and which meshes work at all.

Arithmetic over the declared weights and the rules that place them, so that a plan cannot disagree with what loading
does: the same function lays out the weights, and refuses a mesh in the same words.

    kinds      the kinds of accelerators as data: their memory and speeds, and where these are published
    devices    so many of a kind, and the shapes of TPU slices
    job        what is to run: a model, how many sequences of which length, in which dtypes
    meshes     every mesh of a number of devices
    placement  the weights of a job on one mesh, as each device holds them
    memory     bytes of each device by part
    work       arithmetic, traffic and collectives of one step
    roofline   the time of a step and what bounds it
    plan       all of it for every mesh (a `mesh_plan` each), by one or several placements
    ranking    their order, and which one to take
    smallest   the fewest devices that hold a job

And the proof, for which a compiler is needed but no device:

    target     devices for the compilers of TPUs and GPUs (`gpu_targets` describes the latter)
    lower      the programs of a job from abstract shapes
    program    what a compiled program sends and moves, read off its text
    compile    a job compiled, beside its plan
    warm       a cache of compiled programs, filled ahead
"""

from __future__ import annotations

from glm_jax.planning.devices import Cluster, choose_cluster, choose_device
from glm_jax.planning.job import Job
from glm_jax.planning.kinds import Device, Speed
from glm_jax.planning.mesh_plan import MeshPlan
from glm_jax.planning.plan import Plan, Refusal, make_plan
from glm_jax.planning.ranking import candidates
from glm_jax.planning.smallest import smallest_cluster

__all__ = [
    "Cluster",
    "Device",
    "Job",
    "MeshPlan",
    "Plan",
    "Refusal",
    "Speed",
    "candidates",
    "choose_cluster",
    "choose_device",
    "make_plan",
    "smallest_cluster",
]
