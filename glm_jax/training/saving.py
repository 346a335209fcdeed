"""A training run's state on disk, by Orbax: saved from one mesh, restored onto another, by any number of processes.

What is saved is the weights by name, the optimizer's state by the same names, and the number of steps. Every process
writes the parts that its devices hold; the directory gets its name when all is written.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp  # type: ignore[import-untyped]

from glm_jax.errors import CheckpointError
from glm_jax.sharding import map_weights
from glm_jax.training.step import TrainState, values_by_name


def save_state(state: TrainState, directory: str | os.PathLike[str]) -> None:
    """Write a state into a new directory, which all processes call with the same path on a shared disk.

    Raises:
        CheckpointError: the directory is there already, or cannot be written.
        InputError: the model's weights are quantised.
    """
    path = Path(directory).absolute()
    if path.exists():
        raise CheckpointError(f"{path} is there already; a state is saved into a new directory")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, _tree(state))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def restore_state(directory: str | os.PathLike[str], like: TrainState) -> TrainState:
    """Read a state, laid out as another one is: on its mesh, by its rules, whatever those that it was saved with.

    Args:
        directory: what `save_state` wrote.
        like: a state of the same model and optimizer, as `create_state` makes it; it is not consumed.

    Raises:
        CheckpointError: there is no such state, or it is of another model, form (stacked or not) or optimizer.
    """
    path = Path(directory).absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory; right would be one that a state was saved into")
    wanted = jax.tree.map(_abstract, _tree(like))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            held = checkpointer.metadata(path).item_metadata
            _check(path, held.tree if hasattr(held, "tree") else held, wanted)
            read = checkpointer.restore(path, wanted)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a training state: {_first_line(error)}") from error
    model = map_weights(lambda name, _: read["model"][name], like.model)
    return TrainState(model, read["optimizer"], read["step"])


def _tree(state: TrainState) -> dict[str, Any]:
    return {"model": values_by_name(state.model), "optimizer": state.optimizer, "step": state.step}


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _check(path: Path, held: Any, wanted: dict[str, Any]) -> None:
    """Compare the weights' names and shapes, which say best what is wrong."""
    there, here = held["model"], wanted["model"]
    missing, unknown = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    if missing or unknown:
        which = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which the model lacks"
        raise CheckpointError(f"{path} {which} ({len(missing)} weights missing, {len(unknown)} unknown)")
    for name, weight in here.items():
        if tuple(there[name].shape) != weight.shape:
            raise CheckpointError(f"{path}: {name} is {tuple(there[name].shape)}, the model's is {weight.shape}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
