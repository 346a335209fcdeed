"""The decoder: layers in groups, the whole transformer, its cache, its parameter counts."""

from __future__ import annotations

from glm_jax.model.allocate import abstract_cache, create_cache
from glm_jax.model.cache import Cache
from glm_jax.model.count import ParameterCounts, count_parameters
from glm_jax.model.transformer import Output, Transformer

__all__ = ["Cache", "Output", "ParameterCounts", "Transformer", "abstract_cache", "count_parameters", "create_cache"]
