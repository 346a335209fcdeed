"""A job compiled for its devices ahead of time: what the compiler says it takes, beside what was planned."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from jax.sharding import Mesh

from glm_jax.planning.devices import Cluster
from glm_jax.planning.job import TRAIN, Job
from glm_jax.planning.lower import lower_job
from glm_jax.planning.memory import Bytes, Optimizer, measure
from glm_jax.planning.placement import abstract_model, cache_parts, nbytes, place
from glm_jax.planning.program import Moved, Program, Sent
from glm_jax.planning.target import attached_devices, target_devices
from glm_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a compiler says of one step of a job, bytes of one device.

    Attributes:
        lower_seconds: from modules to the compiler's input.
        compile_seconds: of the compiler.
        arguments: weights, cache or optimizer state, tokens.
        outputs: results, those that take the place of arguments included.
        aliased: of these, what takes the place of arguments.
        temporaries: beside all that.
        code: of the program itself.
        layer_cache: bytes of the smallest array of one layer's cache, 0 without one.
        layer_experts: bytes of the smallest array of one layer's experts, 0 without such.
        sent: exchanges between devices.
        moved: kernels that only move an array as large as half of either, or larger.
    """

    lower_seconds: float
    compile_seconds: float
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    layer_cache: int
    layer_experts: int
    sent: tuple[Sent, ...]
    moved: tuple[Moved, ...]

    @property
    def total(self) -> int:
        """What a step takes."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def mesh_for(
    cluster: Cluster, sizes: tuple[int, int, int], *, gpu_target: str | None = None, attached: bool = False
) -> Mesh:
    """The mesh of sizes (data, expert, tensor) over a cluster's devices, which need not exist unless `attached`.

    Raises:
        InputError: the compiler for such devices is not installed, or the devices are not attached.
        ShardingError: there are fewer devices than the mesh needs.
    """
    devices = attached_devices(cluster) if attached else target_devices(cluster, target=gpu_target)
    return make_mesh(data=sizes[0], expert=sizes[1], tensor=sizes[2], devices=devices)


def compile_job(job: Job, mesh: Mesh, **options: Any) -> tuple[Any, Report]:
    """Compile one step of a job for a mesh; options are those of `lower.lower_job`.

    Returns the program (`jax.stages.Compiled`) and what there is to say of it.

    Raises:
        InputError: the job is one that planning only counts.
        ShardingError: the mesh cannot hold the model.
    """
    began = time.monotonic()
    lowered = lower_job(job, mesh, **options)
    lowered_at = time.monotonic()
    compiled = lowered.compile()
    done = time.monotonic()
    return compiled, report(job, mesh, compiled, seconds=(lowered_at - began, done - lowered_at))


def report(job: Job, mesh: Mesh, compiled: Any, *, seconds: tuple[float, float]) -> Report:
    """Read a compiled program; `seconds` are those of lowering and of compiling."""
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text())
    cache, experts = _of_a_layer(job, mesh)
    smallest = min((size for size in (cache, experts) if size), default=0)
    return Report(
        lower_seconds=seconds[0],
        compile_seconds=seconds[1],
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        layer_cache=cache,
        layer_experts=experts,
        sent=program.sent(),
        moved=program.moved(max(1, smallest // 2)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What was planned of what a compiler reports, bytes of one device.

    Attributes:
        arguments: what a step is called with.
        cache: a part of that.
        total: with all that it makes.
    """

    arguments: int
    cache: int
    total: int

    @classmethod
    def of(cls, held: Bytes) -> Estimate:
        """Of a plan's bytes."""
        return cls(arguments=held.weights + held.cache + held.optimizer, cache=held.cache, total=held.total)

    def to_json(self) -> dict[str, int]:
        """As a JSON object."""
        return dataclasses.asdict(self)


def estimate(job: Job, mesh: Mesh) -> Estimate:
    """What planning says of a job on a mesh."""
    model = abstract_model(job)
    optimizer = Optimizer.of(model) if job.kind == TRAIN else None
    return Estimate.of(measure(model, job, place(model, job, mesh), optimizer))


def _of_a_layer(job: Job, mesh: Mesh) -> tuple[int, int]:
    """Bytes of the smallest array of a layer's cache, and of its experts."""
    model = abstract_model(job)
    parts = place(model, job, mesh).parts.values()
    experts = [part.nbytes // part.layers for part in parts if part.is_experts]
    cache = [] if job.kind == TRAIN else [nbytes(each.shape, each.dtype) for each in cache_parts(model, job, mesh)]
    return min(cache, default=0), min(experts, default=0)
