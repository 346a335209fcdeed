"""The checkpoint that several processes share: converted once, by one of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import glm_jax
from glm_jax.runtime import distributed
from tests.cli.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def orbax(tmp_path_factory) -> Path:
    """An Orbax directory of random weights."""
    directory = tmp_path_factory.mktemp("several")
    glm_jax.convert(write_checkpoint(directory / "hf"), directory / "orbax")
    return directory / "orbax"


@pytest.fixture
def alone(monkeypatch) -> None:
    """An environment that names no other process, as if nothing had been started."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "GLM_JAX_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(distributed, "_started", None)
