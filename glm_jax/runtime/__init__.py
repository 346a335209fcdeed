"""How a run starts: its cluster, how its processes meet and end together, where its compiled programs are kept."""

from __future__ import annotations

from glm_jax.runtime import distributed
from glm_jax.runtime.compilation_cache import cache_directory, keep_programs, make_cache_directory

__all__ = ["cache_directory", "distributed", "keep_programs", "make_cache_directory"]
