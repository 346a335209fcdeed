"""Drafts after the first: from the MTP layer's own outputs, each held against the token that it is for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax import InputError, configs
from glm_jax.model import Transformer
from glm_jax.model.transformer import forward
from glm_jax.sharding import rules_named
from glm_jax.training import (
    Batch,
    build_step,
    create_state,
    language_model_loss,
    place,
)
from glm_jax.training.mtp_drafts import mtp_draft_logits
from tests.operations import DENSE

TINY = dataclasses.replace(configs.get("tiny-glm"), num_layers=2)
LENGTH = 9
TOKENS = np.random.default_rng(0).integers(0, 64, (4, LENGTH)).astype(np.int32)
BATCH = Batch(TOKENS, TOKENS % 3 > 0, np.ones_like(TOKENS, np.bool_))


@pytest.fixture(scope="module")
def model(one_device) -> Transformer:
    return Transformer.create(TINY, mesh=one_device, dtype=jnp.float32, stacked=True)


def passes(model, tokens, drafts, *, remat=False):
    """A forward pass and the logits of its further drafts."""

    @jax.jit
    def run(model, tokens):
        output = forward(model, tokens, mtp=True, ops=DENSE)
        return output, mtp_draft_logits(model, tokens, output, drafts=drafts, ops=DENSE, remat=remat)

    with jax.set_mesh(model.mesh):
        return run(model, jnp.asarray(tokens))


@jax.jit
def _one_pass(model, embedded, states, context):
    """The MTP layer's outputs and logits."""
    states, _, _ = model.mtp(embedded, states, context, None)
    return states, model.logits(states)


@pytest.mark.parametrize("remat", [False, True])
def test_each_draft_is_the_layer_on_the_output_before_it(model, remat):
    output, draft_logits = passes(model, TOKENS, 4, remat=remat)
    assert [rows.shape[1] for rows in draft_logits] == [LENGTH - 2, LENGTH - 3, LENGTH - 4]
    states = output.mtp_hidden
    with jax.set_mesh(model.mesh):
        for distance, rows in enumerate(draft_logits, 2):
            length = LENGTH - distance
            context = model.context(jnp.tile(jnp.arange(length), (4, 1)), prefill=True, ops=DENSE)
            embedded = model.embedding(jnp.asarray(TOKENS[:, distance:]))
            states, logits = _one_pass(model, embedded, states[:, :length], context)
            np.testing.assert_allclose(rows, logits, atol=1e-4)


@pytest.mark.parametrize("drafts", [1, 3])
def test_the_loss_is_the_mean_over_drafts(model, drafts):
    output, draft_logits = passes(model, TOKENS, drafts)
    losses = []
    for shift, rows in enumerate((output.mtp_logits, *draft_logits), 2):
        logits, labels = np.asarray(rows, np.float64), TOKENS[:, shift:]
        logits = logits[:, : labels.shape[1]]
        mask = np.asarray(BATCH.loss_mask)[:, shift:]
        likelihood = np.take_along_axis(logits, labels[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
        losses.append(-likelihood[mask].mean())
    assert len(losses) == drafts
    metrics = language_model_loss(output, BATCH, mtp_weight=0.5, draft_logits=draft_logits)
    assert float(metrics.mtp) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics.loss) == pytest.approx(float(metrics.next_token) + 0.5 * np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("length", [1, 3])
def test_short_sequences_have_fewer_drafts(model, length):
    _, draft_logits = passes(model, TOKENS[:, :length], 8)
    assert [rows.shape[1] for rows in draft_logits] == list(range(length - 2, 0, -1))


def test_a_step_learns_them(one_device):
    losses = {}
    for drafts in (1, 3):
        model = Transformer.create(TINY, mesh=one_device, dtype=jnp.float32, stacked=True)
        optimizer = optax.adam(2e-2)
        step = build_step(optimizer, mtp_drafts=drafts, mtp_weight=1.0, ops=DENSE)
        state = create_state(model, optimizer)
        with jax.set_mesh(one_device):
            for _ in range(8):
                state, _ = step(state, place(BATCH, one_device))
        output, draft_logits = passes(state.model, TOKENS, 3)
        losses[drafts] = float(language_model_loss(output, BATCH, mtp_weight=1.0, draft_logits=draft_logits).mtp)
    assert losses[3] < losses[1] - 0.1


def test_what_cannot_be(model, mesh_of_sizes):
    optimizer = optax.sgd(0.1)
    with pytest.raises(InputError, match=r"mtp_drafts must be at least 1, not 0"):
        build_step(optimizer, mtp_drafts=0)
    mesh, rules = mesh_of_sizes((1, 4, 2)), rules_named("long_context")
    split = Transformer.create(TINY, mesh=mesh, rules=rules, dtype=jnp.float32, stacked=True)
    step = build_step(optimizer, mtp_drafts=2, ops=DENSE)
    batch = Batch(*(np.tile(rows, (1, 2))[:, :16] for rows in dataclasses.astuple(BATCH)))
    with jax.set_mesh(mesh), pytest.raises(InputError, match="mtp_drafts 2 needs whole sequences"):
        step(create_state(split, optimizer), place(batch, mesh, rules))
