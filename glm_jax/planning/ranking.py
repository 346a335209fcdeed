"""The order of meshes and rules: what fits first, then what is quick; and which one to take.

A step's time is a bound, of which real programs reach a half to three quarters. So of two bounds within a factor of
`SAME_TIME` it is not said which one is quicker in the end. Bytes are all but exact. Where rules are ranked, too, the
one taken therefore needs the fewest bytes of those whose bound is within that factor of the best, and is the quickest
of those that need hardly more (`SAME_BYTES`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from glm_jax.planning.job import DECODE, PREFILL, TRAIN
from glm_jax.planning.mesh_plan import MeshPlan
from glm_jax.sharding import Rules, rules_named

SAME_TIME = 1.5
SAME_BYTES = 1.1
_SERVING = ("default", "serve_latency", "serve_throughput", "long_context")
_PURPOSE = {DECODE: _SERVING, PREFILL: _SERVING, TRAIN: ("default", "train", "long_context")}


def candidates(kind: str) -> tuple[Rules, ...]:
    """The presets of rules that are for a kind of job."""
    return tuple(rules_named(name) for name in _PURPOSE[kind])


def on_mesh(rules: Rules, mesh: Mesh) -> Rules:
    """What rules come to on a mesh: axes of one device split nothing."""
    fields = [field.name for field in dataclasses.fields(rules) if isinstance(getattr(rules, field.name), tuple)]
    several: dict[str, Any] = {
        name: tuple(axis for axis in getattr(rules, name) if mesh.shape[axis] > 1) for name in fields
    }
    return dataclasses.replace(rules, **several)


def ranked(found: Sequence[MeshPlan], *, rules: int) -> list[MeshPlan]:
    """Entries in order: by the time of a step, or by bytes where that is not known; the one to take first.

    Args:
        found: in any order.
        rules: how many presets of rules they are of.
    """
    order = sorted(found, key=_rank)
    if rules > 1 and order:
        taken = _taken(order)
        order.remove(taken)
        order.insert(0, taken)
    return order


def _rank(entry: MeshPlan) -> tuple[Any, ...]:
    seconds = entry.times.step if entry.fits and entry.times is not None else 0.0
    return not entry.fits, seconds, entry.held.total, tuple(entry.mesh.shape.values())


def _taken(order: Sequence[MeshPlan]) -> MeshPlan:
    quickest = order[0]
    if not quickest.fits or quickest.times is None:
        return quickest
    limit = SAME_TIME * quickest.times.step
    near = [entry for entry in order if entry.fits and entry.times is not None and entry.times.step <= limit]
    fewest = min(entry.held.total for entry in near)
    return next(entry for entry in near if entry.held.total <= SAME_BYTES * fewest)
