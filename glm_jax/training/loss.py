"""Next-token cross entropy, for the decoder and for its MTP layer.

Written so that a vocabulary split over devices stays split: the label's logit is picked by a comparison, not by an
index, and the sums become all-reduces. Each loss is a mean over the whole batch's tokens in the loss mask.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from glm_jax.model import Output
from glm_jax.sharding import shift_left
from glm_jax.training.batch import Batch


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss", "next_token", "mtp", "accuracy", "mtp_accuracy", "tokens"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LossMetrics:
    """Scalars of one batch, float32.

    Attributes:
        loss: what is minimised, `next_token + mtp_weight * mtp`.
        next_token: mean cross entropy of the decoder, in nats.
        mtp: mean cross entropy of the MTP layer, over its drafts; 0 without one.
        accuracy: share of the tokens in the loss mask that the decoder's argmax has right.
        mtp_accuracy: the same of the MTP layer's first draft, over the tokens of the loss mask it can predict.
        tokens: number of tokens in the loss mask.
    """

    loss: jax.Array
    next_token: jax.Array
    mtp: jax.Array
    accuracy: jax.Array
    mtp_accuracy: jax.Array
    tokens: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] in float32: logits [..., V], labels int [...] -> [...]."""
    logits = logits.astype(jnp.float32)
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)


def language_model_loss(
    output: Output, batch: Batch, *, mtp_weight: float, draft_logits: tuple[jax.Array, ...] = ()
) -> LossMetrics:
    """The loss of a forward pass: the decoder's plus `mtp_weight` times the MTP layer's (if that ran).

    Row t of the logits is held against token t + 1, row t of the MTP logits against token t + 2, and of each further
    draft (`mtp_draft_logits`) against one token later; the MTP layer's is the mean over its drafts (DeepSeek-V3,
    arXiv 2412.19437, equations 24 and 25).
    """
    next_token, accuracy, tokens = _mean_loss(output.logits, batch, shift=1)
    if output.mtp_logits is None:
        zero = jnp.zeros_like(next_token)
        return LossMetrics(next_token, next_token, zero, accuracy, zero, tokens)
    drafts = [_mean_loss(rows, batch, shift=shift) for shift, rows in enumerate((output.mtp_logits, *draft_logits), 2)]
    mtp, mtp_accuracy = jnp.mean(jnp.stack([loss for loss, _, _ in drafts])), drafts[0][1]
    return LossMetrics(next_token + mtp_weight * mtp, next_token, mtp, accuracy, mtp_accuracy, tokens)


def _mean_loss(logits: jax.Array, batch: Batch, *, shift: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean loss, accuracy and number of the tokens, position t of the logits predicting token t + shift."""
    length = logits.shape[1]
    labels, mask = (shift_left(rows, shift)[:, :length] for rows in (batch.tokens, batch.loss_mask))
    mask = mask.astype(jnp.float32)
    count = jnp.sum(mask)
    divisor = jnp.maximum(count, 1.0)
    right = jnp.argmax(logits, axis=-1) == labels
    return jnp.sum(cross_entropy(logits, labels) * mask) / divisor, jnp.sum(right * mask) / divisor, count
