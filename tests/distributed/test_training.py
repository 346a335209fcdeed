"""Two processes train together, save, and another number of processes goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.sharding import weights_by_name
from glm_jax.training import restore_state, save_state
from tests.distributed.launch import free_port, spawn, wait
from tests.training.runs import build, train


def trainers(directory: Path, *, before: Any, after: Path, mesh: str) -> list[list[float]]:
    """The losses that two processes of two devices report of two steps."""
    script, address = Path(__file__).with_name("trainer.py"), f"127.0.0.1:{free_port()}"
    reports = [directory / f"{after.name}-{index}.json" for index in range(2)]
    ended = wait(spawn(2, 2, lambda index: [script, reports[index], address, 2, index, before, after, mesh]))
    assert [process.status for process in ended] == [0, 0], [process.err[-2000:] for process in ended]
    return [json.loads(report.read_text()) for report in reports]


@pytest.fixture(scope="module")
def alone(one_device, tmp_path_factory):
    """The states of one process on one device after two steps, saved, and after four; and the losses of all."""
    directory = tmp_path_factory.mktemp("alone") / "two"
    state, step = build(one_device)
    state, first = train(one_device, step, state, steps=2)
    save_state(state, directory)
    state, second = train(one_device, step, state, steps=2)
    return directory, state, first, second


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_saved(alone, mesh_of_sizes, tmp_path):
    _, state, first, second = alone
    for losses in trainers(tmp_path, before="", after=tmp_path / "two", mesh="data=2,tensor=2"):
        np.testing.assert_allclose(losses, first, rtol=2e-5)
    mesh = mesh_of_sizes((1, 4, 2))
    fresh, step = build(mesh)
    restored, losses = train(mesh, step, restore_state(tmp_path / "two", fresh), steps=2)
    np.testing.assert_allclose(losses, second, rtol=2e-5)
    expected = weights_by_name(state.model)
    for name, weight in weights_by_name(restored.model).items():
        np.testing.assert_allclose(weight.get_raw_value(), expected[name].get_raw_value(), atol=5e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_go_on_from_what_one_saved(alone, one_device, tmp_path):
    directory, state, _, second = alone
    for losses in trainers(tmp_path, before=directory, after=tmp_path / "four", mesh="expert=2,tensor=2"):
        np.testing.assert_allclose(losses, second, rtol=2e-5)
    restored = restore_state(tmp_path / "four", build(one_device)[0])
    assert int(restored.step) == 4
    for ours, theirs in zip(jax.tree.leaves(restored.optimizer), jax.tree.leaves(state.optimizer), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
