"""GLM-4.5 in JAX and Flax: convert, load, run.

Names are imported when first used, so that `import glm_jax` and `glm_jax.configs` need no jax and take milliseconds.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from glm_jax import configs
from glm_jax.errors import CheckpointError, ConfigError, Error, InputError, ShardingError, TextError
from glm_jax.version import VERSION

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from glm_jax import serving
    from glm_jax.checkpoint.convert import convert
    from glm_jax.checkpoint.export import export
    from glm_jax.checkpoint.load import load
    from glm_jax.inference import generate
    from glm_jax.model import Transformer, count_parameters
    from glm_jax.runtime import distributed
    from glm_jax.sharding import Rules, make_mesh

__version__ = VERSION

_LAZY = {
    "Rules": "glm_jax.sharding",
    "Transformer": "glm_jax.model",
    "convert": "glm_jax.checkpoint",
    "count_parameters": "glm_jax.model",
    "distributed": "glm_jax.runtime",
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
    "distributed",
    "export",
    "generate",
    "load",
    "make_mesh",
]


def Chat(
    checkpoint: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    dtype: Any = None,
    quantized: str = "keep",
    layers: slice | str | None = None,
    allow_unknown: Collection[str] = (),
) -> serving.Chat:
    """Open a checkpoint to talk to: text in, text out, in thinking mode or without, with tools.

    It stands here because `glm_jax.serving` knows models, not checkpoints. What is quick to read comes first, so that a
    missing tokenizer shows before the weights are loaded.

    Args:
        checkpoint: an Orbax or a Hugging Face directory, or the URL of the latter.
        mesh: where the weights go; over all devices by default.
        rules: placement of logical axes.
        dtype: of the weights; by default float32 on CPU and bfloat16 elsewhere.
        quantized: whether quantised weights stay so (`keep`) or not (`dequantize`), as `glm_jax.load`.
        layers: only these decoder layers, as `glm_jax.load`.
        allow_unknown: keys of config.json to pass over, as `glm_jax.load`.

    Raises:
        TextError: tokenizer, template or stop tokens are missing or unreadable, or are not the model's.
        CheckpointError, ConfigError, InputError, ShardingError: as `glm_jax.load`.
    """
    from glm_jax import checkpoint as checkpoints
    from glm_jax import serving
    from glm_jax.checkpoint.text_files import text_files

    with text_files(checkpoint) as files:
        text = serving.TextProcessor.load(files)
    options: dict[str, Any] = {"mesh": mesh, "rules": rules, "dtype": dtype, "allow_unknown": allow_unknown}
    model = checkpoints.load(os.fspath(checkpoint), quantized=quantized, layers=layers, **options)
    return serving.Chat(model, text)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'glm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
