from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.model import Output
from glm_jax.training import Batch, cross_entropy, language_model_loss, pad_rows

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
LOGITS = (4 * RNG.normal(size=(3, 7, 32))).astype(np.float32)
MTP_LOGITS = (4 * RNG.normal(size=(3, 6, 32))).astype(np.float32)
TOKENS = RNG.integers(0, 32, (3, 7)).astype(np.int32)
LEARNT = RNG.random((3, 7)) < 0.5
BATCH = Batch(TOKENS, LEARNT, np.ones_like(LEARNT))


def reference(logits, shift):
    """torch's mean cross entropy, with the labels outside the loss mask ignored."""
    labels = torch.from_numpy(np.where(LEARNT, TOKENS, -100)[:, shift:]).long()
    rows = torch.from_numpy(logits[:, : labels.shape[1]])
    return torch.nn.functional.cross_entropy(rows.flatten(0, 1), labels.flatten(), ignore_index=-100).item()


def test_cross_entropy_equals_torch():
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(LOGITS).flatten(0, 1), torch.from_numpy(TOKENS).long().flatten(), reduction="none"
    )
    np.testing.assert_allclose(np.asarray(cross_entropy(LOGITS, TOKENS)).reshape(-1), expected, rtol=1e-5, atol=1e-5)


def test_the_decoder_predicts_one_token_ahead_and_mtp_two():
    output = Output(jnp.asarray(LOGITS), jnp.zeros((3, 7, 4)), jnp.asarray(MTP_LOGITS))
    metrics = language_model_loss(output, BATCH, mtp_weight=0.3)
    assert float(metrics.next_token) == pytest.approx(reference(LOGITS, 1), rel=1e-5)
    assert float(metrics.mtp) == pytest.approx(reference(MTP_LOGITS, 2), rel=1e-5)
    assert float(metrics.loss) == pytest.approx(reference(LOGITS, 1) + 0.3 * reference(MTP_LOGITS, 2), rel=1e-5)
    assert float(metrics.tokens) == LEARNT[:, 1:].sum()


def test_accuracy_counts_learnt_tokens():
    sure = 10 * np.eye(32, dtype=np.float32)[np.roll(TOKENS, -1, axis=1)]
    metrics = language_model_loss(Output(jnp.asarray(sure), jnp.zeros((3, 7, 4)), None), BATCH, mtp_weight=0.3)
    assert float(metrics.accuracy) == 1
    assert float(metrics.mtp) == 0
    assert float(metrics.loss) == float(metrics.next_token)


def test_rows_are_padded_on_the_right():
    batch = pad_rows([(TOKENS[0, :4], LEARNT[0, :4]), (TOKENS[1], LEARNT[1])], 8)
    np.testing.assert_array_equal(batch.tokens[0], [*TOKENS[0, :4], 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.padding_mask.sum(axis=1), [4, 7])
    assert not batch.loss_mask[0, 4:].any()
