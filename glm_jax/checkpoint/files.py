"""The protocol by which checkpoint readers get at files: `Directory` and `File`, on a disk or under a URL.

A reader asks for ranges of bytes of named files, announces ranges that it will need, and releases ranges that it no
longer needs. It does not know whether a memory map or a network request answers. `local_files` implements the protocol
with memory maps, `remote` with requests through fsspec; `directories.open_directory` picks one of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from glm_jax.errors import CheckpointError

Place = Path | str  # a path, or a URL
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::.*)?://", re.DOTALL)


class File(Protocol):
    """The bytes of a file."""

    @property
    def place(self) -> Place:
        """The path or URL, as error messages show it."""
        ...

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    @property
    def version(self) -> str:
        """A value that changes with the content, as far as the file system tells (modification time, ETag)."""
        ...

    def fetch(self, begin: int, end: int) -> bytes:
        """Read [begin, end) without caching it: headers and small files. Returns less if the file ends before."""
        ...

    def view(self, begin: int, end: int) -> np.ndarray:
        """Read [begin, end) as a read-only uint8 array; the bytes stay cached until they are dropped."""
        ...

    def prefetch(self, begin: int, end: int) -> None:
        """Announce that [begin, end) will be viewed soon, so that reading it may begin."""
        ...

    def drop(self, begin: int, end: int) -> None:
        """Release the cached bytes [begin, end). Views stay valid."""
        ...

    def close(self) -> None:
        """Release everything that is cached."""
        ...


class Directory(Protocol):
    """A directory of files."""

    @property
    def place(self) -> Place:
        """The path or URL, as error messages show it."""
        ...

    def names(self) -> list[str]:
        """The names of its files, sorted; if a server lists none, the usual files of a checkpoint that it has."""
        ...

    def refused(self, name: str) -> str | None:
        """Why a file name from an (untrusted) index is refused, because it leads out of the directory; else None."""
        ...

    def find(self, names: Iterable[str]) -> dict[str, File | CheckpointError]:
        """Open the files of these names that exist; for one that cannot be opened, the error."""
        ...

    def at(self, name: str) -> Place:
        """The path or URL of a file of that name, whether or not there is one."""
        ...


def is_url(place: object) -> bool:
    """Whether a place is a URL (gs://bucket/model) rather than a path."""
    return isinstance(place, str) and _URL.match(place) is not None


def read_small(directory: Directory, name: str, limit: int) -> bytes | None:
    """The content of a small file; None if there is none of that name.

    Raises:
        CheckpointError: it cannot be read, or has more than `limit` bytes.
    """
    file = directory.find([name]).get(name)
    if file is None:
        return None
    if isinstance(file, CheckpointError):
        raise file
    if file.size > limit:
        raise CheckpointError(f"{file.place}: is larger than {limit} bytes, which no such file is")
    return file.fetch(0, file.size)


def leaves_by_name(name: str) -> bool:
    """Whether a file name from an index is anything but a plain relative name below the directory."""
    plain = name.isprintable() and Path(name).as_posix() == name and name != "."
    return not plain or os.path.isabs(name) or ".." in Path(name).parts


def quoted(value: object) -> str:
    """`value` on one line and of bounded length, for an error message."""
    if isinstance(value, list) and len(value) > 64:
        return f"[a list of {len(value)}]"
    try:
        text = repr(value) if not isinstance(value, str) else repr(value[:201])
    except (RecursionError, ValueError):
        return "(too deep or too long to print)"
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 200 else f"{text[:200]}..."
