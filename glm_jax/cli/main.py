"""`glm-jax VERB --flag=value ...`: finds the verb, parses its flags, prints what went wrong as one line.

A verb is a module with a docstring (its help), `define_flags(flags)` and `run(flags)`. Its flags live in a `FlagValues`
of their own, so that verbs do not clash. `run` imports what it needs, prints for people unless `--json` is given, and
returns a JSON object, which is printed here if it is. Then stdout holds this object alone: whatever else is printed
meanwhile goes to stderr. Of several processes (`glm_jax.cli.processes`) only the first prints.

Exit status: 0; 1 if the object says `"ok": false`; 2 for what the user can mend; 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from types import ModuleType

from absl import flags as absl_flags

import glm_jax
from glm_jax.cli import interrupts, printing
from glm_jax.cli.interrupts import INTERRUPTED

# Verb -> its module, and what it does. `inspect` would hide the standard library's module from a script beside it.
VERBS = {
    "convert": ("convert", "turn a Hugging Face checkpoint into an Orbax checkpoint"),
    "export": ("export", "turn an Orbax checkpoint back into a Hugging Face checkpoint"),
    "inspect": ("inspect_model", "show the architecture and size of a preset or a checkpoint"),
    "plan": ("plan", "show which meshes a job fits on, and how fast it can be"),
    "generate": ("generate", "continue a prompt"),
    "chat": ("chat", "talk to a model"),
    "doctor": ("doctor", "check this machine, and a checkpoint"),
}
ALONE = ("inspect",)  # read headers, each process for itself: none waits for another
USER_ERROR = 2
BROKEN_PIPE = 141
WIDTH = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on `argv` (by default the process's) and return its exit status."""
    if argv is not None:
        return _status(list(argv))
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    status = _status(sys.argv[1:])
    if status in (INTERRUPTED, BROKEN_PIPE):
        # Programs may still run on the device, and python's exit would take away what they stand on.
        sys.stderr.flush()
        os._exit(status)
    return status


def _status(arguments: list[str]) -> int:
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as interrupt:
        notes = getattr(interrupt, "__notes__", ())
        print("; ".join([interrupts.LINE, *notes]), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout is gone; python must not try to flush the rest at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (glm_jax.Error, absl_flags.Error, OSError) as error:
        print(f"glm-jax: error: {printing.one_line(error)}", file=sys.stderr)
        return USER_ERROR


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        print(f"glm-jax {glm_jax.__version__}")
        return 0
    if name in ("--help", "-h", "help"):
        print(_program_help())
        return 0
    if name not in VERBS:
        raise glm_jax.InputError(f"there is no verb {name!r}; the verbs are {', '.join(VERBS)}")
    verb, flags = _module(name), verb_flags(name)
    if {"--help", "-h"}.intersection(arguments):
        print(_verb_help(name, verb, flags))
        return 0
    _parse(name, arguments, flags)
    _load_libraries()
    with interrupts.raise_exceptions(), _processes(name, flags):
        with _stdout_kept_for_json(flags.json):
            result = verb.run(flags)
        if flags.json:
            print(json.dumps(result, allow_nan=False))
    return 1 if result.get("ok") is False else 0


def verb_flags(name: str) -> absl_flags.FlagValues:
    """The flags of a verb, not yet parsed."""
    flags = absl_flags.FlagValues()
    flags.set_gnu_getopt(True)
    _module(name).define_flags(flags)
    return flags


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"glm_jax.cli.{VERBS[name][0]}")


def _parse(name: str, arguments: list[str], flags: absl_flags.FlagValues) -> None:
    try:
        rest = flags(arguments)[1:]
    except (absl_flags.Error, ValueError) as error:
        raise glm_jax.InputError(f"{printing.one_line(error)}; see glm-jax {name} --help") from error
    if rest:
        raise glm_jax.InputError(f"{rest[0]!r} is no flag; they are written --flag=value, see glm-jax {name} --help")


def _load_libraries() -> None:
    """Import jax and what stands on it."""
    with interrupts.end_the_process():
        for module in ("glm_jax.checkpoint", "glm_jax.serving"):
            importlib.import_module(module)


def _processes(name: str, flags: absl_flags.FlagValues) -> contextlib.AbstractContextManager[None]:
    """The processes that run the verb together; verbs without flags for it run in this one alone."""
    if "process_count" not in flags:
        return contextlib.nullcontext()
    from glm_jax.cli import processes

    return processes.told_apart(flags) if name in ALONE else processes.together(flags)


@contextlib.contextmanager
def _stdout_kept_for_json(wanted: bool) -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def _program_help() -> str:
    verbs = "\n".join(f"  {name:<10}{summary}" for name, (_, summary) in VERBS.items())
    return (
        f"glm-jax {glm_jax.__version__}: GLM-4.5 in JAX.\n\nglm-jax VERB --flag=value ...\n\n{verbs}\n\n"
        "glm-jax VERB --help lists the flags of a verb."
    )


def _verb_help(name: str, verb: ModuleType, flags: absl_flags.FlagValues) -> str:
    lines = [f"glm-jax {name} --flag=value ...", "", (verb.__doc__ or "").strip(), ""]
    for flag_name in flags:
        flag = flags[flag_name]
        text = f"--[no]{flag_name}  " if flag.boolean else f"--{flag_name}  "
        text += flag.help if flag.default in (None, False) else f"{flag.help} (default: {flag.value})"
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent=" " * 8)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
