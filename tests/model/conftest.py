"""Models of one dense layer and two of experts, made once for all tests: they are values, and no test changes them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest

from glm_jax import Transformer, configs
from glm_jax.configs import ModelConfig


def small(name: str) -> ModelConfig:
    """A tiny preset with three layers."""
    return dataclasses.replace(configs.get(name), num_layers=3)


@pytest.fixture(scope="session")
def created(mesh_of_sizes) -> Callable[..., Transformer]:
    """A function from a preset, a form and the sizes of a mesh to the small model with random weights."""

    @functools.cache
    def create(name: str, *, stacked: bool = False, sizes: tuple[int, int, int] = (1, 1, 1)) -> Transformer:
        return Transformer.create(small(name), mesh=mesh_of_sizes(sizes), seed=1, stacked=stacked)

    return create
