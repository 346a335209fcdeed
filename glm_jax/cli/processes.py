"""A verb in several processes: they start before anything uses a device, one prints, and they end together.

All run the same verb with the same flags, and so do the same work on their parts of the arrays. Process 0 prints; what
the user can mend, in any of them, is one line and the same exit status for all.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
from absl import flags as absl_flags

from glm_jax.cli import printing
from glm_jax.errors import Error
from glm_jax.runtime import distributed
from glm_jax.runtime.clusters import find

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


@contextlib.contextmanager
def together(flags: absl_flags.FlagValues) -> Iterator[None]:
    """Start the processes of the flags of `define_processes`, or of the cluster; inside, failing ends all of them.

    Raises:
        Error: they cannot start.
    """
    running = distributed.start(
        coordinator=flags.coordinator,
        process_count=flags.process_count,
        process_index=flags.process_index,
        start_timeout=flags.start_timeout,
        heartbeat_timeout=flags.heartbeat_timeout,
    )
    if running.count == 1:
        yield
        return
    try:
        with _stdout_of_one(running.index):
            yield
    except KeyboardInterrupt:
        distributed.fail(INTERRUPTED, "interrupted")
    except BrokenPipeError:
        distributed.fail(BROKEN_PIPE, "whoever read the output went away")
    except (Error, absl_flags.Error, OSError) as error:
        distributed.fail(USER_ERROR, printing.one_line(error))
    except jax.errors.JaxRuntimeError as error:  # mostly that another process has died, or memory that is full
        distributed.fail(USER_ERROR, f"the devices stopped: {str(error).splitlines()[0]}")


@contextlib.contextmanager
def told_apart(flags: absl_flags.FlagValues) -> Iterator[None]:
    """Let only the first process print, without connecting them: each runs, and fails, for itself.

    Raises:
        InputError: the flags contradict each other.
    """
    cluster = find(coordinator=flags.coordinator, process_count=flags.process_count, process_index=flags.process_index)
    if cluster.process_index == 0:
        yield
        return
    with printing.silence(), open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        yield


@contextlib.contextmanager
def _stdout_of_one(index: int) -> Iterator[None]:
    """Process 0 alone prints on stdout, and what libraries of machine code print there goes to its stderr."""
    sys.stdout.flush()
    kept = os.dup(1) if index == 0 else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2 if index == 0 else kept, 1)
    encoding, errors = getattr(sys.stdout, "encoding", None), getattr(sys.stdout, "errors", None)
    stream = os.fdopen(kept, "w", encoding=encoding, errors=errors)
    spoken = contextlib.nullcontext() if index == 0 else printing.silence()
    with spoken, stream, contextlib.redirect_stdout(stream):
        yield
        stream.flush()
