"""Checkpoints of two layers, one of each family, and the same on one device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

import glm_jax
from tests import published


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory) -> Callable[[str], Path]:
    """A function from a family to its random checkpoint in float32."""

    @functools.cache
    def written(model_type: str) -> Path:
        directory = tmp_path_factory.mktemp("hf") / model_type
        return published.checkpoint(directory, dtype="float32", model_type=model_type, num_hidden_layers=2)

    return written


@pytest.fixture(scope="session")
def single_of(checkpoint_of, one_device) -> Callable[[str], glm_jax.Transformer]:
    """A function from a family to its model on one device."""
    return functools.cache(lambda model_type: glm_jax.load(checkpoint_of(model_type), mesh=one_device, stacked=True))
