"""Ctrl-C at any moment: one line, status 130, nothing half-written; progress where there is no terminal."""

from __future__ import annotations

import os
import pty
import re
import sys

import pytest

from glm_jax.checkpoint import load
from tests import processes

# Runs the program, which gets SIGINT when it first does something: imports a module, or opens a file.
INTERRUPTED_AT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
event, text = sys.argv.pop(1), sys.argv.pop(1)
waiting = True
def hook(name, arguments):
    global waiting
    if waiting and name == event and (text == arguments[0] or event == "open" and text in str(arguments[0])):
        waiting = False
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
from glm_jax.cli import __main__ as program
sys.argv[0] = "glm-jax"
sys.exit(program.main())
"""


def interrupted(event: str, text: str, *arguments: object):
    return processes.run(processes.command(INTERRUPTED_AT, event, text, *arguments))


@pytest.mark.parametrize("module", ["glm_jax.cli.main", "absl.flags", "jax", "jaxlib", "tensorstore", "flax"])
def test_while_the_program_starts(hf, tmp_path, module):
    done = interrupted("import", module, "convert", f"--source={hf}", f"--target={tmp_path / 'orbax'}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "glm-jax: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_while_a_conversion_writes_and_then_once_more(hf, orbax, tmp_path):
    """What is left goes on with the same command, and nothing has the final name before it is complete."""
    target = tmp_path / "orbax"
    arguments = ("convert", f"--source={hf}", f"--target={target}")
    done = interrupted("open", "orbax.partial-", *arguments)
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("glm-jax: interrupted")
    assert not target.exists()
    assert processes.run([sys.executable, "-m", "glm_jax.cli", *arguments]).returncode == 0
    for path in filter(os.path.isfile, orbax.rglob("*")):
        assert (target / path.relative_to(orbax)).read_bytes() == path.read_bytes()
    assert load(target).config == load(orbax).config


def test_a_run_that_ignores_ctrl_c_goes_on(hf):
    """As under nohup, or in the background of a shell."""
    program = INTERRUPTED_AT.replace("signal.default_int_handler", "signal.SIG_IGN", 1)
    done = processes.run(processes.command(program, "import", "jax", "inspect", f"--model={hf}"))
    assert done.returncode == 0, done.stderr


def test_long_work_says_how_far_it_is_without_a_terminal(hf, tmp_path):
    def lines(*arguments: str) -> list[str]:
        done = processes.run([sys.executable, "-m", "glm_jax.cli", *arguments])
        assert done.returncode == 0 and "\x1b" not in done.stderr
        return done.stderr.splitlines()

    orbax = tmp_path / "orbax"
    convert = ["convert", f"--source={hf}", f"--target={orbax}", "--verify"]
    for arguments, what in (
        (convert, "converting"),
        (convert, "comparing"),  # the target is there by now
        (["export", f"--source={orbax}", f"--target={tmp_path / 'out'}"], "exporting"),
    ):
        said = lines(*arguments)
        assert re.fullmatch(rf"{what}: (.+) of \1 \(100%\), .+/s", said[-1])


def test_on_a_terminal_it_is_a_bar(hf, tmp_path):
    ours, theirs = pty.openpty()
    arguments = ["convert", f"--source={hf}", f"--target={tmp_path / 'orbax'}"]
    options = {"stderr": theirs, "env": processes.environment(TERM="xterm", COLUMNS="100")}
    with processes.started([sys.executable, "-m", "glm_jax.cli", *arguments], **options) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
        assert process.wait(processes.GIVE_UP) == 0
    os.close(ours)
    assert b"\x1b[" in shown and b"100%" in shown


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other side is closed
        return b""


def test_a_second_ctrl_c_is_no_traceback(hf, tmp_path):
    """One that comes while the first is handled."""
    program = INTERRUPTED_AT.replace(
        "signal.SIGINT)\nsys.addaudithook", "signal.SIGINT); waiting = True\nsys.addaudithook"
    )
    arguments = ("convert", f"--source={hf}", f"--target={tmp_path / 'orbax'}")
    done = processes.run(processes.command(program, "open", "orbax.partial-", *arguments))
    assert done.returncode == 130 and "Traceback" not in done.stderr
