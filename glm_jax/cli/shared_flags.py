"""The flags that several verbs have in common, defined once and in the same words. Imports no jax."""

from __future__ import annotations

import re
from typing import Any

from absl import flags as absl_flags

from glm_jax.errors import InputError

DTYPES = ("bfloat16", "float16", "float32")


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


def define_loading(flags: absl_flags.FlagValues) -> None:
    """--model, --mesh, --dtype: for every verb that loads weights."""
    absl_flags.DEFINE_string("model", None, "directory of an Orbax or a Hugging Face checkpoint", flag_values=flags)
    text = "devices along each axis, as data=1,expert=4,tensor=2; by default over all devices that divide the model"
    absl_flags.DEFINE_string("mesh", None, text, flag_values=flags)
    text = "of the weights; by default float32 on CPU and bfloat16 elsewhere"
    absl_flags.DEFINE_enum("dtype", None, DTYPES, text, flag_values=flags)


def define_sampling(flags: absl_flags.FlagValues) -> None:
    """--temperature, --top_k, --top_p, --seed: by default what the checkpoint recommends, or else greedy."""
    text = "0 takes the likeliest token; by default what the checkpoint recommends, or else 0"
    define_number(flags, "temperature", None, text)
    define_integer(flags, "top_k", None, "choose among the k likeliest tokens; 0 for all")
    text = "choose among the likeliest tokens that together have this probability; 1 for all"
    define_number(flags, "top_p", None, text)
    define_integer(flags, "seed", 0, "of the random choices")


def need(flags: absl_flags.FlagValues, *names: str) -> None:
    """Check that flags without a default were given.

    Raises:
        InputError: one was not, or is empty, as an unset variable of a script makes it.
    """
    missing = [f"--{name}" for name in names if flags[name].value in (None, "")]
    if missing:
        raise InputError(f"{' and '.join(missing)} must be given")
