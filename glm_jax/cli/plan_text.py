"""A plan as a JSON object for scripts and as tables for people."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from glm_jax.cli import printing

if TYPE_CHECKING:
    from glm_jax.planning import Cluster, MeshPlan, Plan

SHOWN = 12


def as_json(model: str, plan: Plan) -> dict[str, Any]:
    """The plan for scripts; seconds are None where the speed of the device is not known."""
    job, device = plan.job, plan.cluster.device
    return {
        "model": model,
        "job": {
            "kind": job.kind,
            "batch": job.batch,
            "length": job.length,
            "weights": job.weights,
            "cache_dtype": None if job.kind == "train" else job.cache or job.dtype.name,
        },
        "device": {
            "kind": device.name,
            "count": plan.cluster.count,
            "topology": _topology(plan.cluster),
            "memory_bytes": device.memory,
            "speed": None if device.speed is None else dataclasses.asdict(device.speed),
        },
        "rules": _rules(plan),
        "meshes": [_mesh(entry, plan) for entry in plan.meshes],
        "refused": [{"mesh": dict(entry.mesh.shape), "reason": entry.reason} for entry in plan.refused],
    }


def _mesh(entry: MeshPlan, plan: Plan) -> dict[str, Any]:
    times, job = entry.times, plan.job
    return {
        "mesh": dict(entry.mesh.shape),
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


def show(model: str, plan: Plan) -> None:
    """Print the plan for people: what was asked, the meshes, the best one's parts, the refused ones."""
    job, cluster = plan.job, plan.cluster
    what = {"decode": "decode of", "prefill": "prefill of", "train": "training on"}[job.kind]
    cache = "" if job.kind == "train" else f", cache {job.cache or job.dtype.name}"
    rules = "" if _rules(plan) == "default" else f", rules {_rules(plan)}"
    print(f"{model}: {what} {job.batch} x {job.length} tokens, weights {job.weights}{cache}{rules}")
    shape = _topology(cluster)
    where = f" ({shape} chips)" if shape else ""
    print(f"{cluster.count} x {cluster.device.name}{where}, {size(cluster.device.memory)} each")
    print()
    _show_meshes(plan)
    if plan.meshes:
        _show_best(plan.meshes[0], plan)
    if plan.refused:
        print(f"\n{len(plan.refused)} meshes cannot hold the model:")
        rows = [(_written(entry.mesh.shape), entry.reason) for entry in plan.refused[:SHOWN]]
        print(printing.columns(rows, indent="  "))
        _show_rest(len(plan.refused))


def _show_meshes(plan: Plan) -> None:
    rows: list[tuple[str, ...]] = [("mesh", "a device", "", "largest batch", "largest length", "step", "bound by")]
    for entry in plan.meshes[:SHOWN]:
        step = ("", "") if entry.times is None else (_seconds(entry.times.step), entry.times.bound)
        fits = "fits" if entry.fits else "does not fit"
        room = (f"{entry.largest_batch}", f"{entry.largest_length}")
        rows.append((_written(entry.mesh.shape), size(entry.held.total), fits, *room, *step))
    print(printing.columns(rows))
    _show_rest(len(plan.meshes))


def _show_best(best: MeshPlan, plan: Plan) -> None:
    title = "the first" if best.fits else "none fits; the smallest"
    print(f"\n{title}: {_written(best.mesh.shape)}")
    parts = [(name, f"{size(count):>11}") for name, count in dataclasses.asdict(best.held).items() if count]
    rows = [*parts, ("total", f"{size(best.held.total):>11}")]
    if best.times is not None:
        rate = plan.job.batch * plan.job.queries / best.times.step
        rows += [(f"{name} time", f"{_seconds(each):>11}") for name, each in dataclasses.asdict(best.times).items()]
        rows.append(("at best", f"{rate:,.0f} tokens/s, bound by {best.times.bound}"))
    print(printing.columns(rows, indent="  "))
    for note in best.notes:
        print(f"  {note}")


def _show_rest(count: int) -> None:
    if count > SHOWN:
        print(f"  and {count - SHOWN} more (--json has all)")


def _rules(plan: Plan) -> str:
    from glm_jax.sharding.presets import name_of

    return name_of(plan.job.rules) or "of its own"


def _topology(cluster: Cluster) -> str | None:
    return None if cluster.topology is None else "x".join(map(str, cluster.topology))


def _written(sizes: Any) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def size(count: int) -> str:
    """Bytes for people."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"
