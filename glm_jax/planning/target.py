"""Devices that need not exist, for the compilers of TPUs and GPUs: these compile for a topology on any machine."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import jax

from glm_jax.errors import Error, InputError
from glm_jax.planning.devices import Cluster
from glm_jax.planning.gpu_targets import gpu_target

HOST_GPUS = 8
# A process that only compiles must not look for a TPU's metadata, nor keep others from compiling beside it.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def target_devices(cluster: Cluster, *, target: str | None = None) -> list[Any]:
    """Return the devices of a cluster for the compiler, in jax's order; on a `cpu` this process's own.

    Args:
        cluster: of a kind that a compiler knows: TPUs, GPUs, CPUs.
        target: of GPUs, their description as XLA's `GpuTargetConfigProto` in text form; by default the one of the
            kind that comes with this package.

    Raises:
        InputError: the compiler for this kind is not installed, knows no such devices, or lacks their description.
    """
    kind = cluster.device
    if kind.speed is None:
        raise InputError("compiling needs --device: a compiler is for a kind, and --memory names none")
    if kind.platform == "cpu":
        found = _cpu_devices(cluster.count)
    elif kind.platform == "tpu":
        found = _tpu_devices(kind.name, "x".join(map(str, cluster.topology or ())))
    else:
        found = _gpu_devices(kind.name, cluster.count, target)
    if len(found) < cluster.count:
        raise InputError(f"compiling for {cluster.count} x {kind.name} needs so many; the compiler has {len(found)}")
    return list(found[: cluster.count])


def attached_devices(cluster: Cluster) -> list[Any]:
    """Return the first devices that jax sees, which must be of the cluster's platform and enough.

    Raises:
        InputError: they are not.
    """
    kind = cluster.device
    found = list(_cpu_devices(cluster.count)) if kind.platform == "cpu" else jax.devices()
    here = {"cuda": "gpu"}.get(found[0].platform, found[0].platform)
    if here != kind.platform or len(found) < cluster.count:
        raise InputError(f"--attached needs {cluster.count} x {kind.name} here; jax sees {len(found)} x {here}")
    return found[: cluster.count]


def _cpu_devices(count: int) -> tuple[Any, ...]:
    with contextlib.suppress(RuntimeError):  # jax runs already, with as many as it has
        jax.config.update("jax_num_cpu_devices", count)
    return tuple(jax.devices("cpu"))


@functools.lru_cache(maxsize=8)
def _tpu_devices(kind: str, topology: str) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"compiling for {kind} needs the TPU compiler, which is not installed: pip install 'glm-jax[tpu]'"
        )
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{topology}").devices)
    except jax.errors.JaxRuntimeError as error:
        raise Error(f"the TPU compiler refuses {kind} {topology}: {str(error).splitlines()[0]}") from error


@functools.lru_cache(maxsize=8)
def _gpu_devices(kind: str, count: int, target: str | None) -> tuple[Any, ...]:
    text = gpu_target(kind) if target is None else target
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise InputError(
            f"compiling for {kind} needs the CUDA compiler, which is not installed: pip install 'glm-jax[cuda13]'"
        )
    if count > HOST_GPUS and count % HOST_GPUS:
        raise InputError(f"{count} x {kind} are no whole hosts of {HOST_GPUS}, for which the compiler compiles")
    from jax.experimental import topologies

    hosts, each = (count // HOST_GPUS, HOST_GPUS) if count > HOST_GPUS else (1, count)
    options = {"target_config": text, "topology": f"1x{hosts}x{each}"}
    try:
        return tuple(topologies.get_topology_desc(platform="cuda", topology_name=kind, **options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise Error(f"the CUDA compiler refuses {kind}: {str(error).splitlines()[0]}") from error
