"""The first mesh of a plan, compiled: `plan --compile`, and with `--cache` every program of generation for it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from glm_jax.cli import printing
from glm_jax.cli.plan_text import size
from glm_jax.cli.shared_flags import define_integer
from glm_jax.errors import InputError, ShardingError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from glm_jax.planning import Job, MeshPlan, Plan
    from glm_jax.planning.compile import Estimate, Report
    from glm_jax.planning.warm import Target

SHOWN = 8


def define_compile(flags: absl_flags.FlagValues) -> None:
    """--compile, --mesh, --attached, --cache, --processes and --gpu_target."""
    text = "compile a step for the first mesh, without its devices, and compare what the compiler says with the plan"
    absl_flags.DEFINE_boolean("compile", False, text, flag_values=flags)
    text = "with --compile: this mesh, as data=1,expert=4,tensor=2, instead of the first"
    absl_flags.DEFINE_string("mesh", None, text, flag_values=flags)
    text = "with --compile: for the devices of this machine, which must be such, instead of ones that need not be here"
    absl_flags.DEFINE_boolean("attached", False, text, flag_values=flags)
    text = "with --compile: a directory to keep the programs of generation in, for verbs that are given it as --cache"
    absl_flags.DEFINE_string("cache", None, text, flag_values=flags)
    define_integer(flags, "processes", None, "with --cache: compilers at a time; by default one for two processors")
    text = "of GPUs: a file with their GpuTargetConfigProto as text, instead of the one of the kind"
    absl_flags.DEFINE_string("gpu_target", None, text, flag_values=flags)


def check(flags: absl_flags.FlagValues) -> None:
    """Check the flags of compiling before anything is planned.

    Raises:
        InputError: some are given without --compile, or with values that cannot be.
    """
    names = ("mesh", "attached", "cache", "processes", "gpu_target")
    alone = [name for name in names if flags[name].value not in (None, False)]
    if alone and not flags.compile:
        raise InputError(f"--{alone[0]} says nothing without --compile")
    if flags.processes is not None and (flags.cache is None or flags.processes < 1):
        raise InputError("--processes is a number of at least 1, and goes with --cache")
    if flags.cache is not None and flags.job == "train":
        raise InputError("--cache keeps the programs of generation; right would be --job decode or prefill")
    if flags.gpu_target is not None and not Path(flags.gpu_target).is_file():
        raise InputError(f"--gpu_target {flags.gpu_target} is no file")
    if flags.compile and not flags.attached:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is compiled runs elsewhere


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What to compile: a job, its entry of the plan, its mesh of the compiler's devices, where to keep programs."""

    job: Job
    entry: MeshPlan
    mesh: Mesh
    keep: Target | None


def choose(flags: absl_flags.FlagValues, plan: Plan) -> Chosen:
    """What the flags say to compile; everything that can be refused is, before it takes time.

    Raises:
        InputError: the job fits no mesh, its compiler is not here, or planning only counts it.
        ShardingError: there is no such mesh, or it cannot hold the model.
    """
    from glm_jax.planning import warm
    from glm_jax.planning.compile import mesh_for
    from glm_jax.planning.lower import check_job

    check_job(plan.job)
    entry = _entry(flags, plan)
    job = dataclasses.replace(plan.job, rules=entry.rules)
    data, expert, tensor = entry.mesh.shape.values()
    target = None if flags.gpu_target is None else Path(flags.gpu_target).read_text(encoding="utf-8")
    mesh = mesh_for(plan.cluster, (data, expert, tensor), gpu_target=target, attached=flags.attached)
    if flags.cache is None:
        return Chosen(job, entry, mesh, None)
    keep = warm.Target(
        job=job,
        cluster=plan.cluster,
        sizes=(data, expert, tensor),
        root=flags.cache,
        gpu_target=target,
        attached=flags.attached,
    )
    warm.check_target(keep, mesh)
    return Chosen(job, entry, mesh, keep)


def run(flags: absl_flags.FlagValues, plan: Plan, chosen: Chosen) -> dict[str, Any]:
    """Compile what was chosen, and tell."""
    import jax

    from glm_jax.planning.compile import Estimate, compile_job

    axes, planned = dict(chosen.mesh.shape), Estimate.of(chosen.entry.held)
    try:
        _, report = compile_job(chosen.job, chosen.mesh)
    except jax.errors.JaxRuntimeError as error:
        refused = {"mesh": axes, "error": str(error).splitlines()[0]}
        if not flags.json:
            print(f"\nthe compiler refuses it: {refused['error']}")
        return {"ok": False, "compiled": refused}
    if not flags.json:
        _show(report, planned)
    compiled = {"mesh": axes, **_as_json(report, planned), "fits": report.total <= plan.cluster.device.memory}
    if chosen.keep is not None:
        compiled["cache"] = _warm(flags, chosen.keep)
    return {"ok": compiled["fits"], "compiled": compiled}


def _entry(flags: absl_flags.FlagValues, plan: Plan) -> MeshPlan:
    """The mesh of --mesh, or the first."""
    from glm_jax.sharding import describe
    from glm_jax.sharding.mesh import mesh_sizes

    if flags.mesh is None:
        if not plan.meshes or not plan.meshes[0].fits:
            raise InputError("--compile proves the first mesh that fits, and none does: more devices, or a smaller job")
        return plan.meshes[0]
    sizes = mesh_sizes(flags.mesh)
    for entry in plan.meshes:
        if tuple(entry.mesh.shape.values()) == sizes:
            return entry
    for refusal in plan.refused:
        if tuple(refusal.mesh.shape.values()) == sizes:
            raise ShardingError(refusal.reason)
    known = "; ".join(dict.fromkeys(describe(entry.mesh) for entry in plan.meshes))
    raise ShardingError(f"mesh {flags.mesh} is not of {plan.cluster.count} devices; these are: {known}")


def _as_json(report: Report, planned: Estimate) -> dict[str, Any]:
    sizes = ("arguments", "outputs", "aliased", "temporaries", "total")
    ratios = (planned.arguments / max(1, report.arguments), planned.total / max(1, report.total))
    return {
        "seconds": {"lower": report.lower_seconds, "compile": report.compile_seconds},
        "bytes_per_device": {name: getattr(report, name) for name in sizes},
        "planned": {"arguments": planned.arguments, "total": planned.total},
        "planned_of_compiled": dict(zip(("arguments", "total"), ratios, strict=True)),
        "collectives": [dataclasses.asdict(each) for each in report.sent],
        "moved": [dataclasses.asdict(each) for each in report.moved],
    }


def _show(report: Report, planned: Estimate) -> None:
    print(f"\ncompiled in {report.lower_seconds + report.compile_seconds:.1f} s; a device, beside the plan:")
    rows = []
    for name, said in (("arguments", planned.arguments), ("total", planned.total)):
        found = getattr(report, name)
        rows.append((name, f"{size(found):>11}", f"planned {size(said)}, x{said / max(1, found):.3f}"))
    rows.insert(1, ("temporaries", f"{size(report.temporaries):>11}", ""))
    print(printing.columns(rows, indent="  "))
    sent: dict[tuple[str, int, int], list[int]] = {}
    for each in report.sent:
        entry = sent.setdefault((each.kind, each.group, each.rounds), [0, 0])
        entry[0], entry[1] = entry[0] + each.times, entry[1] + each.times * each.nbytes
    for (kind, group, rounds), (times, nbytes) in sorted(sent.items()):
        more = "" if rounds == 1 else f" if the first of {rounds} rounds is enough"
        print(f"  {times} x {kind} among {group}, {size(nbytes)} in all{more}")
    for moved in report.moved[:SHOWN]:
        print(f"  {moved.times} x {moved.kind} of {moved.array} that computes nothing")


def _warm(flags: absl_flags.FlagValues, keep: Target) -> dict[str, Any]:
    from glm_jax.planning import warm

    programs = {}
    for done in warm.warm(keep, processes=flags.processes):
        programs[done.program] = done.seconds
        if not flags.json:
            print(f"  kept {done.program}: {done.seconds:.1f} s")
    return {"directory": str(warm.cache_of(keep)), "programs": programs}
