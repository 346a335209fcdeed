"""Drafts of the MTP layer from its own outputs, for training: what speculative decoding does after its first draft.

The one layer is applied again and again (as in GLM-5: from Vibe Coding to Agentic Engineering): the draft of distance
d comes from the embedding of the token before it and the layer's output at distance d - 1. All starts are computed at
once, so that a draft sees the keys of earlier starts at its own distance, where decoding has those of the main model's
states.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm_jax.errors import InputError
from glm_jax.kernels import Ops
from glm_jax.model import Output, Transformer
from glm_jax.model.transformer import run_mtp
from glm_jax.sharding import axes_of


def mtp_draft_logits(
    model: Transformer, tokens: jax.Array, output: Output, *, drafts: int, ops: Ops | None = None, remat: bool
) -> tuple[jax.Array, ...]:
    """The logits of drafts 2 to `drafts`, after the first in `output.mtp_logits`.

    Args:
        model: with an MTP layer.
        tokens: int32 [B, T].
        output: of a forward pass over them with `mtp`.
        drafts: how many in all.
        ops: the operations to use, by default the model's own.
        remat: as for the forward pass.

    Returns:
        float32 [B, T - d, V] for d = 2, ..., row t predicting token t + d + 1; none where no rows are left.

    Raises:
        InputError: the sequences are split over devices.
    """
    if drafts > 1 and axes_of(tokens, 1):
        raise InputError(
            f"mtp_drafts {drafts} needs whole sequences, and these rules split them over devices: use mtp_drafts 1, "
            "or rules that give the length no axis"
        )
    states, found = output.mtp_hidden, []
    for distance in range(2, min(drafts, tokens.shape[1] - 1) + 1):
        assert states is not None
        states, following = states[:, :-1], tokens[:, distance:]
        positions = jnp.zeros_like(following) + jnp.arange(following.shape[1], dtype=jnp.int32)
        context = model.context(positions, prefill=True, ops=ops, remat=remat)
        states, _ = run_mtp(model, model.embedding(following), states, context)
        found.append(model.logits(states, ops=ops))
    return tuple(found)
