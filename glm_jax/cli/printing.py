"""Output for people: aligned columns on stdout, notices and the progress of long work on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

SECONDS_TO_THE_FIRST_LINE = 3.0
SECONDS_BETWEEN_LINES = 10.0
_silent = False


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Print no notices and no progress: another process does."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def notice(text: str) -> None:
    """Print a line on stderr."""
    if not _silent:
        print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """What an error says, as one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def format_bytes(count: float) -> str:
    """`count` bytes in decimal units: 213_000_000_000 is "213.0 GB"."""
    from glm_jax.checkpoint import atomic  # brings jax along, which the verbs have by then

    return atomic.format_bytes(round(count))


def columns(rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
    """Rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(indent + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (bytes done, bytes in all): a bar on a terminal, elsewhere lines.

    They come after a few seconds, then every ten, and at the end, so that the log of a batch job tells how far it is.
    """
    if _silent or not sys.stderr.isatty():
        yield _Lines(what)
        return
    from rich import console
    from rich import progress as rich_progress

    shown = rich_progress.Progress(
        *rich_progress.Progress.get_default_columns(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        console=console.Console(stderr=True),
    )
    with shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


class _Lines:
    def __init__(self, what: str) -> None:
        self._what = what
        self._started = time.monotonic()
        self._next: float | None = self._started + SECONDS_TO_THE_FIRST_LINE  # None after the last

    def __call__(self, done: int, total: int) -> None:
        now, ended = time.monotonic(), done >= total
        if self._next is None or (now < self._next and not ended):
            return
        self._next = None if ended else now + SECONDS_BETWEEN_LINES
        rate = format_bytes(done / max(now - self._started, 1e-9))
        share = done / total if total else 1.0
        notice(f"{self._what}: {format_bytes(done)} of {format_bytes(total)} ({share:.0%}), {rate}/s")
