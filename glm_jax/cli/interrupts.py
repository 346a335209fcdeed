"""Ctrl-C: one line on stderr and status 130, whatever the process was doing.

While libraries are imported the process ends at once: there is nothing to undo yet, and in the middle of their start
libraries of machine code lose exceptions, or crash. A verb that runs gets KeyboardInterrupt, so that it can leave
things in order. Imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

INTERRUPTED = 130
LINE = "glm-jax: interrupted"


def end_the_process() -> contextlib.AbstractContextManager[None]:
    """Inside, Ctrl-C ends the process at once."""
    return _handled(_end)


def raise_exceptions() -> contextlib.AbstractContextManager[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, if `end_the_process` is around."""
    return _handled(signal.default_int_handler)


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    """Exchange the handlers of this module and of Python; one of the caller, or none (nohup), stays as it is."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if in_main_thread else None
    ours = before in (signal.default_int_handler, _end)
    if ours:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _end(*_: object) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{LINE}\n".encode())
    os._exit(INTERRUPTED)
