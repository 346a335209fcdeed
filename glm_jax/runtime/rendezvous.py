"""A rendezvous of the processes of a job before jax connects them: process 0 listens, the others connect to it.

jax ends a process that waited in vain for the others with a stack trace. A rendezvous on the same port beforehand tells
in one line which processes are missing, which index was used twice, and whose versions differ. A process sends one line
of JSON and gets one back.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any, NoReturn

from glm_jax.errors import Error
from glm_jax.runtime.clusters import split_address

GREETING = "glm_jax"
RETRY_SECONDS = 0.25
READ_SECONDS = 2.0
MAX_LINE = 4096


def meet(address: str, index: int, count: int, *, timeout: float, versions: dict[str, str]) -> None:
    """Return once all `count` processes have connected to `address`, where process 0 listens until then.

    Args:
        address: HOST:PORT of process 0.
        index: of this process.
        count: of all processes.
        timeout: seconds to wait for the others.
        versions: of the software; it must be the same everywhere.

    Raises:
        Error: the port is taken, process 0 cannot be reached, or the processes do not fit together; every process that
            came says the same.
    """
    host, port = split_address(address)
    deadline = time.monotonic() + timeout
    greeting = {"greeting": GREETING, "index": index, "count": count, "versions": versions}
    if index == 0:
        _wait_for_others(port, greeting, deadline=deadline, timeout=timeout)
    else:
        _go_to_first((host, port), greeting, deadline=deadline, timeout=timeout)


def _wait_for_others(port: int, greeting: dict[str, Any], *, deadline: float, timeout: float) -> None:
    count, present = greeting["count"], dict[int, socket.socket]()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(port, count))
        while len(present) < count - 1:
            arrived = _accept(listener, deadline)
            if arrived is None:
                missing = [i for i in range(1, count) if i not in present]
                some = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
                what = f"of {count} processes these did not come to port {port} within {timeout:g} s: {some}"
                _refuse(present, what)
            stack.enter_context(arrived)
            other = _read(arrived)
            if not isinstance(other, dict) or other.get("greeting") != GREETING:
                continue  # not one of ours: a health check, or a port scan
            problem = _misfit(greeting, other, present)
            if problem is not None:
                _refuse({**present, -1: arrived}, problem)
            present[other["index"]] = arrived
        _tell(present, {"go": True})


def _misfit(greeting: dict[str, Any], other: dict[str, Any], present: dict[int, socket.socket]) -> str | None:
    """Why a process may not take part, or None."""
    index, count = other.get("index"), greeting["count"]
    if other.get("count") != count:
        return f"process 0 counts {count} processes, process {index} counts {other.get('count')}"
    if not isinstance(index, int) or not 0 < index < count or index in present:
        return f"two processes say that they are process {index}; each needs an index of its own, 0 to {count - 1}"
    ours, theirs = greeting["versions"], other.get("versions")
    if ours != theirs:
        return f"the processes differ: process 0 has {_words(ours)}, process {index} has {_words(theirs)}"
    return None


def _words(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else "?"


def _go_to_first(address: tuple[str, int], greeting: dict[str, Any], *, deadline: float, timeout: float) -> None:
    where = f"process 0 at {address[0]}:{address[1]}"
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic())) as connection:
                _send(connection, greeting)
                # Process 0 answers when all have connected, or when its own time is up.
                connection.settimeout(max(0.1, deadline - time.monotonic()) + 2 * READ_SECONDS)
                answer = _receive(connection)
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            time.sleep(RETRY_SECONDS)
            continue
        if isinstance(answer, dict) and answer.get("go") is True:
            return
        if isinstance(answer, dict) and isinstance(answer.get("refused"), str):
            raise Error(answer["refused"])
        if answer is not None:
            raise Error(f"{where}: another program answers there; choose another port")
        reason = "it closed the connection"  # it has ended, or is about to
        time.sleep(RETRY_SECONDS)
    raise Error(f"{where} was not reached within {timeout:g} s ({reason})")


def _listen(port: int, count: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=count, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=count)
    except OSError as error:
        said = (str(error) if error.errno is None else os.strerror(error.errno)).lower()
        raise Error(f"process 0 cannot listen on port {port}: {said}; choose another --coordinator port") from error


def _accept(listener: socket.socket, deadline: float) -> socket.socket | None:
    """The next connection, or None at the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    listener.settimeout(left)
    try:
        return listener.accept()[0]
    except TimeoutError:
        return None


def _read(connection: socket.socket) -> Any:
    """What a connected process sends; None if nothing came that can be read."""
    connection.settimeout(READ_SECONDS)
    try:
        return _receive(connection)
    except OSError:
        return None


def _receive(connection: socket.socket) -> Any:
    """One line of JSON: None if the connection ends before anything came, "" for anything else than JSON."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_LINE:
        piece = connection.recv(MAX_LINE)
        if not piece:
            break
        line += piece
    if not line:
        return None
    try:
        return json.loads(line)
    except ValueError:
        return ""


def _send(connection: socket.socket, value: dict[str, Any]) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _tell(present: dict[int, socket.socket], value: dict[str, Any]) -> None:
    for connection in present.values():
        with contextlib.suppress(OSError):  # a process that is gone: jax notices it
            _send(connection, value)


def _refuse(present: dict[int, socket.socket], why: str) -> NoReturn:
    _tell(present, {"refused": why})
    raise Error(why)
