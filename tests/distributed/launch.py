"""Real processes over loopback, on virtual CPU devices."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from tests import processes as child
from tests.conventions.tree import ROOT


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """What it said on stderr, without the chatter of the collectives."""
        return [line for line in self.err.splitlines() if not line.startswith("[Gloo] ")]


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment(devices: int) -> dict[str, str]:
    """For processes of that many devices each; compiled quickly, as the other tests are."""
    flags = [f"--xla_force_host_platform_device_count={devices}", "--xla_backend_optimization_level=0"]
    if jax.__version__.startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return child.environment(XLA_FLAGS=" ".join(flags))


def spawn(count: int, devices: int, arguments: Callable[[int], Sequence[Any]]) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS(index)` for each index; the last first, since the order must not matter."""
    started = {}
    for index in reversed(range(count)):
        command = [sys.executable, *map(str, arguments(index))]
        pipe = subprocess.PIPE
        started[index] = subprocess.Popen(
            command, cwd=ROOT, env=environment(devices), stdout=pipe, stderr=pipe, text=True
        )
    return [started[index] for index in range(count)]


def wait(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """Wait for processes to end; those that do not are killed, which fails the test."""
    try:
        said = [process.communicate(timeout=child.GIVE_UP) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def program(count: int, devices: int, *arguments: Any) -> list[Ended]:
    """Run `glm-jax ARGUMENTS` as that many processes of that many devices."""
    address = f"--coordinator=127.0.0.1:{free_port()}"

    def command(index: int) -> list[Any]:
        more = [address, f"--process_count={count}", f"--process_index={index}"]
        return ["-m", "glm_jax.cli", *arguments, *more]

    return wait(spawn(count, devices, command))


def worker(count: int, devices: int, directory: Path, *arguments: Any) -> list[dict[str, Any]]:
    """Run worker.py likewise; returns what each of the processes found."""
    script, address = Path(__file__).with_name("worker.py"), f"127.0.0.1:{free_port()}"
    report = [directory / f"{count}x{devices}-{index}.json" for index in range(count)]
    ended = wait(spawn(count, devices, lambda index: [script, report[index], address, count, index, *arguments]))
    assert [process.status for process in ended] == [0] * count, [process.err for process in ended]
    return [json.loads(path.read_text()) for path in report]
