"""The flags that several verbs have in common, defined once and in the same words. Imports no jax."""

from __future__ import annotations

import re
from typing import Any

from absl import flags as absl_flags

from glm_jax.errors import InputError

RULES_HELP = (
    "what to split over which axis of the mesh: default, serve_latency, serve_throughput, train or long_context"
)
DTYPES = ("bfloat16", "float16", "float32")
QUANTIZED = ("keep", "dequantize")


class _Integer(absl_flags.IntegerParser):
    """Digits as people type them: Python would also take 1_000, blanks and the digits of other scripts."""

    def convert(self, argument: Any) -> int:
        if isinstance(argument, str) and not re.fullmatch(r"[+-]?[0-9]+", argument):
            raise ValueError("is no integer")
        return super().convert(argument)


class _Number(absl_flags.FloatParser):
    """Likewise."""

    def convert(self, argument: Any) -> float:
        if isinstance(argument, str) and not re.fullmatch(r"[A-Za-z0-9.+-]+", argument):
            raise ValueError("is no number")
        return super().convert(argument)


def define_integer(flags: absl_flags.FlagValues, name: str, default: int | None, text: str) -> None:
    """A flag that holds an integer."""
    absl_flags.DEFINE(_Integer(), name, default, text, flag_values=flags)


def define_number(flags: absl_flags.FlagValues, name: str, default: float | None, text: str) -> None:
    """A flag that holds a float."""
    absl_flags.DEFINE(_Number(), name, default, text, flag_values=flags)


def define_json(flags: absl_flags.FlagValues) -> None:
    """--json."""
    text = "print one JSON object on stdout and nothing else"
    absl_flags.DEFINE_boolean("json", False, text, flag_values=flags)


def define_allow_unknown(flags: absl_flags.FlagValues) -> None:
    """--allow_unknown: for every verb that reads a config.json."""
    text = "keys of config.json to pass over although they may change what the model computes: KEY or KEY,KEY"
    absl_flags.DEFINE_list("allow_unknown", [], text, flag_values=flags)


def define_rules(flags: absl_flags.FlagValues) -> None:
    """--rules: for every verb that places weights."""
    absl_flags.DEFINE_string("rules", "default", RULES_HELP, flag_values=flags)


def define_processes(flags: absl_flags.FlagValues) -> None:
    """--coordinator, --process_count, --process_index and two timeouts: for every verb that runs on several hosts."""
    text = "HOST:PORT of process 0; by default what Slurm, Open MPI, Kubernetes or the TPU slice says"
    absl_flags.DEFINE_string("coordinator", None, text, flag_values=flags)
    define_integer(flags, "process_count", None, "processes that run this program together; by default likewise")
    define_integer(flags, "process_index", None, "of this process, from 0; by default likewise")
    define_integer(flags, "start_timeout", 300, "seconds to wait until all processes have come")
    text = "seconds after which a process that is not heard any more ends the others"
    define_integer(flags, "heartbeat_timeout", 100, text)


def define_loading(flags: absl_flags.FlagValues) -> None:
    """The flags of every verb that loads a model: which one, how, and `define_processes`'s."""
    absl_flags.DEFINE_string("model", None, "directory of an Orbax or a Hugging Face checkpoint", flag_values=flags)
    text = "devices along each axis, as data=1,expert=4,tensor=2; by default over all devices that divide the model"
    absl_flags.DEFINE_string("mesh", None, text, flag_values=flags)
    define_rules(flags)
    text = "of the weights; by default float32 on CPU and bfloat16 elsewhere"
    absl_flags.DEFINE_enum("dtype", None, DTYPES, text, case_sensitive=False, flag_values=flags)
    text = "run quantised weights as they are stored, or as weights of --dtype (faster on a CPU, but larger)"
    absl_flags.DEFINE_enum("quantized", "keep", QUANTIZED, text, case_sensitive=False, flag_values=flags)
    text = "a directory to keep compiled programs in, and to take them from (glm-jax plan --compile --cache fills it)"
    absl_flags.DEFINE_string("cache", None, text, flag_values=flags)
    text = "only these decoder layers, as 0:4, to try a part of a large model; by default all"
    absl_flags.DEFINE_string("layers", None, text, flag_values=flags)
    define_allow_unknown(flags)
    define_processes(flags)


def define_sampling(flags: absl_flags.FlagValues) -> None:
    """--temperature, --top_k, --top_p (by default what the checkpoint recommends, or greedy), --seed, --speculative."""
    text = "0 takes the likeliest token; by default what the checkpoint recommends, or else 0"
    define_number(flags, "temperature", None, text)
    define_integer(flags, "top_k", None, "choose among the k likeliest tokens; 0 for all")
    text = "choose among the likeliest tokens that together have this probability; 1 for all"
    define_number(flags, "top_p", None, text)
    define_integer(flags, "seed", 0, "of the random choices")
    text = "tokens to draft with the MTP layer for each pass of the model: the same tokens, faster; needs temperature 0"
    define_integer(flags, "speculative", 0, text)


def need(flags: absl_flags.FlagValues, *names: str) -> None:
    """Check that flags without a default were given.

    Raises:
        InputError: one was not, or is empty, as an unset variable of a script makes it.
    """
    missing = [f"--{name}" for name in names if flags[name].value in (None, "")]
    if missing:
        raise InputError(f"{' and '.join(missing)} must be given")
