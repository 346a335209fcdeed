"""GLM-4.5 in JAX and Flax: convert, load, run.

Names are imported when first used, so that `import glm_jax` and `glm_jax.configs` need no jax and take milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from glm_jax import configs
from glm_jax.errors import CheckpointError, ConfigError, Error, InputError, ShardingError, TextError
from glm_jax.version import VERSION

if TYPE_CHECKING:
    from glm_jax.checkpoint import convert, export, load
    from glm_jax.inference import generate
    from glm_jax.model import Transformer, count_parameters
    from glm_jax.serving import Chat
    from glm_jax.sharding import Rules, make_mesh

__version__ = VERSION

_LAZY = {
    "Chat": "glm_jax.serving",
    "Rules": "glm_jax.sharding",
    "Transformer": "glm_jax.model",
    "convert": "glm_jax.checkpoint",
    "count_parameters": "glm_jax.model",
    "export": "glm_jax.checkpoint",
    "generate": "glm_jax.inference",
    "load": "glm_jax.checkpoint",
    "make_mesh": "glm_jax.sharding",
}

__all__ = [
    "Chat",
    "CheckpointError",
    "ConfigError",
    "Error",
    "InputError",
    "Rules",
    "ShardingError",
    "TextError",
    "Transformer",
    "configs",
    "convert",
    "count_parameters",
    "export",
    "generate",
    "load",
    "make_mesh",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'glm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
