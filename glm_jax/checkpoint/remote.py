"""Files under a URL, read by ranges through fsspec: gs://, s3://, https:// and whatever else it knows.

A file is never read whole. `view` reads blocks, several requests at a time; a block stays cached until it is dropped,
or evicted once the cache exceeds `MAX_HELD_BYTES`. A request that fails is made up to `ATTEMPTS` times, after growing
pauses. An answer of another length than was asked for counts as a failure, so that a cut connection never ends up in a
chunk. Credentials and endpoints are fsspec's own configuration.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from glm_jax.checkpoint.files import File, leaves_by_name, quoted
from glm_jax.errors import CheckpointError

BLOCK_BYTES = 4 * 2**20  # of one request
MAX_HELD_BYTES = 192 * 2**20
REQUESTS = 16  # at a time
ATTEMPTS = 5
FIRST_PAUSE = 0.5  # seconds, doubled after each attempt

_HEAD_BYTES = 2**17  # read when a file is opened: in most cases the whole header
_BLOCKS_AHEAD = 8  # of one view or prefetch
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
# What changes when a file does, by the names that file systems give it.
_VERSION_KEYS = (
    "ETag", "etag", "generation", "md5Hash", "crc32c", "Content-MD5", "content_md5", "VersionId", "version_id",
    "blob_id", "LastModified", "Last-Modified", "last_modified", "mtime", "updated", "created",
)  # fmt: skip
# The files that a checkpoint may have: asked for one by one where a server lists none.
_KNOWN_NAMES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
    "glm_jax.json", "merges.txt", "model.safetensors", "model.safetensors.index.json", "special_tokens_map.json",
    "tiktoken.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
)  # fmt: skip
_Result = TypeVar("_Result")


class RemoteDirectory:
    """A directory under a URL.

    Raises:
        CheckpointError: fsspec, or what it needs for this kind of URL, is not installed, or knows no such kind.
    """

    def __init__(self, url: str) -> None:
        self.place = _shown(url.rstrip("/"))
        self._system, root = _file_system(url, self.place)
        self._root = str(root).rstrip("/")
        self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="requests")
        self._blocks = _Blocks(self._pool)
        self._checking = threading.Lock()
        self._serves_ranges = False

    def names(self) -> list[str]:
        """As `Directory.names`."""
        try:
            listed = _with_retries(f"{self.place}: cannot be listed", lambda: self._system.ls(self._root, detail=False))
        except (FileNotFoundError, _Refused):
            listed = []  # many web servers list nothing
        inside = (str(path)[len(self._root) :] for path in listed if str(path).startswith(f"{self._root}/"))
        found = {name for path in inside if (name := re.split(r"[?#]", path.strip("/"))[0]) and "/" not in name}
        return sorted(found) if found else sorted(self.find(_KNOWN_NAMES))

    def refused(self, name: str) -> str | None:
        """As `Directory.refused`."""
        if leaves_by_name(name) or re.search(r"[?#%\\]", name):
            return f"the index names {quoted(name)}; a plain file name under the directory is right"
        return None

    def find(self, names: Iterable[str]) -> dict[str, File | CheckpointError]:
        """As `Directory.find`."""
        chosen = list(names)
        opened = zip(chosen, self._pool.map(self._open, chosen), strict=True)
        return {name: file for name, file in opened if file is not None}

    def at(self, name: str) -> str:
        """As `Directory.at`."""
        return f"{self.place}/{name}"

    def _open(self, name: str) -> RangedFile | CheckpointError | None:
        place, path = self.at(name), f"{self._root}/{name}"
        try:
            about = _with_retries(f"{place}: cannot be found", lambda: self._system.info(path))
            if about.get("type") == "directory":
                return None
            if type(about.get("size")) is not int:
                return CheckpointError(f"{place}: the server does not say its size; copy the directory to a disk")
            self._check_ranges(place, path, about)
            version = "".join(f"{key}={about[key]};" for key in _VERSION_KEYS if about.get(key) is not None)
            file = RangedFile(place, about["size"], version, read=self._reader(place, path), blocks=self._blocks)
        except FileNotFoundError:
            return None
        except CheckpointError as error:
            return error
        return file

    def _reader(self, place: str, path: str) -> Callable[[int, int], bytes]:
        def read(begin: int, end: int) -> bytes:
            def once() -> bytes:
                content = bytes(self._system.cat_file(path, start=begin, end=end))
                if len(content) != end - begin:
                    raise EOFError(f"{len(content)} of {end - begin} bytes came; the file may be shorter by now")
                return content

            try:
                return _with_retries(f"{place}: bytes {begin} to {end} cannot be read", once)
            except FileNotFoundError:
                raise CheckpointError(f"{place}: is gone") from None

        return read

    def _check_ranges(self, place: str, path: str, about: dict[str, Any]) -> None:
        """Refuse a server that answers a request for some bytes with all of them; asked once."""
        with self._checking:
            if self._serves_ranges or about["size"] < 2:
                return

            def last_byte() -> bytes:
                with self._system.open(path, "rb") as file:  # unlike cat_file, it gives up before it reads too much
                    file.seek(about["size"] - 1)
                    return bytes(file.read(1))

            try:
                served = (
                    about.get("partial") is not False and len(_with_retries(f"{place}: cannot be read", last_byte)) == 1
                )
            except _WholeFilesOnly:
                served = False
            if not served:
                line = "the server sends whole files only, no ranges of bytes; copy the directory to a disk"
                raise CheckpointError(f"{place}: {line}")
            self._serves_ranges = True


class RangedFile:
    """A remote file, read by ranges.

    Args:
        place: its URL.
        size: in bytes.
        version: as `File.version`.
        read: requests a range of bytes.
        blocks: the cache of blocks, which all files of a directory share.
    """

    def __init__(
        self, place: str, size: int, version: str, *, read: Callable[[int, int], bytes], blocks: _Blocks
    ) -> None:
        self.place, self.size, self.version = place, size, version
        self._read, self._blocks = read, blocks
        self._head = read(0, min(size, _HEAD_BYTES)) if size else b""

    def fetch(self, begin: int, end: int) -> bytes:
        """As `File.fetch`."""
        end = min(end, self.size)
        if end <= len(self._head):
            return self._head[begin:end]
        starts = range(begin, end, BLOCK_BYTES)
        return b"".join(self._read(start, min(start + BLOCK_BYTES, end)) for start in starts)

    def view(self, begin: int, end: int) -> np.ndarray:
        """As `File.view`: copied out of the blocks."""
        result = np.empty(end - begin, np.uint8)
        coming: deque[tuple[int, Future[bytes]]] = deque()
        asked, last = begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        while coming or asked <= last:
            while asked <= last and len(coming) < _BLOCKS_AHEAD:
                coming.append((asked, self._request(asked)))
                asked += 1
            number, future = coming.popleft()
            content, first = np.frombuffer(future.result(), np.uint8), number * BLOCK_BYTES
            start, stop = max(begin, first), min(end, first + BLOCK_BYTES)
            result[start - begin : stop - begin] = content[start - first : stop - first]
        result.flags.writeable = False
        return result

    def prefetch(self, begin: int, end: int) -> None:
        """As `File.prefetch`."""
        numbers = range(begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1)
        for number in numbers[:_BLOCKS_AHEAD]:
            self._request(number)

    def drop(self, begin: int, end: int) -> None:
        """As `File.drop`: releases the blocks that lie inside the range."""
        if begin == 0:
            self._head = b""
        for number in range(-(-begin // BLOCK_BYTES), end // BLOCK_BYTES):
            self._blocks.drop((self.place, number))

    def close(self) -> None:
        """As `File.close`."""
        self.drop(0, self.size + BLOCK_BYTES)

    def _request(self, number: int) -> Future[bytes]:
        start = number * BLOCK_BYTES
        read = self._read
        return self._blocks.get((self.place, number), lambda: read(start, min(start + BLOCK_BYTES, self.size)))


class _Blocks:
    """A cache of blocks, read or being read, of at most `MAX_HELD_BYTES`; the least recently used is evicted."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int], read: Callable[[], bytes]) -> Future[bytes]:
        """The future of a block, which is requested unless it is cached or on its way."""
        with self._lock:
            future = self._held.get(key)
            if future is None or (future.done() and future.exception() is not None):
                future = self._held[key] = self._pool.submit(read)
            self._held.move_to_end(key)
            while len(self._held) * BLOCK_BYTES > MAX_HELD_BYTES:
                self._held.popitem(last=False)  # who waits for it holds the future
            return future

    def drop(self, key: tuple[str, int]) -> None:
        """Release a block."""
        with self._lock:
            self._held.pop(key, None)


class _Refused(CheckpointError):
    """The server refuses the request."""


class _WholeFilesOnly(CheckpointError):
    """The server does not support ranges."""


def _with_retries(what: str, request: Callable[[], _Result]) -> _Result:
    """The answer to a request, which is made again if it fails for a reason that may be temporary.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it failed `ATTEMPTS` times, or for a permanent reason; the line begins with `what`.
    """
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except Exception as raised:  # each file system has its own
            # fsspec reports some servers that did not answer as missing files.
            error = raised.__cause__ if isinstance(raised, FileNotFoundError) else raised
            if not isinstance(error, Exception) or _status(error) in (404, 410):
                raise FileNotFoundError(what) from None
            reason = _shown(str(error)) or type(error).__name__
            if isinstance(error, ValueError) and "range requests" in reason:
                raise _WholeFilesOnly(f"{what}: {reason}") from error
            if _is_final(error):
                raise _Refused(f"{what}: {reason}") from error
            if attempt == ATTEMPTS - 1:
                raise CheckpointError(f"{what}, {ATTEMPTS} times over: {type(error).__name__}: {reason}") from error
        time.sleep(FIRST_PAUSE * 2**attempt * (0.5 + random.random()))
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    """Whether a request that failed with this error would fail again."""
    if isinstance(error, (PermissionError, NotImplementedError, ImportError, IsADirectoryError, NotADirectoryError)):
        return True
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 425, 429)


def _status(error: Exception) -> int | None:
    """The HTTP status of an error, if it has one."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _shown(text: str) -> str:
    """A text on one line, of bounded length, and without the passwords of the URLs in it."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(text.split()))[:400]


def _file_system(url: str, shown: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the URL's path in it."""
    kind = re.split(r"::|://", url)[0].lower()
    install = f"pip install 'glm_jax[{_EXTRAS.get(kind, 'remote')}]'"
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError:
        raise CheckpointError(f"{shown}: a URL is read through fsspec, which is not installed: {install}") from None
    try:
        system, root = url_to_fs(url)
    except ImportError as error:
        reason = _shown(str(error))
        advice = f": {install}" if kind in (*_EXTRAS, "http", "https") else ""
        raise CheckpointError(f"{shown}: what fsspec needs for {kind}:// is not installed ({reason}){advice}") from None
    except Exception as error:  # unknown kinds of URL, and credentials: each file system has errors of its own
        reason = _shown(str(error))
        raise CheckpointError(f"{shown}: fsspec cannot open {kind}:// ({type(error).__name__}: {reason})") from error
    system.invalidate_cache()
    return system, root
