"""Child processes of tests. None outlives its test, and one is given up only if it hangs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from tests.conventions.tree import ROOT

GIVE_UP = 1800.0  # seconds; far more than any child takes on a loaded machine


def command(program: str, *arguments: Any) -> list[str]:
    """The command that runs a Python program given as text."""
    return [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child: that of the tests, with the package of this checkout."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **changes}


@contextlib.contextmanager
def started(arguments: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A child process with pipes, killed at the end of the block if it still runs."""
    options = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(arguments, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def run(arguments: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a child to its end; `changes` are those of the environment."""
    options = {"capture_output": True, "text": True, "check": False, "timeout": GIVE_UP}
    return subprocess.run(arguments, cwd=ROOT, env=environment(**changes), **options)


def said(program: str, *arguments: Any, **changes: str) -> str:
    """What a Python program, which must succeed, says on stdout."""
    done = run(command(program, *arguments), **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout
