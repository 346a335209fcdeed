"""What all tests run under: jax on the CPU as eight devices, started here; child processes see none of that."""

from __future__ import annotations

import os

import pytest

DEVICES = 8


def _start_jax() -> None:
    """Start jax with the tests' own flags, which it reads once, and then put the environment back.

    Half of the time of compiling small programs goes into LLVM's optimisations, which change no arithmetic and no
    program of XLA's: level 0, unless XLA_FLAGS says otherwise.
    """
    before = os.environ.get("XLA_FLAGS")
    flags = [before or "", f"--xla_force_host_platform_device_count={DEVICES}"]
    if "xla_backend_optimization_level" not in flags[0]:
        flags.append("--xla_backend_optimization_level=0")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.devices()
    if before is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = before


os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_start_jax()


@pytest.fixture(scope="session")
def one_device():
    """The mesh of one device."""
    from glm_jax import make_mesh

    return make_mesh()


@pytest.fixture(scope="session")
def mesh_of_sizes():
    """A function from (data, expert, tensor) to the mesh of these sizes over the virtual devices."""
    from glm_jax import make_mesh

    return lambda sizes: make_mesh(data=sizes[0], expert=sizes[1], tensor=sizes[2])
