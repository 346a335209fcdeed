"""Plan a job before there are devices: which meshes work, what each device then holds, and how long a step takes.

For every mesh of the devices: bytes by part (weights, cache, gradients and optimizer exactly as a run holds them,
activations and buffers of collectives estimated), the largest batch and length that fit, the time of a step at the
hardware's best and what bounds it. Meshes that cannot hold the model are listed with the sentence that loading would
refuse them with. Nothing is loaded and no device is needed. With --compile the compiler of the devices, which need not
be here either, checks the first mesh; with --cache it also prepares every program of generation on it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from glm_jax.cli import plan_compile, plan_text, printing
from glm_jax.cli.shared_flags import define_allow_unknown, define_integer, define_json, define_rules, need
from glm_jax.errors import InputError

if TYPE_CHECKING:
    from glm_jax.configs import ModelConfig

LENGTH = 4096
MAX_MEMORY = 2**60
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", 1)}


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The verb's flags."""

    def text(name: str, default: str | None, what: str) -> None:
        absl_flags.DEFINE_string(name, default, what, flag_values=flags)

    text("model", None, "a known model such as glm-4.5-air, or the directory of a checkpoint")
    text("device", None, "h100, h200, b200, v5e, v5p, v6e, tpu7x or cpu")
    text("topology", None, "of a TPU slice, in chips: 4x4x4")
    define_integer(flags, "count", None, "number of devices; of TPUs without --topology, of chips")
    text("memory", None, "of each device, in bytes or with a unit (80GB, 76GiB), instead of what --device has")
    text("job", "decode", "decode (a step of one token a sequence), prefill (whole prompts) or train (a step)")
    define_integer(flags, "batch", 1, "sequences at a time, over all devices")
    what = f"tokens of each sequence; in decode, of its cache. By default {LENGTH}, or the model's positions"
    define_integer(flags, "length", None, what)
    text("weights", "bfloat16", "bfloat16, float16, float32, fp8, int8 or int4: of experts and projections")
    text("cache_dtype", None, "bfloat16, float16, float32, fp8 or int8; by default that of the arithmetic")
    define_rules(flags)
    define_allow_unknown(flags)
    plan_compile.define_compile(flags)
    define_json(flags)


def run(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Plan --job of --model on --count devices of a kind."""
    need(flags, "model")
    plan_compile.check(flags)
    memory = None if flags.memory is None else parse_memory(flags.memory)
    from glm_jax import planning
    from glm_jax.sharding import rules_named

    cluster = planning.choose_cluster(flags.device, count=flags.count, topology=flags.topology, memory=memory)
    config = _config(flags.model, flags.allow_unknown)
    job = planning.Job(
        config=config,
        kind=flags.job,
        batch=flags.batch,
        length=min(LENGTH, config.max_positions) if flags.length is None else flags.length,
        weights=flags.weights,
        cache=flags.cache_dtype,
        rules=rules_named(flags.rules),
    )
    plan = planning.make_plan(job, cluster)
    chosen = plan_compile.choose(flags, plan) if flags.compile else None
    if not flags.json:
        plan_text.show(flags.model, plan)
    result = plan_text.as_json(flags.model, plan)
    return result if chosen is None else {**result, **plan_compile.run(flags, plan, chosen)}


def parse_memory(text: str) -> int:
    """Bytes, from a number with or without a unit.

    Raises:
        InputError: it is no such thing, or nothing that a device could have.
    """
    match = re.fullmatch(r"([0-9]{1,20})(?:\.([0-9]{1,20}))? ?([A-Za-z]{0,3})", text)
    unit = None if match is None else _UNITS.get(match[3].lower())
    if match is None or unit is None:
        raise InputError(f"--memory {text!r} is no size; right would be bytes, or a number with a unit: 80GB, 76GiB")
    size = int(match[1]) * unit + int(match[2] or 0) * unit // 10 ** len(match[2] or "")
    if not 1 <= size <= MAX_MEMORY:
        raise InputError(f"--memory must be at least 1 byte and at most {MAX_MEMORY}, not {text}")
    return size


def _config(name: str, allow_unknown: list[str]) -> ModelConfig:
    """The architecture of a preset, of a checkpoint, or of a directory that has no more than a config.json yet."""
    from glm_jax import checkpoint
    from glm_jax.cli.loading import named_config
    from glm_jax.configs.hf import read_hf

    found = named_config(name)
    if found is not None:
        return found
    directory = Path(name)
    if (directory / "config.json").is_file() and not any(directory.glob("*.safetensors*")):
        read = read_hf(directory, allow_unknown=allow_unknown)
        config, notes = read.config, read.notes
    else:
        source = checkpoint.open_source(directory, allow_unknown=allow_unknown)
        config, notes = source.config, source.notes
    for note in notes:
        printing.notice(f"note: {note}")
    return config
