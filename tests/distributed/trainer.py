"""One of several processes that train a tiny model together: from the start or a saved state, and save it.

Arguments: the report to write, HOST:PORT, count, index, the state to restore or "", the state to save, the mesh.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import glm_jax
from glm_jax.sharding import parse_mesh, rules_named
from glm_jax.training import restore_state, save_state
from tests.training.runs import build, train


def main() -> None:
    report, address, count, index, before, after, sizes = sys.argv[1:]
    glm_jax.distributed.start(coordinator=address, process_count=int(count), process_index=int(index))
    mesh = parse_mesh(sizes)
    state, step = build(mesh, rules_named("train"))
    if before:
        state = restore_state(before, state)
    state, losses = train(mesh, step, state, steps=2)
    save_state(state, after)
    Path(report).write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
