"""The flags that several verbs have in common, defined once and in the same words. Imports no jax."""

from __future__ import annotations

from absl import flags as absl_flags

from glm_jax.errors import InputError

DTYPES = ("bfloat16", "float16", "float32")


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
    absl_flags.DEFINE_float("temperature", None, text, flag_values=flags)
    absl_flags.DEFINE_integer("top_k", None, "choose among the k likeliest tokens; 0 for all", flag_values=flags)
    text = "choose among the likeliest tokens that together have this probability; 1 for all"
    absl_flags.DEFINE_float("top_p", None, text, flag_values=flags)
    absl_flags.DEFINE_integer("seed", 0, "of the random choices", flag_values=flags)


def need(flags: absl_flags.FlagValues, *names: str) -> None:
    """Check that flags without a default were given.

    Raises:
        InputError: one was not.
    """
    missing = [f"--{name}" for name in names if flags[name].value is None]
    if missing:
        raise InputError(f"{' and '.join(missing)} must be given")
