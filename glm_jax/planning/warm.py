"""Filling a cache of compiled programs ahead of time: every program of generation, in several processes at once.

The processes share nothing but the directory. Devices that are attached belong to one process, which then compiles in
several threads: only tracing holds Python's lock. A program that is in the cache already is only read.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from glm_jax.errors import Error, InputError
from glm_jax.planning.compile import mesh_for
from glm_jax.planning.devices import Cluster
from glm_jax.planning.job import TRAIN, Job
from glm_jax.planning.lower import SAMPLINGS, generation_programs
from glm_jax.planning.meshes import abstract_mesh
from glm_jax.runtime import cache_directory, keep_programs, make_cache_directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warmed:
    """One program of the cache: its name, and the seconds until it was there."""

    program: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What to compile for: all that a process must be told.

    Attributes:
        job: whose programs; `samplings` are names of `lower.SAMPLINGS`.
        cluster: of the mesh of `sizes` (data, expert, tensor).
        root: directory of the cache.
        gpu_target: the description of GPUs that are not here, if not the kind's own.
        attached: whether the devices are this machine's.
    """

    job: Job
    cluster: Cluster
    sizes: tuple[int, int, int]
    root: str
    gpu_target: str | None = None
    samplings: tuple[str, ...] = tuple(SAMPLINGS)
    attached: bool = False

    def mesh(self) -> Mesh:
        """The mesh of devices."""
        return mesh_for(self.cluster, self.sizes, gpu_target=self.gpu_target, attached=self.attached)

    def programs(self, mesh: Mesh) -> dict[str, Callable[[], Any]]:
        """The programs to keep, by name."""
        return generation_programs(self.job, mesh, samplings=self.samplings)


def warm(target: Target, *, processes: int | None = None) -> Iterator[Warmed]:
    """Compile what generation runs for a job (`lower.generation_programs`) into a cache, as it gets done.

    Args:
        target: a decode or prefill job and its devices.
        processes: (or threads) at a time; by default one for every two processors, as a compiler keeps more than one
            busy.

    Raises:
        InputError: training has no such programs, or the cache cannot be written.
        Error: a program does not compile; in the words of the compiler.
    """
    names = check_target(target, target.mesh())
    count = min(len(names), processes or max(1, (os.cpu_count() or 1) // 2))
    pool: Executor
    if target.attached:
        _start(target)
        pool = ThreadPoolExecutor(count)
    else:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(target,))
    with pool:
        for done in [pool.submit(_compile, target, name) for name in names]:
            yield done.result()


def check_target(target: Target, mesh: Mesh) -> list[str]:
    """The names of the programs to keep. What is wrong is then said once, before any process starts.

    Raises:
        InputError: training has no such programs, or the cache cannot be written.
    """
    if target.job.kind == TRAIN:
        raise InputError("--cache keeps the programs of generation; right would be --job decode or prefill")
    names = list(target.programs(mesh))
    make_cache_directory(target.root, target.job.config, mesh)
    return names


def cache_of(target: Target) -> Path:
    """The directory that holds a target's programs."""
    return cache_directory(target.root, target.job.config, abstract_mesh(target.sizes))


def _start(target: Target) -> None:
    """A process begins: one that compiles for other devices without any of its own."""
    if not target.attached:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    keep_programs(target.root, target.job.config, target.mesh())


def _compile(target: Target, name: str) -> Warmed:
    mesh = target.mesh()
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            # A compiler without devices writes programs for them, and cannot read them again.
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
            target.programs(mesh)[name]().compile()
    except jax.errors.JaxRuntimeError as error:
        raise Error(f"{name} does not compile: {str(error).splitlines()[0]}") from None
    return Warmed(program=name, seconds=time.monotonic() - began)
