"""A state saved on one mesh goes on on another as if nothing had been between; what cannot be is one line."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

from glm_jax import CheckpointError
from glm_jax.sharding import rules_named
from glm_jax.training import restore_state, save_state
from tests.training.runs import build, train


@pytest.fixture(scope="module")
def saved(one_device, tmp_path_factory):
    """A state after two steps on one device, and the losses of two more."""
    directory = tmp_path_factory.mktemp("saving") / "state"
    state, step = build(one_device)
    state, _ = train(one_device, step, state, steps=2)
    save_state(state, directory)
    return directory, train(one_device, step, state, steps=2)[1]


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [
        ((2, 2, 2), "train"),
        *(pytest.param(sizes, "default", marks=pytest.mark.slow) for sizes in ((1, 1, 1), (1, 4, 2))),
    ],
)
def test_it_goes_on_elsewhere(saved, mesh_of_sizes, sizes, rules):
    directory, losses = saved
    mesh = mesh_of_sizes(sizes)
    fresh, step = build(mesh, rules_named(rules))
    state = restore_state(directory, fresh)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    assert int(state.step) == 2
    np.testing.assert_allclose(train(mesh, step, state, steps=2)[1], losses, rtol=2e-5)


def test_it_is_restored_bit_for_bit(saved, mesh_of_sizes, one_device, tmp_path):
    """Also after it was saved a second time, from eight devices."""
    directory, _ = saved
    mesh = mesh_of_sizes((2, 2, 2))
    save_state(restore_state(directory, build(mesh)[0]), tmp_path / "again")
    states = [restore_state(path, build(one_device)[0]) for path in (directory, tmp_path / "again")]
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_what_cannot_be(saved, one_device, tmp_path):
    directory, _ = saved
    state, _ = build(one_device)
    before = sorted(path.name for path in directory.rglob("*"))
    with pytest.raises(CheckpointError, match="state is there already"):
        save_state(state, directory)
    assert sorted(path.name for path in directory.rglob("*")) == before
    with pytest.raises(CheckpointError, match="nothing is no directory"):
        restore_state(tmp_path / "nothing", state)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read as a training state"):
        restore_state(tmp_path / "empty", state)
    shallow, _ = build(one_device, num_mtp_layers=0)
    with pytest.raises(CheckpointError, match=r"has mtp\..*, which the model lacks \(0 weights missing"):
        restore_state(directory, shallow)
    wide, _ = build(one_device, mlp_width=96)
    with pytest.raises(CheckpointError, match=r"dense\.mlp\.\w+ is .*, the model's is"):
        restore_state(directory, wide)
    weight = next(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > 4000)
    damaged = tmp_path / "damaged"
    shutil.copytree(directory, damaged)
    target = damaged / weight.relative_to(directory)
    target.write_bytes(target.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as a training state"):
        restore_state(damaged, state)
