"""Processes meet or say in one line why not; here they are threads, which is the same to a socket."""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from glm_jax.errors import Error
from glm_jax.runtime import rendezvous
from glm_jax.runtime.rendezvous import meet
from tests.distributed.launch import free_port
from tests.processes import GIVE_UP

VERSIONS = {"glm_jax": "1", "jax": "2"}


def gather(*processes: tuple[int, int, dict[str, str]], timeout: float = GIVE_UP, port: int | None = None) -> list[str]:
    """What each process (index, count, versions) ends with: "met", or its error."""
    address = f"127.0.0.1:{port or free_port()}"

    def run(process):
        index, count, versions = process
        try:
            meet(address, index, count, timeout=timeout, versions=versions)
        except Error as error:
            assert "\n" not in str(error)
            return str(error)
        return "met"

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(run, processes))


def test_they_meet_whoever_comes_first():
    for order in ([0, 1, 2, 3], [3, 1, 2, 0]):
        assert gather(*((index, 4, VERSIONS) for index in order)) == ["met"] * 4


def test_the_port_is_free_again_at_once():
    port = free_port()
    assert gather((0, 2, VERSIONS), (1, 2, VERSIONS), port=port) == ["met"] * 2
    assert gather((0, 2, VERSIONS), (1, 2, VERSIONS), port=port) == ["met"] * 2


def test_the_missing_are_named_to_all(monkeypatch):
    """The deadline is when two have come, whatever the clock says."""
    come, accept = [], rendezvous._accept

    def until_two(listener, deadline):
        if len(come) == 2:
            return None
        come.append(accept(listener, deadline))
        return come[-1]

    monkeypatch.setattr(rendezvous, "_accept", until_two)
    said = gather((0, 5, VERSIONS), (1, 5, VERSIONS), (3, 5, VERSIONS))
    assert len(set(said)) == 1
    assert said[0].startswith("of 5 processes these did not come to port ") and said[0].endswith(" s: 2, 4")


def test_process_0_that_cannot_be_reached_is_named():
    (said,) = gather((1, 2, VERSIONS), timeout=1.0)
    assert said.startswith("process 0 at 127.0.0.1:") and "was not reached within 1 s (Connection refused)" in said
    with pytest.raises(Error, match=r"process 0 at no\.such\.host\.invalid:1 was not reached within 1 s"):
        meet("no.such.host.invalid:1", 1, 2, timeout=1.0, versions=VERSIONS)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (said,) = gather((0, 2, VERSIONS), timeout=1.0, port=port)
    assert said == f"process 0 cannot listen on port {port}: address already in use; choose another --coordinator port"


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ((1, 3, VERSIONS), "process 0 counts 2 processes, process 1 counts 3"),
        ((1, 2, {"glm_jax": "1", "jax": "3"}), "the processes differ: process 0 has glm_jax 1, jax 2, process 1 has"),
    ],
)
def test_what_does_not_fit_is_told_to_both(other, complaint):
    said = gather((0, 2, VERSIONS), other)
    assert len(set(said)) == 1 and said[0].startswith(complaint)


def test_an_index_used_twice_is_told_to_all():
    said = gather((0, 3, VERSIONS), (1, 3, VERSIONS), (1, 3, VERSIONS))
    assert set(said) == {"two processes say that they are process 1; each needs an index of its own, 0 to 2"}


def test_another_program_at_the_port_is_no_process_0():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        (said,) = gather((1, 2, VERSIONS), port=port)
        thread.join()
    assert said == f"process 0 at 127.0.0.1:{port}: another program answers there; choose another port"


def test_strangers_do_not_keep_them_apart():
    port, stop = free_port(), threading.Event()

    def scan():
        while not stop.is_set():
            for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"index": 1}\n', b"[]\n", b"\xff\n"):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                    stranger.sendall(text)
            stop.wait(0.05)

    scanner = threading.Thread(target=scan)
    scanner.start()
    try:
        assert gather((0, 2, VERSIONS), (1, 2, VERSIONS), port=port) == ["met"] * 2
    finally:
        stop.set()
        scanner.join()
