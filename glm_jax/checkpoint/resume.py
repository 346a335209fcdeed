"""A directory that is filled item by item, by threads and by several processes, and that survives being killed.

It is written under a temporary name beside its final name, which it gets when every item is finished. A later process
with the same work resumes where others stopped: a journal has the finished items. Each process holds a lock for its
share, so that a second start of the same share is refused. The process that finds everything done waits until the
others have released their locks, then gives the directory its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import IO, Any, Protocol

from glm_jax.checkpoint.atomic import check_free_space, check_target, partial_path, publish, reporting_os_errors
from glm_jax.checkpoint.journal import Journal, Shard, remove_journals
from glm_jax.errors import CheckpointError

Progress = Callable[[int, int], None]
MAX_BYTES_IN_FLIGHT = 128 * 2**20  # of items' largest pieces; about three copies of each are in memory at times
_LOCK = "lock"
_UNFINISHED = "unfinished"


class WorkItem(Protocol):
    """A piece of work: its name, the bytes it stands for, and the bytes that it holds at a time."""

    @property
    def name(self) -> str:
        """Unique in the work, and the same in every run."""
        ...

    @property
    def nbytes(self) -> int:
        """For the progress."""
        ...

    @property
    def held(self) -> int:
        """For the limit on memory."""
        ...


class ResumableDirectory:
    """The unfinished directory of one piece of work, and this process's share of it.

    Args:
        target: the final name; must not exist, or be an empty directory.
        identity: what the work is: a directory begun with another identity is refused.
        shard: this process among those that share the work.

    Attributes:
        path: the directory to write into.
        done: by name, what was recorded of each finished item of all processes, as of the last reading.

    Raises:
        CheckpointError: the target is taken, another process holds this share or is finishing the work, the directory
            was begun with other input, or the file system refuses.
    """

    def __init__(self, target: str | os.PathLike[str], identity: Mapping[str, Any], shard: Shard) -> None:
        self.target, self.shard = target, shard
        self.path = partial_path(check_target(target), _UNFINISHED)
        with reporting_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[bytes] = open(self.path / _LOCK, "ab")  # noqa: SIM115 (the open file is the lock)
            try:
                fcntl.flock(self._lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise CheckpointError(f"{target}: another process is finishing it; wait until it ends") from None
        with contextlib.ExitStack() as opened:
            opened.callback(self._lock.close)
            self._journal = Journal(self.path, identity, shard)
            opened.callback(self._journal.close)
            self.done = self._journal.done()
            opened.pop_all()

    def check_space(self, items: Sequence[WorkItem]) -> None:
        """Raise CheckpointError if the disk has no room for the items that are left."""
        check_free_space(self.path, sum(item.nbytes for item in items if item.name not in self.done))

    def run(
        self, items: Sequence[WorkItem], process: Callable[[Any], Any], *, threads: int, progress: Progress | None
    ) -> None:
        """Process this share's items that are not done, several at a time; record each when its bytes are durable.

        What `process` returns is recorded with the item, as JSON values. When one fails, those being processed are
        finished and recorded before its error is raised.
        """
        share = [item for number, item in enumerate(items) if self.shard.has(number)]
        total = sum(item.nbytes for item in share)
        left = [item for item in share if item.name not in self.done]
        finished = total - sum(item.nbytes for item in left)

        def note(items: Sequence[tuple[WorkItem, Any]]) -> None:
            nonlocal finished
            self._journal.append((item.name, result) for item, result in items)
            finished += sum(item.nbytes for item, _ in items)

        def shown() -> None:
            if progress is not None:
                progress(finished, total)

        run_items(left, process, threads=threads, done=note, step=shown)
        self.done = self._journal.done()

    def finish(self, items: Sequence[WorkItem], complete: Callable[[dict[str, Any]], None]) -> bool:
        """If every item of every share is done, let `complete` write the rest and give the directory its name.

        Returns whether the work is complete now, by this process or another that was finishing at the same time.
        """
        if any(item.name not in self.done for item in items):
            self.close()
            return False
        with reporting_os_errors(self.path):
            fcntl.flock(self._lock.fileno(), fcntl.LOCK_UN)
            fcntl.flock(self._lock.fileno(), fcntl.LOCK_EX)
        try:
            if not self.path.exists():  # another process finished while this one waited for the lock
                return True
            complete(self.done)
            self._journal.close()
            remove_journals(self.path)
            (self.path / _LOCK).unlink()
            publish(self.path, self.target)
            return True
        finally:
            self.close()

    def close(self) -> None:
        """Release the share; what is done stays for the next process."""
        self._journal.close()
        self._lock.close()

    def abandon(self) -> str:
        """After an error: release the share, remove a directory with nothing done, and say in words what was kept."""
        with contextlib.suppress(CheckpointError):
            self.done = self._journal.done()
        if self.done:
            self.close()
            return f"{len(self.done)} items are done in {self.path}, and the same command goes on from there"
        with contextlib.suppress(OSError):
            fcntl.flock(self._lock.fileno(), fcntl.LOCK_UN)
            fcntl.flock(self._lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)  # not while others work there
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()
        return ""


@contextlib.contextmanager
def resumable_directory(
    target: str | os.PathLike[str], identity: Mapping[str, Any], shard: Shard
) -> Iterator[ResumableDirectory]:
    """A `ResumableDirectory`; an error of the body says where it went wrong and what was kept.

    Raises:
        CheckpointError: as `ResumableDirectory`; a full or read-only file system is one line.
    """
    work = ResumableDirectory(target, identity, shard)
    try:
        with reporting_os_errors(work.path):
            yield work
    except CheckpointError as error:
        kept = work.abandon()
        raise CheckpointError(f"{error}; {kept}" if kept else str(error)) from error.__cause__
    except BaseException as error:
        kept = work.abandon()
        if kept:
            error.add_note(kept)
        raise
    finally:
        work.close()


def run_items(
    items: Sequence[Any],
    process: Callable[[Any], Any],
    *,
    threads: int,
    done: Callable[[Sequence[tuple[Any, Any]]], None],
    step: Callable[[], None],
) -> None:
    """Process items in threads, as many at a time as `MAX_BYTES_IN_FLIGHT` allows; `done` gets those that are ready.

    `step` is called after each call of `done`. When an item or `step` fails, the items being processed are finished and
    given to `done` before the error is raised.
    """
    left, running = list(reversed(items)), dict[Future[Any], WorkItem]()
    with ThreadPoolExecutor(threads, thread_name_prefix="items") as pool:
        try:
            while left or running:
                while left and _fits(left[-1], running, threads):
                    item = left.pop()
                    running[pool.submit(process, item)] = item
                _collect(running, done)
                step()
        except BaseException:
            while running:
                with contextlib.suppress(Exception):
                    _collect(running, done)
            raise


def _collect(running: dict[Future[Any], WorkItem], done: Callable[[Sequence[tuple[Any, Any]]], None]) -> None:
    """Wait for some of the running items and give `done` those that succeeded; raise the error of one that failed."""
    ready, _ = wait(running, return_when=FIRST_COMPLETED)
    taken = [(running.pop(future), future) for future in ready]
    errors = [error for _, future in taken if (error := future.exception()) is not None]
    good = [(item, future.result()) for item, future in taken if future.exception() is None]
    if good:
        done(good)
    if errors:
        raise errors[0]


def default_threads() -> int:
    """Threads that keep the cores busy while some of them wait for the disk."""
    return max(2, min(8, 2 * len(os.sched_getaffinity(0))))


def _fits(item: WorkItem, running: Mapping[Any, WorkItem], threads: int) -> bool:
    """Whether one more item may begin: always if none runs."""
    held = sum(other.held for other in running.values())
    return not running or (len(running) < threads and held + item.held <= MAX_BYTES_IN_FLIGHT)
