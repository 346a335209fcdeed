"""What the compiled programs of each preset send: tokens in serving, and in training each weight and gradient once."""

from __future__ import annotations

import collections
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import glm_jax
from glm_jax.kernels import Ops
from glm_jax.model import create_cache
from glm_jax.sharding import batch_sharding, rules_named, weights_by_name
from glm_jax.training import place
from tests import decoding, published
from tests.operations import DENSE, EXCHANGE
from tests.sharding.compiled import collectives
from tests.sharding.test_strategies import FAMILIES, training_batch, training_loss

BATCH, ROOM, PROMPT = 8, 64, 16
MESH = (2, 2, 2)
HIDDEN, VOCABULARY, CHOICES = (published.BASE[key] for key in ("hidden_size", "vocab_size", "num_experts_per_tok"))
# The fewest numbers of a matrix that a stray gather would make: the keys' projection of two heads, split over two.
SMALLEST = 2 * 16 * HIDDEN // 2
# The most of each kind in one decode step of a dense layer and a layer of experts.
DECODE = {
    "serve_latency": {"all-gather": 11, "all-to-all": 12, "reduce-scatter": 10, "all-reduce": 4},
    "serve_throughput": {"all-gather": 6, "reduce-scatter": 1},
    "long_context": {"all-gather": 3, "all-reduce": 9},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, mesh_of_sizes) -> Any:
    @functools.cache
    def written(model_type: str) -> Path:
        directory = tmp_path_factory.mktemp("hf") / model_type
        return published.checkpoint(directory, dtype="float32", model_type=model_type, num_hidden_layers=2)

    @functools.cache
    def load(model_type: str, preset: str) -> Any:
        mesh, rules = mesh_of_sizes(MESH), rules_named(preset)
        return glm_jax.load(written(model_type), mesh=mesh, rules=rules, stacked=preset == "train")

    return load


def step(model: Any, length: int, ops: Ops = DENSE) -> list[tuple[str, int]]:
    """What one step of `length` tokens a sequence sends."""
    with jax.set_mesh(model.mesh):
        cache = create_cache(model, BATCH, ROOM)
        placing = batch_sharding(BATCH, model.mesh, model.rules, length=length)
        tokens = jax.device_put(np.zeros((BATCH, length), np.int32), placing)
        lowered = decoding.run.lower(model, tokens, tokens, cache, prefill=length > 1, ops=ops)
        return collectives(lowered.compile())


@pytest.mark.parametrize("preset", DECODE)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_decode_step_sends_tokens_and_no_weights(loaded, model_type, preset):
    sent = step(loaded(model_type, preset), 1)
    counts = collections.Counter(kind for kind, _ in sent)
    assert set(counts) <= set(DECODE[preset]), counts
    assert all(number <= DECODE[preset][kind] for kind, number in counts.items()), counts
    assert max(elements for _, elements in sent) < SMALLEST, sent


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_prefill_of_serve_throughput_exchanges_rows_and_nothing_else(loaded, model_type):
    """Rows to the experts, their experts, and results back; buffers hold a quarter more than even routing."""
    sent = step(loaded(model_type, "serve_throughput"), PROMPT, EXCHANGE)
    exchanged = [elements for kind, elements in sent if kind == "all-to-all"]
    tokens = BATCH * PROMPT // 8
    assert len(exchanged) == 3 and max(exchanged) <= 1.25 * 1.6 * tokens * CHOICES * HIDDEN
    # CPUs choose the experts of all tokens on every device, which TPUs do not; and agree on the number of rounds.
    others = [elements for kind, elements in sent if kind != "all-to-all"]
    assert max(others) <= BATCH * PROMPT * published.BASE["n_routed_experts"], sent


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_prefill_of_long_context_gathers_keys_and_no_weights(loaded, model_type):
    """A part of a prompt: the latent vectors, or keys and values of a device's heads, of whole sequences."""
    model = loaded(model_type, "long_context")
    sent = step(model, PROMPT)
    gathered = [elements for kind, elements in sent if kind == "all-gather"]
    tokens = BATCH // 2 * PROMPT
    assert max(gathered) <= tokens * HIDDEN, sent
    kinds = collections.Counter(kind for kind, _ in sent)
    assert set(kinds) <= {"all-gather", "all-reduce", "reduce-scatter"}, kinds


@pytest.mark.parametrize("model_type", FAMILIES)
def test_training_gathers_what_is_kept_apart_and_scatters_its_gradient(loaded, model_type):
    model = loaded(model_type, "train")
    with jax.set_mesh(model.mesh):
        batch = place(training_batch(), model.mesh, model.rules)
        sent = collectives(jax.jit(jax.grad(training_loss)).lower(model, batch).compile())
    kept = [w for n, w in weights_by_name(model).items() if is_apart(w)]
    scattered = [elements for kind, elements in sent if kind == "reduce-scatter"]
    assert len(scattered) >= len(kept) > 10
    # A gradient that is summed whole and then cut would show as a sum of the size of a matrix.
    summed = [elements for kind, elements in sent if kind == "all-reduce"]
    largest = 5376 // 2 if model_type == "deepseek_v3" else 2 * PROMPT * HIDDEN  # keys and values of latent vectors
    assert max(summed) <= max(largest, 2 * PROMPT * HIDDEN), sorted(summed)


def is_apart(weight: Any) -> bool:
    """Whether `fsdp` splits the weight: by the batch's axes, along a dimension that no other rule splits."""
    value = weight.get_raw_value()
    entries = value.sharding.spec[value.ndim - len(weight.axes) :]
    named = zip(weight.axes, entries, strict=False)
    return any(entry is not None and axis in ("embed", "rank") for axis, entry in named)
