"""Where a Hugging Face checkpoint's bytes come from: one protocol, and its implementation on a memory map.

Readers ask for ranges of bytes of named files and say what they will need and what they are done with; they do not know
whether a page of the operating system or a request over the network answers. The other implementation, of ranges read
through fsspec, is in `remote`.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from glm_jax.checkpoint.atomic import reporting_os_errors
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


def open_directory(place: str | os.PathLike[str]) -> Directory:
    """The directory at a path or a URL.

    Raises:
        CheckpointError: it is no directory, or what the URL needs is not installed.
    """
    if isinstance(place, str) and is_url(place):
        from glm_jax.checkpoint.remote import RemoteDirectory  # which needs an optional extra

        return RemoteDirectory(place)
    return LocalDirectory(place)


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


class LocalDirectory:
    """A directory on a disk, whose files are mapped; symlinks must stay in it.

    The links of the Hugging Face cache (`snapshots/REV/x -> ../../blobs/HASH`) are followed.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = Path(place)

    def names(self) -> list[str]:
        """As `Directory.names`."""
        with reporting_os_errors(self.place):
            return sorted(entry.name for entry in os.scandir(self.place))

    def refused(self, name: str) -> str | None:
        """As `Directory.refused`; a link may lead out, too."""
        if leaves_by_name(name):
            return f"the index names {quoted(name)}; a plain file name under the directory is right"
        real, root = os.path.realpath(self.place / name), os.path.realpath(self.place)
        allowed = [root]
        if os.path.basename(os.path.dirname(root)) == "snapshots":
            allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
        if not any(os.path.commonpath([real, place]) == place for place in allowed):
            return f"{quoted(name)} is a link that leaves the directory (to {real}); put the file itself there"
        return None

    def find(self, names: Iterable[str]) -> dict[str, File | CheckpointError]:
        """As `Directory.find`."""
        found: dict[str, File | CheckpointError] = {}
        for name in names:
            if os.path.exists(self.place / name) and not os.path.isdir(self.place / name):
                try:
                    found[name] = MappedFile(self.place / name)
                except CheckpointError as error:
                    found[name] = error
        return found

    def at(self, name: str) -> Path:
        """As `Directory.at`."""
        return self.place / name


class MappedFile:
    """A regular file, mapped when it is first viewed.

    It must not shrink while it is mapped: touching a page that is gone kills the process (SIGBUS).

    Raises:
        CheckpointError: there is none, or it is a pipe or a device, which would block or never end.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.place = Path(path)
        with reporting_os_errors(self.place):
            found = os.stat(self.place)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{self.place}: is not a regular file")
        self.size, self.version = found.st_size, str(found.st_mtime_ns)
        self._map: mmap.mmap | None = None

    def fetch(self, begin: int, end: int) -> bytes:
        """As `File.fetch`."""
        with reporting_os_errors(self.place), open(self.place, "rb") as file:
            file.seek(begin)
            return file.read(max(0, end - begin))

    def view(self, begin: int, end: int) -> np.ndarray:
        """As `File.view`: the mapped bytes themselves."""
        return np.frombuffer(self._mapped(), np.uint8, count=end - begin, offset=begin)

    def prefetch(self, begin: int, end: int) -> None:
        """As `File.prefetch`: in one go, rather than fault by fault."""
        first = begin - begin % mmap.PAGESIZE
        self._mapped().madvise(mmap.MADV_WILLNEED, first, end - first)

    def drop(self, begin: int, end: int) -> None:
        """As `File.drop`: gives back the resident pages; touching them again reads the file again."""
        if self._map is not None:
            first = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        """As `File.close`; the mapping ends with its last view."""
        self._map = None

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with reporting_os_errors(self.place), open(self.place, "rb") as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    raise CheckpointError(f"{self.place}: changed its size after it was opened")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map
