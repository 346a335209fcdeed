"""What all tests run under: the CPU as eight devices, set before jax starts, and few threads for torch."""

from __future__ import annotations

import os

DEVICES = 8

# jax reads these once, when it starts; pytest imports this file before any test. With xdist each worker does.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def one_device():
    """The mesh of one device."""
    from glm_jax import make_mesh

    return make_mesh()


@pytest.fixture(scope="session")
def mesh_of_sizes():
    """A function from (data, expert, tensor) to the mesh of these sizes over the virtual devices."""
    import jax

    from glm_jax import make_mesh

    if len(jax.devices()) < DEVICES:
        pytest.skip(f"needs {DEVICES} virtual devices: jax started before the tests could ask for them")
    return lambda sizes: make_mesh(data=sizes[0], expert=sizes[1], tensor=sizes[2])
