"""Checkpoint files on a disk, memory-mapped: the implementation of `files.Directory` and `files.File` for a path."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from glm_jax.checkpoint.atomic import reporting_os_errors
from glm_jax.checkpoint.files import File, leaves_by_name, quoted
from glm_jax.errors import CheckpointError


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
        """As `File.prefetch`: one request for the range instead of a page fault for each page."""
        first = begin - begin % mmap.PAGESIZE
        self._mapped().madvise(mmap.MADV_WILLNEED, first, end - first)

    def drop(self, begin: int, end: int) -> None:
        """As `File.drop`: releases the resident pages; the next access reads them from the file again."""
        if self._map is not None:
            first = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        """As `File.close`; the mapping is undone with its last view."""
        self._map = None

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with reporting_os_errors(self.place), open(self.place, "rb") as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    raise CheckpointError(f"{self.place}: changed its size after it was opened")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map
