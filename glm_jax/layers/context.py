"""What all layers of one forward pass share."""

from __future__ import annotations

import dataclasses
import functools

import jax

from glm_jax.kernels import Ops
from glm_jax.layers.rope import Rotation
from glm_jax.sharding import select_token


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "rotation"],
    meta_fields=["prefill", "ops", "dispatch", "remat"],
)
@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """One pass over tokens [B, T].

    Attributes:
        positions: int32 [B, T], the position of each token in its sequence and in the cache.
        rotation: the rotary angles of these positions.
        prefill: the sequences start in this pass (positions are 0..T-1), so that attention needs no cache.
        ops: the operations to use.
        dispatch: how tokens get to their experts, a name of `layers.dispatch.DISPATCHES`; None lets the tokens decide.
        remat: the backward pass recomputes each layer from its input.
    """

    positions: jax.Array
    rotation: Rotation
    prefill: bool
    ops: Ops
    dispatch: str | None = None
    remat: bool = False

    def select(self, query_index: jax.Array | None) -> ForwardContext:
        """The pass of one query [B] of each sequence, which sees the others; without an index the pass itself."""
        if query_index is None:
            return self
        cos, sin = (select_token(angles, query_index) for angles in (self.rotation.cos, self.rotation.sin))
        positions = select_token(self.positions[..., None], query_index)[..., 0]
        rotation = dataclasses.replace(self.rotation, cos=cos, sin=sin)
        return dataclasses.replace(self, positions=positions, rotation=rotation, prefill=False)
