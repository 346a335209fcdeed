"""Which process of which job this is, from flags and from the environment that a cluster sets.

Slurm, Open MPI, Kubernetes (JobSet) and TPU slices each have environment variables of their own; a TPU VM has a
metadata server. jax detects most of these, too. They are read here because jax gives each Slurm task one GPU even where
a task was given the whole node, knows neither Open MPI 5 nor a JobSet without the `kubernetes` package, and detects
nothing before it connects, while a verb that only prints must know which process it is. Nothing here connects to
another process, or imports jax.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.util
import os
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping

from glm_jax.errors import Error, InputError

COORDINATOR = "GLM_JAX_COORDINATOR"
PROCESS_COUNT = "GLM_JAX_PROCESS_COUNT"
PROCESS_INDEX = "GLM_JAX_PROCESS_INDEX"
TPU_PORT = 8482  # jax's own
KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"
METADATA_SECONDS = 3.0
_PORTS = 2**12  # the highest ports, of which a job takes one by its number
_FIRST_PORT = 2**16 - _PORTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """This process among those of its job.

    Attributes:
        detected_by: "flags", "environment" (GLM_JAX_...), "slurm", "open mpi", "kubernetes", "tpu" or "none".
        process_count: processes of the job; None where only jax can find out (through the `kubernetes` package).
        process_index: of this process, from 0.
        coordinator: HOST:PORT of process 0; None if this is the only process, or where jax finds it out.
        local_devices: ids of the GPUs of this process; None for all that it sees.
    """

    detected_by: str
    process_count: int | None = 1
    process_index: int = 0
    coordinator: str | None = None
    local_devices: tuple[int, ...] | None = None


def find(
    *,
    coordinator: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Cluster:
    """Find out which process this is.

    Arguments come first, then GLM_JAX_COORDINATOR, GLM_JAX_PROCESS_COUNT and GLM_JAX_PROCESS_INDEX, then Open MPI,
    Slurm, TPU and Kubernetes. A coordinator alone replaces the one that the cluster would have.

    Args:
        coordinator: HOST:PORT of process 0, reachable from the others.
        process_count: processes of the job.
        process_index: of this process, from 0; in an indexed Kubernetes job by default the pod's.
        environ: by default this process's.

    Raises:
        InputError: the arguments contradict each other or are incomplete, or a cluster is not understood.
    """
    env = os.environ if environ is None else environ
    address, count, index = _named(coordinator, process_count, process_index, env=env)
    if address is not None:
        split_address(address)
    if count is not None or index is not None:
        in_flags = process_count is not None or process_index is not None
        return _explicit(address, count, index, detected_by="flags" if in_flags else "environment")
    found = _open_mpi(env) or _slurm(env) or _tpu(env) or _kubernetes(env)
    if found is None:
        if address is not None:
            raise InputError(
                f"--coordinator {address} needs --process_count and --process_index: no Slurm, Open MPI, Kubernetes "
                "or TPU slice was found that would tell them"
            )
        return Cluster(detected_by="none")
    if not 0 <= found.process_index < (found.process_count or found.process_index + 1):
        raise InputError(f"{found.detected_by}: process {found.process_index} of {found.process_count} cannot be")
    address = address or env.get("JAX_COORDINATOR_ADDRESS")
    if found.process_count == 1:
        return dataclasses.replace(found, coordinator=None)
    if found.process_count is not None and address is None and found.coordinator is None:
        raise InputError(f"{found.detected_by} does not tell where process 0 is; give --coordinator HOST:PORT")
    return found if address is None else dataclasses.replace(found, coordinator=address)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[IPV6]:PORT`.

    Raises:
        InputError: it is neither.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]/]+)):([0-9]{1,5})", address)
    if match is None or not 0 < int(match[3]) < 2**16:
        raise InputError(f"coordinator {address!r} is no address; right would be HOST:PORT, as node0:1234")
    return match[1] or match[2], int(match[3])


def _named(
    coordinator: str | None, count: int | None, index: int | None, *, env: Mapping[str, str]
) -> tuple[str | None, int | None, int | None]:
    """The arguments, completed from the environment; a count or an index given hides the variables of both."""
    address = coordinator or env.get(COORDINATOR) or None
    if count is None and index is None:
        count, index = _integer(env, PROCESS_COUNT), _integer(env, PROCESS_INDEX)
    if count is not None and index is None:
        index = _integer(env, KUBERNETES_INDEX)
    return address, count, index


def _explicit(address: str | None, count: int | None, index: int | None, *, detected_by: str) -> Cluster:
    if count is None:
        raise InputError(f"--process_index {index} needs --process_count, the number of processes")
    if count < 1:
        raise InputError(f"--process_count {count}: there must be at least 1 process")
    if index is None and count == 1:
        index = 0
    if index is None:
        raise InputError(f"--process_count {count} needs --process_index, 0 to {count - 1}")
    if not 0 <= index < count:
        raise InputError(f"--process_index {index} is none of the {count} processes; right would be 0 to {count - 1}")
    if count == 1:
        return Cluster(detected_by=detected_by)
    if address is None:
        raise InputError(f"--process_count {count} needs --coordinator HOST:PORT, where process 0 listens")
    return Cluster(detected_by=detected_by, process_count=count, process_index=index, coordinator=address)


def _open_mpi(env: Mapping[str, str]) -> Cluster | None:
    """mpirun of Open MPI. Version 4 names its host, where process 0 runs; version 5 only tells if all share a host."""
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    name = "open mpi"
    count = _required(env, "OMPI_COMM_WORLD_SIZE", name)
    on_host = _integer(env, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    local = _integer(env, "OMPI_COMM_WORLD_LOCAL_RANK") or 0
    uri = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", env.get("OMPI_MCA_orte_hnp_uri", ""))
    address = None
    if uri is not None:
        host = uri[2] or f"[{uri[3]}]"
        address = f"{host}:{_port(env, int(uri[1]) // 2**12)}"
    elif on_host == count:
        address = f"127.0.0.1:{_port(env, zlib.crc32(env.get('PMIX_NAMESPACE', '').encode()))}"
    return Cluster(
        detected_by=name,
        process_count=count,
        process_index=_required(env, "OMPI_COMM_WORLD_RANK", name),
        coordinator=address,
        local_devices=_share(env, on_host, local),
    )


def _slurm(env: Mapping[str, str]) -> Cluster | None:
    """A task that srun started. A batch script outside of srun is a single process."""
    if "SLURM_PROCID" not in env or "SLURM_STEP_NODELIST" not in env:
        return None
    name = "slurm"
    count = _integer(env, "SLURM_STEP_NUM_TASKS") or _required(env, "SLURM_NTASKS", name)
    job = (_integer(env, "SLURM_JOB_ID") or 0) + 1009 * (_integer(env, "SLURM_STEP_ID") or 0)
    tasks = _tasks_on_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""), _integer(env, "SLURM_NODEID") or 0)
    local = _integer(env, "SLURM_LOCALID") or 0
    bound = "SLURM_GPUS_PER_TASK" in env  # Slurm then shows each task its own GPUs
    return Cluster(
        detected_by=name,
        process_count=count,
        process_index=_required(env, "SLURM_PROCID", name),
        coordinator=f"{first_host(env['SLURM_STEP_NODELIST'])}:{_port(env, job)}",
        local_devices=None if bound else _share(env, tasks, local),
    )


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `rack[1,3-5]n[01-16],login` begins with `rack1n01`."""
    host, depth = "", 0
    taken = True  # whether the letter belongs to the first host
    for letter in nodes:
        if letter == "[":
            depth += 1
        elif letter == "]":
            depth, taken = depth - 1, True
        elif depth and letter in ",-":
            taken = False
        elif letter == "," and not depth:
            break
        elif taken:
            host += letter
    return host


def _tasks_on_node(counts: str, node: int) -> int:
    """The number of tasks on a node, from Slurm's counts: `4(x2),2` is two nodes with 4 and one with 2."""
    each: list[int] = []
    for match in re.finditer(r"(\d+)(?:\(x(\d+)\))?", counts):
        each += [int(match[1])] * int(match[2] or 1)
    return each[node] if node < len(each) else 1


def _share(env: Mapping[str, str], tasks: int, local: int) -> tuple[int, ...] | None:
    """The GPUs of one of several tasks on a host: an even share of the visible GPUs.

    None, which means all visible GPUs, if the task is alone on its host, if fewer GPUs are visible than there are tasks
    (then each task sees its own), or if JAX_LOCAL_DEVICE_IDS is set. Without CUDA_VISIBLE_DEVICES the number of GPUs is
    not known: each task takes one.
    """
    if tasks <= 1 or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES", env.get("ROCR_VISIBLE_DEVICES"))
    if visible is None:
        return (local,)
    each = len([part for part in visible.split(",") if part.strip()]) // tasks
    return tuple(range(local * each, (local + 1) * each)) or None


def _tpu(env: Mapping[str, str]) -> Cluster | None:
    """A worker of one or several TPU slices, from GKE's variables or from the metadata server of a TPU VM."""
    platforms = env.get("JAX_PLATFORMS")
    if platforms and "tpu" not in platforms.split(","):
        return None
    said: Mapping[str, str] = env
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    index = _integer(env, "TPU_WORKER_ID")
    if workers is None and "TPU_SKIP_MDS_QUERY" not in env and _on_tpu_vm():
        workers, number = _metadata("worker-network-endpoints", env), _metadata("agent-worker-number", env)
        index = int(number) if number is not None and number.isdecimal() else None
        lines = re.findall(r"^\s*(\w+)\s*:\s*'?(.*?)'?\s*$", _metadata("tpu-env", env) or "", re.MULTILINE)
        said = {**dict(lines), **env}
    if not workers:
        return None
    hosts = [_worker_host(entry) for entry in workers.split(",")]
    slices = _integer(said, "MEGASCALE_NUM_SLICES") or 1
    count = len(hosts) * slices
    if index is None and len(hosts) > 1:
        raise InputError(f"tpu: {len(hosts)} workers, but TPU_WORKER_ID does not say which this one is")
    address = said.get("MEGASCALE_COORDINATOR_ADDRESS", "").rsplit(":", 1)[0] or hosts[0]
    return Cluster(
        detected_by="tpu",
        process_count=count,
        process_index=(index or 0) + (_integer(said, "MEGASCALE_SLICE_ID") or 0) * len(hosts),
        coordinator=f"{address}:{env.get('JAX_COORDINATOR_PORT') or TPU_PORT}",
    )


def _worker_host(entry: str) -> str:
    """The host of `host`, `host:port` (GKE) or `name:id:ip` (metadata)."""
    parts = entry.strip().split(":")
    return parts[2] if len(parts) == 3 else parts[0]


def _on_tpu_vm() -> bool:
    """Whether this host has TPU chips and libtpu."""
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _metadata(key: str, env: Mapping[str, str]) -> str | None:
    """An attribute of this machine from Google's metadata server; None if it has none, or there is no server."""
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is never behind a proxy
    try:
        with opener.open(request, timeout=METADATA_SECONDS) as answer:
            return str(answer.read().decode("utf-8"))
    except urllib.error.HTTPError as error:
        error.close()
        return None
    except (OSError, ValueError):
        return None


def _kubernetes(env: Mapping[str, str]) -> Cluster | None:
    """A pod of an indexed job whose manifest does not number the processes: jax asks Kubernetes, if it can."""
    index = _integer(env, KUBERNETES_INDEX)
    if "KUBERNETES_SERVICE_HOST" not in env or index is None:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        raise InputError(
            f"this is pod {index} of an indexed Kubernetes job of unknown size: set {COORDINATOR} and {PROCESS_COUNT} "
            "as scripts/launch_gke_gpu.yaml does (--process_count=1 for a single pod), or install jax[k8s]"
        )
    return Cluster(detected_by="kubernetes", process_count=None, process_index=index)


def _port(env: Mapping[str, str], job: int) -> str:
    """JAX_COORDINATOR_PORT, or a port from the number of the job, so that jobs on one host rarely collide."""
    return env.get("JAX_COORDINATOR_PORT") or str(_FIRST_PORT + job % _PORTS)


def _integer(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise InputError(f"{name}={text!r} in the environment is no number")
    return int(text)


def _required(env: Mapping[str, str], name: str, cluster: str) -> int:
    value = _integer(env, name)
    if value is None:
        raise Error(f"{cluster} did not set {name}")
    return value
