"""jax's persistent compilation cache in a directory, so that a later process need not compile the same programs again.

jax keys each program by its code, its devices and the version of jax. Here each version of this package and of jax,
each architecture and each mesh has a directory of its own, so that a user can see which programs are obsolete and
delete them.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from glm_jax.configs import ModelConfig
from glm_jax.errors import InputError
from glm_jax.version import VERSION


def cache_directory(root: str | Path, config: ModelConfig, mesh: Mesh) -> Path:
    """The directory below `root` for the programs of a model on a mesh."""
    sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    digest = hashlib.sha256(repr(config).encode()).hexdigest()[:12]
    return Path(root) / f"{VERSION}-jax{jax.__version__}-{sizes}-{digest}"


def make_cache_directory(root: str | Path, config: ModelConfig, mesh: Mesh) -> Path:
    """Make that directory.

    Raises:
        InputError: there is a file, or it cannot be made or written to.
    """
    directory = cache_directory(root, config, mesh)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"--cache {root}: {reason}; right would be a directory to write to") from error
    return directory


def keep_programs(root: str | Path, config: ModelConfig, mesh: Mesh) -> Path:
    """Make this process read compiled programs from a directory below `root`, and write there what it compiles.

    Returns the directory.

    Raises:
        InputError: there is a file, or it cannot be made or written to.
    """
    directory = make_cache_directory(root, config, mesh)
    compilation_cache.reset_cache()  # jax opens its directory only once
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory
