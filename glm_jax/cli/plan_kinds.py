"""A job on several kinds of devices: of each as many as asked, or the fewest that hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glm_jax.cli import printing
from glm_jax.cli.plan_loading import loading_lines
from glm_jax.cli.plan_text import heading, rules_text, seconds_text, size, topology_text, written
from glm_jax.errors import InputError

if TYPE_CHECKING:
    from glm_jax.cli.plan_model import ChosenWeights, PlannedModel
    from glm_jax.planning import Job, Plan
    from glm_jax.planning.kinds import Device
    from glm_jax.sharding import Rules


def kinds_row(model: PlannedModel, device: Device, plan: Plan | None, reason: str | None) -> dict[str, Any]:
    """One kind for scripts; without a plan only the reason why there is none."""
    row: dict[str, Any] = {"device": device.name, "memory_bytes": device.memory, "source": device.source}
    best = None if plan is None or not plan.meshes else plan.meshes[0]
    if plan is None or best is None:
        return {**row, "count": None, "fits": False, "reason": reason or "no mesh can hold the model"}
    times, job = best.times, plan.job
    return {
        **row,
        "count": plan.cluster.count,
        "topology": topology_text(plan.cluster),
        "fits": best.fits,
        "mesh": dict(best.mesh.shape),
        "rules": rules_text(best.rules),
        "bytes_per_device": best.held.total,
        "largest_batch": best.largest_batch,
        "largest_length": best.largest_length,
        "step_seconds": None if times is None else times.step,
        "tokens_per_second": None if times is None else job.batch * job.queries / times.step,
        "bound_by": None if times is None else times.bound,
        "load": loading_lines(model, job, best, device),
    }


def plan_kind(job: Job, device: Device, *, count: int | None, rules: Sequence[Rules]) -> tuple[Plan | None, str | None]:
    """The plan of a job on so many devices of a kind, or without a count on the fewest; or why there is none."""
    from glm_jax.planning import choose_cluster, make_plan
    from glm_jax.planning.smallest import smallest_cluster

    try:
        cluster = smallest_cluster(job, device, rules=rules) if count is None else choose_cluster(device, count=count)
    except InputError as error:
        return None, str(error)
    if cluster is None:
        return None, "fits on no number of them: more memory each, or a smaller job"
    return make_plan(job, cluster, rules=rules), None


def show_kinds(model: PlannedModel, job: Job, weights: ChosenWeights, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table for people."""
    print(heading(model.name, job, weights.words))
    print()
    several = len({row.get("rules") for row in rows if row["fits"]} | {"default"}) > 1
    head = (
        "device",
        "of each",
        "a device",
        "",
        "mesh",
        *(["rules"] if several else []),
        "step",
        "tokens/s",
        "bound by",
    )
    table: list[Sequence[str]] = [head]
    for row in rows:
        if row["count"] is None:
            table.append((row["device"], size(row["memory_bytes"]), "", "does not fit", *[""] * (len(head) - 4)))
            continue
        shape = f" ({row['topology']})" if row["topology"] else ""
        step = ("", "", "")
        if row["step_seconds"] is not None:
            step = (seconds_text(row["step_seconds"]), f"{row['tokens_per_second']:,.0f}", row["bound_by"])
        table.append(
            (
                f"{row['count']} x {row['device']}{shape}",
                size(row["memory_bytes"]),
                size(row["bytes_per_device"]),
                "fits" if row["fits"] else "does not fit",
                written(row["mesh"]),
                *([row["rules"]] if several else []),
                *step,
            )
        )
    print(printing.columns(table))
    for row in rows:
        if row["count"] is None:
            print(f"  {row['device']}: {row['reason']}")
    if any(row["fits"] for row in rows):
        print("\none kind alone shows its meshes, and the line that loads so (--json has that of each)")
