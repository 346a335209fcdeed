"""The finished items of a long piece of work on a directory, so that a killed process loses nothing it had finished.

One process is one writer with a file of its own: a first line that says what the work is, then a line for each finished
item, appended and made durable after the item's own files are. Each line has a checksum: a line that a crash cut short,
or that changed, counts as not written, and so do the lines after it. Locks belong to open files, so they fall with the
process that held them.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from glm_jax.checkpoint.atomic import fsync_directory, reporting_os_errors
from glm_jax.errors import CheckpointError, InputError

_FILES = "journal-*.jsonl"
_MAX_LINE_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` processes that divide a piece of work, numbered from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"shard {self.index}/{self.count} is not one of 0/{self.count} to {self.count - 1}/...")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`1/4` is the second of four.

        Raises:
            InputError: it is not of this form, or out of range.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise InputError(f"shard {text!r}; right is INDEX/COUNT with an index from 0, such as 0/4 to 3/4")
        return cls(int(match[1]), int(match[2]))

    def has(self, number: int) -> bool:
        """Whether an item, by its number, is this process's."""
        return number % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Journal:
    """The finished items in a directory, of all processes that worked there, and this one's file to append to.

    Args:
        directory: where the files of all processes lie.
        identity: what the work is; a journal of other work is refused, never mixed in.
        shard: this process among those that share the work.

    Raises:
        CheckpointError: there is a journal of other work, or another process holds this shard.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], shard: Shard) -> None:
        self.directory, self._identity = directory, json.loads(json.dumps(identity))
        self._path = directory / f"journal-{shard.index}-of-{shard.count}.jsonl"
        with reporting_os_errors(self._path):
            self._file = open(self._path, "ab")  # noqa: SIM115 (held open: the lock is the open file's)
            if not _locked(self._file):
                self._file.close()
                raise CheckpointError(f"{directory}: another process works on shard {shard} there; wait until it ends")
            self._repair()

    def done(self) -> dict[str, Any]:
        """Every finished item of every process, with what was recorded of it.

        Raises:
            CheckpointError: a journal there belongs to other work; the message says what differs.
        """
        found: dict[str, Any] = {}
        for path in sorted(self.directory.glob(_FILES)):
            for number, (line, _) in enumerate(_lines(path)):
                if number == 0:
                    self._check(path, line)
                else:
                    found[line["unit"]] = line.get("note")
        return found

    def append(self, items: Iterable[tuple[str, Any]]) -> None:
        """Record items as finished, durably; what they wrote must be durable already."""
        lines = b"".join(_encoded({"unit": item, "note": note}) for item, note in items)
        with reporting_os_errors(self._path):
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which releases its lock."""
        self._file.close()

    def _repair(self) -> None:
        """Cut off an unfinished last line; write the first if there is none."""
        end = max((after for _, after in _lines(self._path)), default=0)
        self._file.truncate(end)
        if end == 0:
            self._file.write(_encoded({"identity": self._identity}))
            self._file.flush()
            os.fsync(self._file.fileno())
            fsync_directory(self.directory)

    def _check(self, path: Path, line: Mapping[str, Any]) -> None:
        theirs = line.get("identity")
        if theirs == self._identity:
            return
        keys = [key for key in self._identity if not isinstance(theirs, dict) or theirs.get(key) != self._identity[key]]
        raise CheckpointError(
            f"{self.directory}: was begun with other input ({', '.join(keys) or 'more keys'} changed since); "
            "finish it as it was begun, or remove it"
        )


def remove_journals(directory: Path) -> None:
    """Remove the journals of finished work."""
    for path in directory.glob(_FILES):
        path.unlink(missing_ok=True)


def digest(content: Any) -> str:
    """A short hash of a JSON value, the same for equal values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _encoded(content: Mapping[str, Any]) -> bytes:
    """A line: the content as JSON, with a checksum of that as its last member."""
    text = json.dumps(content).encode()
    return b'%s, "crc32": %d}\n' % (text[:-1], zlib.crc32(text))


def _decoded(raw: bytes) -> dict[str, Any] | None:
    """The content of a line; None if it is not one that was written so."""
    text, mark, checksum = raw.rpartition(b', "crc32": ')
    text += b"}"
    if not mark or checksum != b"%d}\n" % zlib.crc32(text):
        return None
    line = json.loads(text)
    return line if isinstance(line, dict) else None


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole lines of a journal and where each ends, up to the first that is not one."""
    end = 0
    with reporting_os_errors(path), open(path, "rb") as file:
        while raw := file.readline(_MAX_LINE_BYTES):
            line = _decoded(raw)
            if line is None or ("unit" if end else "identity") not in line:
                return
            end += len(raw)
            yield line, end
