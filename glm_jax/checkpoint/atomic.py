"""Directories that appear whole or not at all, and the file system's refusals as one clear line.

Output is written to a sibling `<target>.partial-<tag>`, so the final rename stays inside one file system. The pieces
(`partial_path`, `check_target`, `publish`) stand alone because a resumed run composes them with a tag that it can find
again; `new_directory` is the composition that keeps nothing on failure. No journal and no locking here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from glm_jax.errors import CheckpointError

_REASONS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or the process limit allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ALWAYS_THE_TARGET = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def format_bytes(count: int) -> str:
    """`count` bytes in decimal units: 213_000_000_000 is "213.0 GB"."""
    if count < 1000:
        return f"{count} bytes"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def free_bytes(path: str | os.PathLike[str]) -> int | None:
    """Bytes free to this user where `path` lies or would lie; None if the file system does not say."""
    place = Path(os.path.realpath(path))
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def check_free_space(path: str | os.PathLike[str], bytes_needed: int) -> None:
    """Raises CheckpointError if fewer than `bytes_needed` bytes are free where `path` lies or would lie.

    Quotas are not seen: passing says that the file system has the room, not that the user may have it.
    """
    free = free_bytes(path)
    if free is not None and free < bytes_needed:
        raise CheckpointError(
            f"{path}: needs {format_bytes(bytes_needed)}, {format_bytes(free)} are free there; "
            "free some space or choose another place"
        )


@contextlib.contextmanager
def reporting_os_errors(path: str | os.PathLike[str], *, bytes_needed: int | None = None) -> Iterator[None]:
    """Turns every OSError of the body into one CheckpointError that names `path` (or the file the error names)."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(describe_os_error(error, path, bytes_needed)) from error


def describe_os_error(error: OSError, path: str | os.PathLike[str], bytes_needed: int | None = None) -> str:
    """One line for `error`, which came up at `path` unless the error names its own file."""
    where = os.fspath(error.filename if isinstance(error.filename, (str, os.PathLike)) else path)
    code = error.errno or 0
    line = f"{where}: {_REASONS.get(code) or error.strerror or error}"
    if code in _FULL:
        free = free_bytes(where)
        need = "" if bytes_needed is None else f"{format_bytes(bytes_needed)} needed, "
        line += f" ({need}{'unknown' if free is None else format_bytes(free)} free); free some space or choose another"
        line += " place"
    return line


def partial_path(target: str | os.PathLike[str], tag: str) -> Path:
    """The sibling of `target` that holds its contents until they are complete."""
    final = Path(os.path.realpath(target))
    return final.with_name(f"{final.name}.partial-{tag}")


def check_target(target: str | os.PathLike[str]) -> Path:
    """The resolved `target`, which does not exist yet or is an empty directory; else CheckpointError."""
    if "://" in os.fspath(target):
        raise CheckpointError(f"{target}: is a URL; checkpoints are written to a disk, name a directory")
    final = Path(os.path.realpath(target))
    with reporting_os_errors(final):
        if not final.name:
            raise CheckpointError(f"{target}: is the root of the file system; name a new directory")
        if not os.path.lexists(final):
            return final
        if not final.is_dir():
            raise CheckpointError(f"{target}: exists and is not a directory; name a new directory")
        if any(final.iterdir()):
            raise CheckpointError(f"{target}: exists and is not empty; name a new directory, or move this one away")
    return final


def publish(partial: Path, target: str | os.PathLike[str]) -> None:
    """Gives the complete directory `partial` its final name, durably.

    The files themselves must have been fsynced by who wrote them; the directories are fsynced here. If the rename is
    refused (somebody filled `target` meanwhile), CheckpointError says where the finished output lies: it is kept.
    """
    final = Path(os.path.realpath(target))
    with reporting_os_errors(partial):
        for directory, _, _ in os.walk(partial, topdown=False):
            fsync_directory(directory)
    try:
        check_target(target)
        os.rename(partial, final)
    except (OSError, CheckpointError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        line = f"{target}: cannot take its final name ({reason}); the finished output is kept at {partial}"
        raise CheckpointError(line) from error
    with reporting_os_errors(final):
        fsync_directory(final.parent)


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Makes the entries of one directory durable (raises OSError)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot fsync a directory
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_directory(target: str | os.PathLike[str], *, bytes_needed: int | None = None) -> Iterator[Path]:
    """Yields an empty directory beside `target` that becomes `target` when the body succeeds.

    If the body raises, the directory is removed and `target` is as it was. Missing parents are made. A full, read-only
    or forbidden file system is reported as one line; other exceptions pass through unchanged.

    Args:
        target: the final name; must not exist, or be an empty directory.
        bytes_needed: what the body will write, checked beforehand against the free space.

    Raises:
        CheckpointError: `target` is taken, does not have the room, or cannot be written.
    """
    final = check_target(target)
    if bytes_needed is not None:
        check_free_space(final, bytes_needed)
    partial = partial_path(final, secrets.token_hex(4))
    with reporting_os_errors(final):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    try:
        yield partial
    except BaseException as error:
        line = _described_if_ours(error, final, partial, bytes_needed)  # before the removal changes the free space
        shutil.rmtree(partial, ignore_errors=True)
        if line is not None:
            raise CheckpointError(line) from error
        raise
    publish(partial, final)


def _described_if_ours(error: BaseException, final: Path, partial: Path, bytes_needed: int | None) -> str | None:
    """The line for an exception that is the file system refusing the output; None for any other trouble."""
    if not isinstance(error, OSError):
        return None
    if error.errno not in _ALWAYS_THE_TARGET and not str(error.filename or "").startswith(str(partial)):
        return None
    return describe_os_error(error, final, bytes_needed).replace(str(partial), str(final))
