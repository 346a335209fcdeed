"""What the compiled programs of each preset send: tokens in serving, and in training each weight and gradient once."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import numpy as np
import optax
import pytest

from glm_jax import Rules, Transformer, configs
from glm_jax.sharding import rules_named, weights_by_name
from glm_jax.training import Batch, build_step, create_state, place
from tests.sharding.compiled import AS_USERS, collectives, compiled_step

BATCH, ROOM, PROMPT = 8, 64, 16
MODELS = {name: dataclasses.replace(configs.get(name), num_layers=2) for name in ("tiny-glm", "tiny-deepseek")}
HIDDEN, EXPERTS, CHOICES = 64, 8, 2
# The fewest numbers of a matrix that a stray gather would make: the keys' projection of two heads, split over two.
SMALLEST = 2 * 16 * HIDDEN // 2
# The most of each kind in one decode step of a dense layer and a layer of experts, and a token's choice.
DECODE = {
    "serve_latency": {"all-gather": 13, "all-to-all": 12, "reduce-scatter": 10, "all-reduce": 4},
    "serve_throughput": {"all-gather": 6, "reduce-scatter": 1},
    "long_context": {"all-gather": 5, "all-reduce": 9},
}


@pytest.fixture(scope="module")
def mesh(mesh_of_sizes) -> Any:
    return mesh_of_sizes((2, 2, 2))


@pytest.mark.parametrize("preset", DECODE)
@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_sends_tokens_and_no_weights(mesh, name, preset):
    sent = collectives(compiled_step(MODELS[name], mesh, batch=BATCH, length=ROOM, rules=rules_named(preset))[0])
    counts = collections.Counter(kind for kind, _ in sent)
    assert set(counts) <= set(DECODE[preset]), counts
    assert all(number <= DECODE[preset][kind] for kind, number in counts.items()), counts
    assert max(elements for _, elements in sent) < SMALLEST, sent


def prefill(name: str, mesh: Any, rules: Rules) -> list[tuple[str, int]]:
    return collectives(compiled_step(MODELS[name], mesh, kind="prefill", batch=BATCH, length=PROMPT, rules=rules)[0])


@pytest.mark.parametrize("name", MODELS)
def test_a_prefill_of_serve_throughput_exchanges_rows_and_nothing_else(mesh, name):
    """Rows to the experts, their experts, and results back; buffers hold a quarter more than even routing."""
    sent = prefill(name, mesh, dataclasses.replace(rules_named("serve_throughput"), dispatch="all_to_all"))
    exchanged = [elements for kind, elements in sent if kind == "all-to-all"]
    tokens = BATCH * PROMPT // 8
    assert len(exchanged) == 3 and max(exchanged) <= 1.25 * 1.6 * tokens * CHOICES * HIDDEN
    # CPUs choose the experts of all tokens on every device, which TPUs do not; and agree on the number of rounds.
    others = [elements for kind, elements in sent if kind != "all-to-all"]
    assert max(others) <= BATCH * PROMPT * EXPERTS, sent


@pytest.mark.parametrize("name", MODELS)
def test_a_prefill_of_long_context_gathers_keys_and_no_weights(mesh, name):
    """A part of a prompt: the latent vectors, or keys and values of a device's heads, of whole sequences."""
    sent = prefill(name, mesh, rules_named("long_context"))
    gathered = [elements for kind, elements in sent if kind == "all-gather"]
    tokens = BATCH // 2 * PROMPT
    assert max(gathered) <= tokens * HIDDEN, sent
    kinds = collections.Counter(kind for kind, _ in sent)
    assert set(kinds) <= {"all-gather", "all-reduce", "reduce-scatter"}, kinds


@pytest.mark.parametrize("name", ["tiny-glm", pytest.param("tiny-deepseek", marks=pytest.mark.slow)])
def test_training_gathers_what_is_split_by_fsdp_and_scatters_its_gradient(mesh, name):
    """A step of plain descent, which adds nothing to what the gradients send."""
    rules = dataclasses.replace(rules_named("train"), dispatch="all_to_all")
    model = Transformer.create(MODELS[name], mesh=mesh, rules=rules, stacked=True)
    optimizer, mask = optax.sgd(1e-3), np.ones((BATCH, PROMPT), bool)
    step: Any = build_step(optimizer)
    with jax.set_mesh(mesh):
        batch = place(Batch(mask.astype(np.int32), mask, mask), mesh, model.rules)
        sent = collectives(step.lower(create_state(model, optimizer), batch).compile(compiler_options=AS_USERS))
    kept = [w for w in weights_by_name(model).values() if split_by_fsdp(w)]
    scattered = [elements for kind, elements in sent if kind == "reduce-scatter"]
    assert len(scattered) >= len(kept) > 10
    # A gradient that is summed whole and then cut would show as a sum of the size of a matrix.
    summed = [elements for kind, elements in sent if kind == "all-reduce"]
    largest = 6144 // 2 if name == "tiny-deepseek" else 2 * PROMPT * HIDDEN  # keys and values of latent vectors
    assert max(summed) <= largest, sorted(summed)


def split_by_fsdp(weight: Any) -> bool:
    """Whether `fsdp` splits the weight: by the batch's axes, along a dimension that no other rule splits."""
    value = weight.get_raw_value()
    entries = value.sharding.spec[value.ndim - len(weight.axes) :]
    named = zip(weight.axes, entries, strict=False)
    return any(entry is not None and axis in ("embed", "rank") for axis, entry in named)
