"""A web server over a directory that serves ranges of bytes, and misbehaves where it is told to."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves `root`.

    Attributes:
        asked: the (name, begin, end) of every range asked for.
        whole: answer requests for a range with the whole file.
        unlisted: list no directory.
        cut: how many of the answers to come, for a range of a file, end halfway with the connection.
        failing: how many of the answers to come are 503.
        absent: the name of a file that is not there.
        shorter: bytes that are missing at the end of every file, though its size is said right.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[tuple[str, int, int]] = []
        self.whole = self.unlisted = False
        self.absent = ""
        self.cut = self.failing = self.shorter = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hf"

    def take(self, fault: str) -> bool:
        """Whether one more of the answers is to have a fault."""
        with self.lock:
            left = getattr(self, fault)
            setattr(self, fault, max(0, left - 1))
            return left > 0

    def handle_error(self, request, client_address) -> None:
        """Clients that go away are no news."""


class _Handler(BaseHTTPRequestHandler):
    server: RangeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.server.root / self.path.removeprefix("/hf").strip("/")
        if path.is_dir() and not self.server.unlisted:
            links = "".join(f'<a href="{entry.name}">{entry.name}</a>' for entry in path.iterdir())
            return self._send(200, links.encode(), {"Content-Type": "text/html"}, body=body)
        if not path.is_file() or path.name == self.server.absent:
            return self._send(404, b"", {}, body=body)
        if self.server.take("failing"):
            return self._send(503, b"", {}, body=body)
        content = path.read_bytes()
        size = len(content)
        headers = {"ETag": f'"{path.stat().st_mtime_ns}"', "Content-Type": "application/octet-stream"}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or self.server.whole:
            return self._send(200, content, headers, body=body)
        begin, end = int(match[1]), min(int(match[2]) + 1, size)
        with self.server.lock:
            self.server.asked.append((path.name, begin, end))
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        return self._send(206, content[begin : min(end, size - self.server.shorter)], headers, body=body, cuttable=True)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], *, body: bool, cuttable: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and cuttable and self.server.take("cut"):
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(content)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[RangeServer]:
    """A server in a thread of its own."""
    with RangeServer(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
