"""Checkpoints: Hugging Face safetensors in, one Orbax layout, and back; loading onto a mesh from either."""

from __future__ import annotations

from glm_jax.checkpoint.convert import Report, convert
from glm_jax.checkpoint.export import export
from glm_jax.checkpoint.load import load, open_source

__all__ = ["Report", "convert", "export", "load", "open_source"]
