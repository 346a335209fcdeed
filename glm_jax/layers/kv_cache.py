"""The key-value cache of one layer, or of a stacked group of layers, written in place.

The layout is [B, K, S, H] a layer, with a leading L where a group is stacked; latent attention has one "head", the
latent vector, whatever the number of query heads. A scatter at each sequence's own positions writes new tokens, inside
`shard_map` so that it stays local; S may be split over devices, each of which writes the positions that it has.
Compiled for real chips, a dynamic_update_slice into a stacked carry makes the TPU copy the whole cache into another
layout and back at every step, and [B, S, K, H] makes the GPU transpose it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from glm_jax.sharding import all_gather_dim, axes_of, short_repr

Zeros = Callable[[tuple[int, ...], tuple[str | None, ...]], jax.Array]  # an array by its shape and logical axes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class KvCache:
    """Keys and values [B, K, S, H], or [L, B, K, S, H] of a stacked group."""

    k: jax.Array
    v: jax.Array

    __repr__ = short_repr

    @property
    def length(self) -> int:
        """Tokens that the cache holds of each sequence."""
        return self.k.shape[-2]

    def write(self, k: jax.Array, v: jax.Array, positions: jax.Array, layer: jax.Array | None) -> KvCache:
        """Put k, v [B, T, K, H] at `positions` [B, T] (those beyond the cache are dropped)."""
        return KvCache(_scatter(self.k, k, positions, layer), _scatter(self.v, v, positions, layer))

    def read(self, layer: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The keys and values [B, K, S, H] of one layer (`layer` None where the cache is one layer's own)."""
        if layer is None:
            return self.k, self.v
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False)
        return take(self.k), take(self.v)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["latent"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Latent vectors and rotated shared keys, side by side: [B, 1, S, C], or [L, B, 1, S, C] of a stacked group.

    C is `MlaConfig.latent_dim`, 576 for DeepSeek-V3 and Kimi K2: keys and values of all heads are projected from it.
    A platform may want it padded with zeros (`kernels.storage`).
    """

    latent: jax.Array

    __repr__ = short_repr

    @property
    def length(self) -> int:
        """Tokens that the cache holds of each sequence."""
        return self.latent.shape[-2]

    def write(self, latent: jax.Array, positions: jax.Array, layer: jax.Array | None) -> LatentCache:
        """Put latent [B, T, C] at `positions` [B, T] (those beyond the cache are dropped)."""
        unused = self.latent.shape[-1] - latent.shape[-1]
        latent = jnp.pad(latent, [(0, 0), (0, 0), (0, unused)]) if unused else latent
        return LatentCache(_scatter(self.latent, latent[:, :, None], positions, layer))

    def read(self, layer: jax.Array | None) -> jax.Array:
        """The latent vectors [B, S, C] of one layer (`layer` None where the cache is one layer's own)."""
        latents = self.latent
        if layer is not None:
            latents = jax.lax.dynamic_index_in_dim(latents, layer, axis=0, keepdims=False)
        return latents[:, 0]


LayerCache = KvCache | LatentCache


def _scatter(cache: jax.Array, new: jax.Array, positions: jax.Array, layer: jax.Array | None) -> jax.Array:
    split = axes_of(cache, cache.ndim - 2)
    new, positions = all_gather_dim(new, 1), all_gather_dim(positions, 1)

    def local(cache: jax.Array, new: jax.Array, positions: jax.Array, layer: jax.Array) -> jax.Array:
        if new[..., 0].size == 1:
            # The same token twice: XLA turns a scatter of a single one into a choice between two whole caches.
            new, positions = jnp.repeat(new, 2, axis=1), jnp.repeat(positions, 2, axis=1)
        if (
            split
        ):  # each device writes the positions that it has; the others get an index out of bounds, and are dropped
            positions = positions - jax.lax.axis_index(split) * cache.shape[-2]
            positions = jnp.where(positions < 0, cache.shape[-2], positions)
        # One vector at a time: for a window over the heads a TPU would store the heads of a position side by side, and
        # copy the whole cache into that layout before each step and back after it.
        sequences, heads = jnp.arange(new.shape[0])[:, None, None], jnp.arange(new.shape[2])
        new, positions = new.astype(cache.dtype), positions[:, :, None]
        if cache.ndim == 4:
            return cache.at[sequences, heads, positions].set(new)
        return cache.at[layer, sequences, heads, positions].set(new)

    layer = jnp.int32(0) if layer is None else layer
    if jax.sharding.get_abstract_mesh().empty:
        return local(cache, new, positions, layer)
    return jax.shard_map(local, out_specs=jax.typeof(cache).sharding.spec)(cache, new, positions, layer)
