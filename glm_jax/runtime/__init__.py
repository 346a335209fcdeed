"""How a run starts and ends: the cluster, the rendezvous of its processes, the cache of compiled programs."""

from __future__ import annotations

from glm_jax.runtime import distributed
from glm_jax.runtime.compilation_cache import cache_directory, keep_programs, make_cache_directory

__all__ = ["cache_directory", "distributed", "keep_programs", "make_cache_directory"]
