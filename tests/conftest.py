"""What all tests run under: jax on the CPU as eight devices, and one cache of compiled programs.

Child processes see the cache, by the environment, and not the devices and flags.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

DEVICES = 8
# Compiled programs of earlier runs, of the other workers and of child processes. jax keys each by its code, its flags
# and its version. Nothing is ever evicted, so a run that finds more than this starts anew.
PROGRAMS = Path(__file__).parents[1] / ".jax_cache"
MOST_BYTES = 2**30


# Compiling is what most tests wait for. Without LLVM's optimisations, and on jax 0.10 (later ones do not know the flag,
# and abort) with the older of XLA's two ways to emit code, it takes a third of the time. XLA plans and sends the same.
OPTIMIZE = "xla_backend_optimization_level"
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def _start_jax() -> None:
    """Start jax with the tests' own flags, which it reads once, and then put the environment back.

    With XLA_FLAGS=--xla_backend_optimization_level=3 the tests run on what users run, and on eight devices.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    before = os.environ.get("XLA_FLAGS")
    flags = [before or "", f"--xla_force_host_platform_device_count={DEVICES}"]
    if OPTIMIZE not in flags[0]:
        flags += [f"--{OPTIMIZE}=0", OLDER_EMITTERS if jax.__version__.startswith("0.10.") else ""]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    jax.devices()
    if before is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = before


def _share_programs() -> None:
    """Let this process and its children keep compiled programs in one directory.

    An entry that cannot be read or written (a worker that was killed leaves half a file) costs a compilation and a
    warning, which setup.cfg allows; child processes do not say it, since tests read what they say.
    """
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if not is_worker and sum(path.stat().st_size for path in PROGRAMS.glob("*")) > MOST_BYTES:
        shutil.rmtree(PROGRAMS)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
    quiet = (f"ignore:Error {verb} persistent compilation cache entry:UserWarning" for verb in ("reading", "writing"))
    os.environ["PYTHONWARNINGS"] = ",".join([*filter(None, [os.environ.get("PYTHONWARNINGS")]), *quiet])


os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_share_programs()
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


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_go_with_their_module():
    """Every program that XLA compiles for a CPU takes memory maps, and a process may have some 65,000 of them."""
    yield
    import jax

    jax.clear_caches()
