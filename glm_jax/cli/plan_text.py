"""A plan as a JSON object for scripts and as tables for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm_jax.cli import printing
from glm_jax.cli.plan_loading import DIRECTORY, loading_lines

if TYPE_CHECKING:
    from glm_jax.cli.plan_model import ChosenWeights, PlannedModel
    from glm_jax.planning import Cluster, Job, MeshPlan, Plan
    from glm_jax.sharding import Rules

SHOWN = 12


def job_json(model: PlannedModel, job: Job, weights: ChosenWeights) -> dict[str, Any]:
    """What was asked, for scripts."""
    return {
        "model": model.name,
        "preset": model.preset,
        "job": {
            "kind": job.kind,
            "batch": job.batch,
            "length": job.length,
            "weights": job.format,
            "cache_dtype": None if job.kind == "train" else job.cache or job.dtype.name,
        },
        "stored_weights": None if model.stored is None else model.stored.describe(),
        "weights_as_stored": weights.stored is not None,
    }


def as_json(model: PlannedModel, plan: Plan, weights: ChosenWeights) -> dict[str, Any]:
    """The plan for scripts; seconds are None where the speed of the device is not known."""
    device = plan.cluster.device
    return {
        **job_json(model, plan.job, weights),
        "device": {
            "kind": device.name,
            "count": plan.cluster.count,
            "topology": topology_text(plan.cluster),
            "memory_bytes": device.memory,
            "speed": None if device.speed is None else dataclasses.asdict(device.speed),
        },
        "device_source": device.source,
        "rules": rules_text(plan.job.rules),
        "rules_tried": [rules_text(each) for each in plan.rules],
        "meshes": [_mesh(entry, plan) for entry in plan.meshes],
        "refused": [{"mesh": dict(entry.mesh.shape), "reason": entry.reason} for entry in plan.refused],
        "load": loading_lines(model, plan.job, plan.meshes[0], device) if plan.meshes else None,
    }


def _mesh(entry: MeshPlan, plan: Plan) -> dict[str, Any]:
    times, job = entry.times, plan.job
    return {
        "mesh": dict(entry.mesh.shape),
        "rules": rules_text(entry.rules),
        "bytes_per_device": {**dataclasses.asdict(entry.held), "total": entry.held.total},
        "fits": entry.fits,
        "largest_batch": entry.largest_batch,
        "largest_length": entry.largest_length,
        "step_seconds": None if times is None else times.step,
        "tokens_per_second": None if times is None else job.batch * job.queries / times.step,
        "bound_by": None if times is None else times.bound,
        "seconds": None if times is None else dataclasses.asdict(times),
        "operations_per_device": entry.work.operations,
        "memory_traffic_bytes": entry.work.traffic,
        "collectives": [
            {"what": each.what, "kind": each.kind, "axes": list(each.axes), "bytes": each.nbytes, "times": each.times}
            for each in entry.work.collectives
        ],
        "notes": list(entry.notes),
    }


def heading(name: str, job: Job, words: str) -> str:
    """What was asked, in a line."""
    what = {"decode": "decode of", "prefill": "prefill of", "train": "training on"}[job.kind]
    cache = "" if job.kind == "train" else f", cache {job.cache or job.dtype.name}"
    return f"{name}: {what} {job.batch} x {job.length} tokens, weights {job.format}{words}{cache}"


def show(model: PlannedModel, plan: Plan, weights: ChosenWeights) -> None:
    """Print the plan for people: what was asked, the meshes, the best one's parts, how to load so, the refused ones."""
    cluster = plan.cluster
    rules = (
        ""
        if len(plan.rules) > 1 or rules_text(plan.job.rules) == "default"
        else f", rules {rules_text(plan.job.rules)}"
    )
    print(heading(model.name, plan.job, weights.words) + rules)
    shape = topology_text(cluster)
    where = f" ({shape} chips)" if shape else ""
    print(f"{cluster.count} x {cluster.device.name}{where}, {size(cluster.device.memory)} each")
    print()
    _show_meshes(plan)
    if plan.meshes:
        _show_best(plan)
    if plan.meshes and plan.meshes[0].fits:
        _show_loading(model, plan)
    if plan.refused:
        print(f"\n{len(plan.refused)} meshes cannot hold the model:")
        rows = [(written(entry.mesh.shape), entry.reason) for entry in plan.refused[:SHOWN]]
        print(printing.columns(rows, indent="  "))
        _show_rest(len(plan.refused))


def _show_meshes(plan: Plan) -> None:
    several = len(plan.rules) > 1
    heads = ("mesh", *(["rules"] if several else []), "a device", "", "largest batch", "largest length")
    rows: list[tuple[str, ...]] = [(*heads, "step", "bound by")]
    for entry in plan.meshes[:SHOWN]:
        step = ("", "") if entry.times is None else (seconds_text(entry.times.step), entry.times.bound)
        fits = "fits" if entry.fits else "does not fit"
        room = (f"{entry.largest_batch}", f"{entry.largest_length}")
        place = (written(entry.mesh.shape), *([rules_text(entry.rules)] if several else []))
        rows.append((*place, size(entry.held.total), fits, *room, *step))
    print(printing.columns(rows))
    _show_rest(len(plan.meshes))


def _show_best(plan: Plan) -> None:
    best = plan.meshes[0]
    title = "the first" if best.fits else "none fits; the smallest"
    rules = f" by rules {rules_text(best.rules)}" if len(plan.rules) > 1 else ""
    print(f"\n{title}: {written(best.mesh.shape)}{rules}")
    parts = [(name, f"{size(count):>11}") for name, count in dataclasses.asdict(best.held).items() if count]
    rows = [*parts, ("total", f"{size(best.held.total):>11}")]
    if best.times is not None:
        rate = plan.job.batch * plan.job.queries / best.times.step
        rows += [(f"{name} time", f"{seconds_text(each):>11}") for name, each in dataclasses.asdict(best.times).items()]
        rows.append(("at best", f"{rate:,.0f} tokens/s, bound by {best.times.bound}"))
    print(printing.columns(rows, indent="  "))
    for note in (*best.notes, *_why(plan)):
        print(f"  {note}")


def _why(plan: Plan) -> list[str]:
    """Why another mesh is not the first although its step may be quicker."""
    best = plan.meshes[0]
    quicker = [each for each in plan.meshes[1:2] if each.fits and best.fits and each.times and best.times]
    return [
        f"{written(each.mesh.shape)} by {rules_text(each.rules)} may be quicker, at {size(each.held.total)} a device: "
        "such bounds do not tell which is"
        for each in quicker
        if each.times is not None and best.times is not None and each.times.step < best.times.step
    ]


def _show_loading(model: PlannedModel, plan: Plan) -> None:
    lines = loading_lines(model, plan.job, plan.meshes[0], plan.cluster.device)
    where = f" ({DIRECTORY}: a checkpoint of {model.preset})" if model.preset else ""
    print(f"\nto load so{where}:")
    for line in (*lines["prepare"], lines["command"], lines["python"]):
        if line is not None:
            print(f"  {line}")


def _show_rest(count: int) -> None:
    if count > SHOWN:
        print(f"  and {count - SHOWN} more (--json has all)")


def rules_text(rules: Rules) -> str:
    """The name of rules."""
    from glm_jax.sharding.presets import name_of

    return name_of(rules) or "of its own"


def topology_text(cluster: Cluster) -> str | None:
    """The shape of a slice of TPUs; None of other devices."""
    return None if cluster.topology is None else "x".join(map(str, cluster.topology))


def written(sizes: Mapping[str, int]) -> str:
    """A mesh as --mesh takes it."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def seconds_text(value: float) -> str:
    """A time for people."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def size(count: int) -> str:
    """Bytes for people."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"
