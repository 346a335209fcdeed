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
    """A file's bytes."""

    @property
    def place(self) -> Place:
        """Where it lies, as messages name it."""
        ...

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    @property
    def version(self) -> str:
        """Another one once its content has changed, as far as its place tells."""
        ...

    def fetch(self, begin: int, end: int) -> bytes:
        """The bytes [begin, end), which are read once: headers and small files. Fewer if the file ends before."""
        ...

    def view(self, begin: int, end: int) -> np.ndarray:
        """The bytes [begin, end) as a read-only uint8 array, at hand for another reader until they are dropped."""
        ...

    def prefetch(self, begin: int, end: int) -> None:
        """Says that the bytes [begin, end) will be viewed soon; reading them may begin."""
        ...

    def drop(self, begin: int, end: int) -> None:
        """Says that the bytes [begin, end) need not be at hand any more. Views stay valid."""
        ...

    def close(self) -> None:
        """Lets go of everything that is at hand."""
        ...


class Directory(Protocol):
    """Files beside each other."""

    @property
    def place(self) -> Place:
        """Where they lie, as messages name it."""
        ...

    def names(self) -> list[str]:
        """The names of the files right in it, sorted; of a place that lists none, those that a checkpoint may have."""
        ...

    def refused(self, name: str) -> str | None:
        """What is wrong with a file name of an (untrusted) index, if it leads out of the directory."""
        ...

    def find(self, names: Iterable[str]) -> dict[str, File | CheckpointError]:
        """The files of these names that are there, each of them opened, or why it cannot be."""
        ...

    def at(self, name: str) -> Place:
        """Where a file of that name lies or would lie."""
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
    """Whether a file name of an index is anything but plain names under the directory."""
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
