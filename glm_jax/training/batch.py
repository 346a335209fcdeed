"""What one training step reads: rows of tokens, padded on the right."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh

from glm_jax.sharding import Rules, batch_sharding, short_repr


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens", "loss_mask", "padding_mask"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """B sequences of T tokens.

    Attributes:
        tokens: int32 [B, T].
        loss_mask: bool [B, T], the tokens whose prediction is trained (the first of a row never is).
        padding_mask: bool [B, T], false for padding. Attention is causal, so padding on the right changes nothing
            before it; it must only be kept out of the experts' loads.
    """

    tokens: jax.Array | np.ndarray
    loss_mask: jax.Array | np.ndarray
    padding_mask: jax.Array | np.ndarray

    __repr__ = short_repr


def pad_rows(rows: list[tuple[np.ndarray, np.ndarray]], length: int) -> Batch:
    """Return (tokens [T], loss_mask [T]) rows of unequal length as a batch of `length`, padded with token 0."""
    shape = (len(rows), length)
    tokens, loss_mask, padding_mask = np.zeros(shape, np.int32), np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for i, (ids, mask) in enumerate(rows):
        tokens[i, : len(ids)], loss_mask[i, : len(ids)], padding_mask[i, : len(ids)] = ids, mask, True
    return Batch(tokens, loss_mask, padding_mask)


def place(batch: Batch, mesh: Mesh, rules: Rules | None = None) -> Batch:
    """The batch on the mesh, its rows and their tokens split over the axes that the rules give batch and length."""
    rows, length = batch.tokens.shape
    return jax.device_put(batch, batch_sharding(rows, mesh, rules, length=length))
