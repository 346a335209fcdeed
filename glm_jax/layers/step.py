"""What all layers of one forward pass share."""

from __future__ import annotations

import dataclasses
import functools

import jax

from glm_jax.layers.rope import Rotation
from glm_jax.sharding import take_position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Named implementations, chosen once per platform; `None` leaves the choice to the platform and token count.

    Attributes:
        experts: one of `layers.experts.IMPLEMENTATIONS`.
        dispatch: one of `layers.dispatch.DISPATCHES`; None leaves it to the model's rules, then to the tokens.
    """

    experts: str | None = None
    dispatch: str | None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["positions", "rotation"], meta_fields=["fresh", "kernels", "remat"]
)
@dataclasses.dataclass(frozen=True)
class Step:
    """One pass over tokens [B, T].

    Attributes:
        positions: int32 [B, T], the row of each token in its sequence and in the cache.
        rotation: the rotary angles of these positions.
        fresh: the sequences start in this pass (positions are 0..T-1), so that attention needs no cache.
        kernels: the implementations to use.
        remat: layers are computed anew in the backward pass, from their inputs.
    """

    positions: jax.Array
    rotation: Rotation
    fresh: bool
    kernels: Kernels
    remat: bool = False

    def only(self, row: jax.Array | None) -> Step:
        """The step of one row [B] of each sequence, which sees the others; without a row the step itself."""
        if row is None:
            return self
        cos, sin = (take_position(angles, row) for angles in (self.rotation.cos, self.rotation.sin))
        positions = take_position(self.positions[..., None], row)[..., 0]
        rotation = dataclasses.replace(self.rotation, cos=cos, sin=sin)
        return dataclasses.replace(self, positions=positions, rotation=rotation, fresh=False)
