"""Several processes as one program: `start` connects them, and none of them waits for one that has failed.

All processes run the same program over the devices of all. A process that fails writes its error to the key-value store
that jax connects the processes with. The others read the store every second, even while their devices wait, and all end
with one line, printed by process 0. A process that is killed writes nothing: jax ends the others after its heartbeats
have been missing for `HEARTBEAT_TIMEOUT` seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # the key-value store has no public name
from jax._src import xla_bridge

from glm_jax.errors import Error, InputError
from glm_jax.runtime.clusters import Cluster, find
from glm_jax.runtime.rendezvous import meet
from glm_jax.version import VERSION

START_TIMEOUT = 300.0
HEARTBEAT_TIMEOUT = 100.0
WATCH_SECONDS = 1.0
_FAILURE, _TOLD, _LEFT = "glm_jax/failure", "glm_jax/told", "glm_jax/left/"
_PATIENCE = 3 * WATCH_SECONDS  # how long a failing process waits for the others, which read every WATCH_SECONDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that run together, seen from one of them.

    Attributes:
        index: of this process; process 0 prints.
        count: of all.
        detected_by: "flags", "environment", "slurm", "open mpi", "kubernetes", "tpu", "none" (there is one
            process), or "jax" if the caller had connected them already.
        coordinator: HOST:PORT where they met, None of a single process.
    """

    index: int
    count: int
    detected_by: str
    coordinator: str | None = None

    @property
    def local_devices(self) -> int:
        """Devices of this process."""
        return jax.local_device_count()

    @property
    def global_devices(self) -> int:
        """Devices of all processes."""
        return jax.device_count()

    def describe(self) -> str:
        """One line for people."""
        if self.count == 1:
            return "one process"
        return f"process {self.index} of {self.count}, found by {self.detected_by}, coordinator {self.coordinator}"


_started: Processes | None = None
_watch: _Watch | None = None
_leaving = threading.Lock()


def start(
    *,
    coordinator: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
    start_timeout: float = START_TIMEOUT,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
) -> Processes:
    """Connect the processes of the job that this one belongs to; before anything else that uses devices.

    Without arguments it finds Slurm, Open MPI, Kubernetes (JobSet) and TPU slices by itself (`clusters.find`); where
    there is nothing to find, this is the only process, and nothing is done. Calling it again returns the same.

    Args:
        coordinator: HOST:PORT of process 0, with a port that is free there.
        process_count: processes of the job.
        process_index: of this process, from 0.
        start_timeout: seconds to wait until all processes have come.
        heartbeat_timeout: seconds after which a process that is not heard any more ends the others.

    Raises:
        InputError: the arguments contradict each other, or what was started before.
        Error: jax has been used already, the port is taken, process 0 cannot be reached in time, or the processes do
            not fit together.
    """
    global _started
    for name, value in (("start_timeout", start_timeout), ("heartbeat_timeout", heartbeat_timeout)):
        if not 1 <= value < 1e6:
            raise InputError(f"{name} {value:g}: right would be seconds, at least 1")
    if _started is not None:
        asked = (coordinator, process_count, process_index)
        have = (_started.coordinator, _started.count, _started.index)
        if any(value not in (None, was) for value, was in zip(asked, have, strict=True)):
            raise InputError(f"already started: this is {_started.describe()}")
        return _started
    if _client() is not None:
        state = jax_distributed.global_state
        _started = _joined(
            state.process_id, state.num_processes, detected_by="jax", coordinator=state.coordinator_address
        )
        return _started
    cluster = find(coordinator=coordinator, process_count=process_count, process_index=process_index)
    if cluster.process_count == 1:
        _started = Processes(index=0, count=1, detected_by=cluster.detected_by)
        return _started
    if xla_bridge.backends_are_initialized():
        raise Error("glm_jax.distributed.start() came after jax had used its devices; call it first of all")
    _connect(cluster, start_timeout=start_timeout, heartbeat_timeout=heartbeat_timeout)
    state = jax_distributed.global_state
    _started = _joined(
        state.process_id, state.num_processes, detected_by=cluster.detected_by, coordinator=state.coordinator_address
    )
    return _started


def _connect(cluster: Cluster, *, start_timeout: float, heartbeat_timeout: float) -> None:
    named: dict[str, Any] = {"cluster_detection_method": "k8s"}
    if cluster.process_count is not None and cluster.coordinator is not None:
        versions = {"glm_jax": VERSION, "jax": jax.__version__}
        address, index, count = cluster.coordinator, cluster.process_index, cluster.process_count
        meet(address, index, count, timeout=start_timeout, versions=versions)
        named = {"coordinator_address": address, "num_processes": count, "process_id": index}
        named |= {"local_device_ids": cluster.local_devices, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            **named,
            initialization_timeout=round(start_timeout),
            heartbeat_timeout_seconds=round(heartbeat_timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise Error(f"jax did not connect the processes: {str(error).splitlines()[0]}") from error


def _joined(index: int, count: int, *, detected_by: str, coordinator: str | None) -> Processes:
    """The processes, which jax has just connected: from now on they end together."""
    global _watch
    if count > 1:
        _watch = _Watch(index, count)
        _watch.start()
        atexit.register(_watch.stop)  # before jax's own, which takes away what it looks at
        sys.excepthook = functools.partial(_excepthook, sys.excepthook)
    return Processes(index=index, count=count, detected_by=detected_by, coordinator=coordinator)


def _excepthook(
    before: Callable[..., Any], kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """An uncaught exception of one process ends all of them."""
    before(kind, error, traceback)
    line = " ".join(str(error).split())
    fail(1, f"{kind.__name__}: {line}" if line else kind.__name__)


def fail(status: int, line: str) -> NoReturn:
    """End all processes with an exit status; process 0 prints the line, or that of a process that failed before.

    Flushes stdout and stderr, does not return, and runs no exit handler that would wait for other processes.

    Raises:
        RuntimeError: there are no other processes.
    """
    if _watch is None:
        raise RuntimeError("there are no other processes to end")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    failure = _Failure(_watch.index, status, line)
    try:
        _client().key_value_set(_FAILURE, json.dumps(dataclasses.astuple(failure)))
    except Exception:  # jax's own error, of another class in each version: a failure is stored, or process 0 is gone
        failure = _stored_failure() or failure
    _leave(failure)


@dataclasses.dataclass(frozen=True)
class _Failure:
    index: int
    status: int
    line: str

    def describe(self, reader: int) -> str:
        return self.line if self.index == reader else f"process {self.index}: {self.line}"


class _Watch(threading.Thread):
    """Checks every second whether another process has failed, for which this one may be waiting."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__(name="glm_jax.distributed", daemon=True)
        self.index, self.count = index, count
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            failure = _stored_failure()
            if failure is not None:
                _leave(failure)

    def stop(self) -> None:
        """Stop watching: no thread may be inside jax while Python shuts down."""
        self._over.set()
        self.join()


def _stored_failure() -> _Failure | None:
    try:
        return _Failure(*json.loads(_client().key_value_try_get(_FAILURE)))
    except Exception:  # no such key; or process 0 is gone, which jax reports
        return None


def _leave(failure: _Failure) -> NoReturn:
    """Print the failure, if this process is to, and exit. Process 0 exits last: it holds the key-value store."""
    assert _watch is not None
    _leaving.acquire()  # never released: the other thread that comes here stays until the process has gone
    client, index, others = _client(), _watch.index, _watch.count - 1
    if index == 0:
        _say(failure.describe(0))
        with contextlib.suppress(Exception):
            client.key_value_set(_TOLD, "yes")
        _until(lambda: len(client.key_value_dir_get(_LEFT)) >= others)
        time.sleep(0.2)  # a process says that it exits shortly before it does
    else:
        told = _until(lambda: client.key_value_try_get(_TOLD) == "yes")
        if not told and failure.index == index:
            _say(failure.describe(0))
        with contextlib.suppress(Exception):
            client.key_value_set(f"{_LEFT}{index}", "yes")
    os._exit(failure.status)


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"glm-jax: error: {line}\n".encode())


def _client() -> Any:
    """jax's connection to the key-value store of process 0; the classes of its errors differ by version."""
    return jax_distributed.global_state.client


def _until(condition: Callable[[], bool]) -> bool:
    """Wait up to `_PATIENCE` seconds for a condition on the key-value store; an error (no such key) means not yet."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if condition():
                return True
        time.sleep(0.05)
    return False
