"""Plan a job before there are devices: which meshes work, what each device then holds, and how long a step takes.

For every mesh of the devices, by each preset of rules that is for such a job: bytes by part (weights, cache, gradients
and optimizer exactly as a run holds them, activations and buffers of collectives estimated), the largest batch and
length that fit, the time of a step at the hardware's best and what bounds it. The first is the one to take, and the
line that loads so is printed. Meshes that cannot hold the model are listed with the sentence that loading would refuse
them with. With --count auto, or several kinds (--device h100,h200 --count auto), the fewest devices that hold the job.
Nothing is loaded and no device is needed. With --compile the compiler of the devices, which need not be here either,
checks the first mesh; with --cache it also prepares every program of generation on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from glm_jax.cli import plan_compile, plan_kinds, plan_text
from glm_jax.cli.plan_figures import AUTO, parse_count, parse_memory, parse_rate, spelled
from glm_jax.cli.plan_model import ChosenWeights, PlannedModel, choose_weights, find_model
from glm_jax.cli.shared_flags import (
    RULES_HELP,
    define_allow_unknown,
    define_integer,
    define_json,
    define_number,
    need,
)
from glm_jax.errors import InputError

if TYPE_CHECKING:
    from glm_jax.planning import Device, Job
    from glm_jax.sharding import Rules

LENGTH = 4096
__all__ = ["define_flags", "parse_memory", "run"]


def define_flags(flags: absl_flags.FlagValues) -> None:
    """The verb's flags."""

    def text(name: str, default: str | None, what: str) -> None:
        absl_flags.DEFINE_string(name, default, what, flag_values=flags)

    text("model", None, "a known model such as glm-4.5-air or zai-org/GLM-4.5-Air, or the directory of a checkpoint")
    text(
        "device", None, "a kind, or several: h100, h200, b200, a100, rtx4090, mi300x, v5p, v6e, cpu, ... (docs/plan.md)"
    )
    text("topology", None, "of a TPU slice, in chips: 4x4x4")
    text("count", None, f"number of devices (of TPUs without --topology, of chips), or {AUTO}: the fewest that hold it")
    text("memory", None, "of each device, with a unit (80GB, 76GiB), instead of what --device has")
    text(
        "bandwidth", None, "of each device's memory (3.35TB/s), likewise; without --device --tflops must be given, too"
    )
    define_number(flags, "tflops", None, "of each device in bfloat16 without sparsity, in 10^12 a second, likewise")
    text("link", None, "between devices of a host, each way (450GB/s), likewise; by default as PCI Express 5")
    text("job", "decode", "decode (a step of one token a sequence), prefill (whole prompts) or train (a step)")
    define_integer(flags, "batch", 1, "sequences at a time, over all devices")
    what = f"tokens of each sequence; in decode, of its cache. By default {LENGTH}, or the model's positions"
    define_integer(flags, "length", None, what)
    what = "bfloat16, float16, float32, fp8, int8 or int4: of experts and projections; by default as the checkpoint's"
    text("weights", None, what)
    text("cache_dtype", None, "bfloat16, float16, float32, fp8 or int8; by default that of the arithmetic")
    text("rules", None, f"{RULES_HELP}; by default ranked together with the meshes")
    define_allow_unknown(flags)
    plan_compile.define_compile(flags)
    define_json(flags)


def run(flags: absl_flags.FlagValues) -> dict[str, Any]:
    """Plan --job of --model on --count devices of a kind, or of several."""
    need(flags, "model")
    plan_compile.check(flags)
    devices = _devices(flags)
    count = None if flags.count is None else parse_count(flags.count)
    auto = flags.count is not None and count is None
    if auto and flags.topology is not None:
        raise InputError(f"--topology {flags.topology} says how many devices there are; --count {AUTO} asks for it")
    from glm_jax import planning

    several = len(devices) > 1
    # What cannot be is refused before the model is looked at.
    cluster = None if auto or several else planning.choose_cluster(devices[0], count=count, topology=flags.topology)
    model = find_model(flags.model, flags.allow_unknown)
    job, weights = _job(flags, model)
    rules = _rules(flags, job)
    rows = []
    if cluster is None:
        found = [plan_kinds.plan_kind(job, device, count=count, rules=rules) for device in devices]
        rows = [plan_kinds.kinds_row(model, device, *one) for device, one in zip(devices, found, strict=True)]
        if flags.compile and found[0][0] is None:
            raise InputError(f"--compile proves the first mesh that fits, and none does: {found[0][1]}")
        if several or found[0][0] is None:
            if not flags.json:
                plan_kinds.show_kinds(model, job, weights, rows)
            return {**plan_text.job_json(model, job, weights), "kinds": rows}
        plan = found[0][0]
    else:
        plan = planning.make_plan(job, cluster, rules=rules)
    chosen = plan_compile.choose(flags, plan) if flags.compile else None
    if not flags.json:
        plan_text.show(model, plan, weights)
    result = plan_text.as_json(model, plan, weights) | ({"kinds": rows} if rows else {})
    return result if chosen is None else {**result, **plan_compile.run(flags, plan, chosen)}


def _devices(flags: absl_flags.FlagValues) -> list[Device]:
    """The kinds of --device with the figures that replace theirs, or the one that figures describe.

    Raises:
        InputError: a kind is not known, or figures and a topology are to be of several.
    """
    figures = {
        "memory": None if flags.memory is None else parse_memory(flags.memory),
        "bandwidth": None if flags.bandwidth is None else parse_rate(flags.bandwidth, "bandwidth"),
        "tflops": flags.tflops,
        "link": None if flags.link is None else parse_rate(flags.link, "link"),
    }
    if flags.tflops is not None and not 0 < flags.tflops <= 10**6:
        raise InputError(f"--tflops {flags.tflops:g} is no rate; right would be in 10^12 operations a second: 989")
    from glm_jax import planning

    names: Sequence[str | None] = [None]
    if flags.device is not None:
        names = list(dict.fromkeys(name.strip().lower() for name in flags.device.split(",")))
    if len(names) > 1:
        given = [name for name, value in (*figures.items(), ("topology", flags.topology)) if value is not None]
        given += [name for name in ("compile",) if flags[name].value]
        if given:
            raise InputError(f"--{given[0]} is of one kind, and --device {flags.device} names {len(names)}")
        if flags.count is None:
            raise InputError(f"--count must be given with several kinds: a number, or {AUTO}")
    return [planning.choose_device(name, **figures) for name in names]


def _job(flags: absl_flags.FlagValues, model: PlannedModel) -> tuple[Job, ChosenWeights]:
    from glm_jax import planning

    kind = flags.job.lower()
    weights = choose_weights(model, flag=flags.weights, job=kind)
    positions = model.config.max_positions
    job = planning.Job(
        config=model.config,
        kind=kind,
        batch=flags.batch,
        length=min(LENGTH, positions) if flags.length is None else flags.length,
        weights=weights.dtype,
        stored=weights.stored,
        cache=None if flags.cache_dtype is None else spelled(flags.cache_dtype),
    )
    return job, weights


def _rules(flags: absl_flags.FlagValues, job: Job) -> tuple[Rules, ...]:
    """The rules of --rules, or all that are for such a job."""
    from glm_jax.planning.ranking import candidates
    from glm_jax.sharding import rules_named

    return candidates(job.kind) if flags.rules is None else (rules_named(flags.rules),)
