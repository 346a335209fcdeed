"""A model on many devices is the same model: logits, tokens and MTP on every mesh, and what its compiled steps send."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import glm_jax
from glm_jax import Rules, ShardingError, configs
from glm_jax.kernels import with_implementations
from glm_jax.layers.dispatch import run_experts
from glm_jax.sharding import default_mesh, describe, parse_mesh, weights_by_name
from glm_jax.sharding.rules import batch_axes
from tests import decoding, published
from tests.operations import CPU, DENSE, EXPERTS
from tests.sharding.compiled import collectives, compiled_step

MESHES = {"1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8), "2x2x2": (2, 2, 2), "1x4x2": (1, 4, 2), "8x1x1": (8, 1, 1)}
SHAPE = {"num_hidden_layers": 2, "num_key_value_heads": 8}
PROMPTS = [[5], [3, 1, 4], list(range(15)), [7] * 9]
# The cheapest implementation to compile; the others have tests of their own below.
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 11},
    "filtered": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return published.checkpoint(tmp_path_factory.mktemp("hf") / "model", dtype="float32", **SHAPE)


@pytest.fixture(scope="module")
def single(checkpoint, one_device) -> Any:
    return glm_jax.load(checkpoint, mesh=one_device, stacked=True)


@pytest.fixture(scope="module")
def expected(single) -> Callable[[str], list[list[int]]]:
    """The tokens that one device generates with a setting."""
    return functools.cache(lambda name: glm_jax.generate(single, PROMPTS, max_new_tokens=12, **SETTINGS[name]))


def check_equal(sharded: Any, single: Any, tokens: np.ndarray) -> None:
    left, right = sharded(tokens, mtp=True, ops=DENSE), single(tokens, mtp=True, ops=DENSE)
    for name in ("logits", "mtp_logits"):
        one, two = np.asarray(getattr(left, name)), np.asarray(getattr(right, name))
        assert np.abs(one - two).max() <= 1e-4 * two.std(), name


def check_decode(sharded: Any, single: Any) -> None:
    """Prefill and decode of unequal rows on many devices give the logits of the whole pass on one."""
    tokens = published.tokens(4, 9)
    reference = np.asarray(single(tokens, ops=DENSE).logits)
    logits = decoding.teacher_forced(sharded, tokens, np.array([1, 4, 8, 6]), ops=DENSE)
    assert np.abs(logits - reference).max() <= 1e-4 * reference.std()


# --- the same results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "batch"), [*((sizes, 8) for sizes in MESHES.values()), ((1, 4, 2), 3), ((8, 1, 1), 3)], ids=str
)
def test_logits_and_mtp_logits(checkpoint, single, mesh_of_sizes, sizes, batch):
    model = glm_jax.load(checkpoint, mesh=mesh_of_sizes(sizes), stacked=batch == 8)
    check_equal(model, single, published.tokens(batch, 9))


@pytest.mark.parametrize("batch", [1, 6])
def test_batches_that_do_not_divide(checkpoint, single, mesh_of_sizes, batch):
    model = glm_jax.load(checkpoint, mesh=mesh_of_sizes((2, 2, 2)), stacked=True)
    check_equal(model, single, published.tokens(batch, 9))


def test_two_kv_heads_on_two_tensor_devices(tmp_path, one_device, mesh_of_sizes):
    source = published.checkpoint(tmp_path / "hf", dtype="float32", num_hidden_layers=2)
    one, many = (glm_jax.load(source, mesh=mesh, stacked=True) for mesh in (one_device, mesh_of_sizes((1, 4, 2))))
    check_equal(many, one, published.tokens(4, 9))


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2), pytest.param((8, 1, 1), marks=pytest.mark.slow)], ids=str)
def test_greedy_tokens(checkpoint, expected, mesh_of_sizes, sizes):
    """Four prompts: a batch that some of the meshes divide, and some do not."""
    model = glm_jax.load(checkpoint, mesh=mesh_of_sizes(sizes), stacked=True)
    assert glm_jax.generate(model, PROMPTS, max_new_tokens=12) == expected("greedy")


@pytest.mark.parametrize(
    ("sizes", "setting"),
    [((2, 2, 2), "filtered"), ((1, 8, 1), "sampled"), pytest.param((1, 1, 8), "filtered", marks=pytest.mark.slow)],
)
def test_sampled_tokens(checkpoint, expected, mesh_of_sizes, sizes, setting):
    model = glm_jax.load(checkpoint, mesh=mesh_of_sizes(sizes), stacked=True)
    assert glm_jax.generate(model, PROMPTS, max_new_tokens=12, **SETTINGS[setting]) == expected(setting)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
def test_prefill_and_decode_on_a_mesh_equal_the_whole_pass(checkpoint, single, mesh_of_sizes, stacked):
    model = glm_jax.load(checkpoint, mesh=mesh_of_sizes((2, 2, 2)), stacked=stacked)
    check_decode(model, single)


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_kv_heads_that_do_not_divide_are_refused(tmp_path, mesh_of_sizes):
    source = published.checkpoint(tmp_path / "hf")
    words = r"attention\.k: kv_heads = 2 does not divide over mesh axis tensor = 8 \(mesh data=1,expert=1,tensor=8\)"
    with pytest.raises(ShardingError, match=words) as caught:
        glm_jax.load(source, mesh=mesh_of_sizes((1, 1, 8)))
    assert "sizes that do: 1, 2" in str(caught.value) and "more weights" in str(caught.value)


def test_experts_that_do_not_divide_are_refused(tmp_path, mesh_of_sizes):
    source = published.checkpoint(tmp_path / "hf", n_routed_experts=6)
    with pytest.raises(ShardingError, match=r"expert = 6 does not divide over mesh axis expert = 8 .*: 1, 2, 3, 6"):
        glm_jax.load(source, mesh=mesh_of_sizes((1, 8, 1)))


def test_the_expert_width_of_air_divides_over_eight(mesh_of_sizes):
    config = glm_jax.configs.get("glm-4.5-air")
    abstract = glm_jax.Transformer(config)
    specs = glm_jax.sharding.shardings(abstract, mesh_of_sizes((1, 1, 8)))
    assert specs["moe.moe.experts.gate_up"].shard_shape((45, 128, 2, 1408, 4096)) == (45, 128, 2, 176, 4096)


@pytest.mark.parametrize(
    "text",
    [
        "data=0",
        "tensor=16",
        "data",
        "model=2",
        "data=1,data=2",
        "tensor=-1",
        "tensor=1.5",
        "expert=²",
        f"data={'9' * 5000}",
    ],
)
def test_meshes_that_cannot_be_are_refused(text):
    with pytest.raises(ShardingError) as caught:
        parse_mesh(text)
    assert "\n" not in str(caught.value) and "mesh" in str(caught.value)


def test_a_mesh_is_written_as_it_is_read():
    assert describe(parse_mesh("tensor=2, expert=4")) == "data=1,expert=4,tensor=2"
    assert parse_mesh("Tensor=2,EXPERT=4") == parse_mesh("tensor=2,expert=4")
    assert describe(default_mesh(glm_jax.configs.get("tiny-glm"))) == "data=1,expert=8,tensor=1"
    assert describe(default_mesh(glm_jax.configs.get("glm-4.5"))) == "data=1,expert=8,tensor=1"


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (Rules(expert=("tensor",)), r"experts\..*: mesh axis tensor would split two of its axes"),
        (Rules(mlp=("expert",)), r"experts\..*: mesh axis expert would split two of its axes"),
        (Rules(heads=("tensor", "tensor")), "tensor"),
    ],
)
def test_rules_that_collide_are_refused(checkpoint, mesh_of_sizes, rules, words):
    with pytest.raises(ShardingError, match=words) as caught:
        glm_jax.load(checkpoint, mesh=mesh_of_sizes((1, 2, 4)), rules=rules)
    assert "\n" not in str(caught.value)


OWN_RULES = {
    "replicated-vocab": Rules(vocab=()),
    "experts-over-two-axes": Rules(expert=("expert", "tensor"), mlp=()),
    "no-tensor-parallel-attention": Rules(heads=(), kv_heads=()),
    "experts-over-data": Rules(expert=("data", "expert")),
    "batch-over-data-only": Rules(batch=("data",)),
    "heads-over-two-axes": Rules(batch=("data",), heads=("expert", "tensor"), kv_heads=("expert", "tensor")),
    "replicated": Rules(batch=(), heads=(), kv_heads=(), expert=(), mlp=(), vocab=()),
}
FAST = {"experts-over-two-axes", "batch-over-data-only", "heads-over-two-axes"}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OWN_RULES]
)
def test_own_rules_give_the_same_logits(checkpoint, single, mesh_of_sizes, name):
    model = glm_jax.load(checkpoint, mesh=mesh_of_sizes((2, 2, 2)), rules=OWN_RULES[name], stacked=True)
    check_equal(model, single, published.tokens(4, 9))
    check_decode(model, single)


def test_rules_place_the_weights(checkpoint, mesh_of_sizes):
    rules = Rules(expert=("expert", "tensor"), mlp=())
    weights = weights_by_name(glm_jax.load(checkpoint, mesh=mesh_of_sizes((1, 4, 2)), rules=rules, stacked=True))
    assert weights["moe.moe.experts.down"][...].sharding.spec == PartitionSpec(None, ("expert", "tensor"), None, None)
    shards = weights["moe.moe.experts.down"][...].addressable_shards
    assert {shard.data.shape for shard in shards} == {(1, 1, 64, 32)}


# --- what is sent and what is copied --------------------------------------------------------------------------------


TINY = configs.get("tiny-glm")
WIDE = dataclasses.replace(TINY, num_layers=2, attention=dataclasses.replace(TINY.attention, num_kv_heads=8))


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_a_decode_step_sends_tokens_and_no_weights(mesh_of_sizes, sizes):
    """Each MoE layer gathers tokens, choices and weights over the expert axis and sums results; nothing else moves.

    The argmax over a split vocabulary gathers the candidates of each part: their values and their indices.
    """
    compiled, _ = compiled_step(WIDE, mesh_of_sizes(sizes), batch=8, length=64)
    sent = collectives(compiled)
    counts = collections.Counter(kind for kind, _ in sent)
    layers, moe = 2, 1
    assert set(counts) <= {"all-gather", "all-reduce", "reduce-scatter"}, counts
    assert counts["all-gather"] <= 4 * moe + 2 and counts["reduce-scatter"] <= moe, counts
    assert counts["all-reduce"] <= 2 * layers + moe, counts
    assert max(elements for _, elements in sent) <= 8 * WIDE.embed_dim, sent
    weights = weights_by_name(glm_jax.Transformer(WIDE)).items()
    matrices = (w.get_raw_value().size for n, w in weights if re.search(r"\.(q|k|v|o|gate_up|down)$", n))
    assert min(matrices) > 8 * WIDE.embed_dim


@pytest.mark.parametrize(
    ("sizes", "batch", "stacked"),
    [
        ((1, 1, 1), 8, True),
        ((1, 1, 1), 1, False),
        ((2, 2, 2), 8, False),
        ((2, 2, 2), 1, True),
        ((1, 1, 8), 8, True),
        ((1, 1, 8), 1, False),
    ],
)
def test_a_decode_step_writes_the_cache_in_place(mesh_of_sizes, sizes, batch, stacked):
    """One sequence is a case of its own: XLA writes its row in another way, and has copied whole caches for it."""
    compiled, cache_bytes = compiled_step(WIDE, mesh_of_sizes(sizes), batch=batch, length=1024, stacked=stacked)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4


def test_a_prefill_writes_the_cache_in_place(mesh_of_sizes):
    compiled, cache_bytes = compiled_step(WIDE, mesh_of_sizes((2, 2, 2)), kind="prefill", batch=8, length=16)
    assert compiled.memory_analysis().alias_size_in_bytes == cache_bytes


# --- the implementations of the experts -----------------------------------------------------------------------------


def routed_tokens(tokens: int, *, experts: int = 8, choices: int = 3) -> tuple[np.ndarray, ...]:
    """Tokens [T, 1, D] with choices that leave half of the experts idle, and the others crowded."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(tokens, 1, 16)).astype(np.float32)
    crowded = np.stack([rng.permutation(experts // 2)[:choices] for _ in range(tokens)])
    weights = rng.uniform(0, 1, (tokens, 1, choices)).astype(np.float32)
    gate_up = rng.normal(size=(experts, 2, 24, 16)).astype(np.float32) / 4
    down = rng.normal(size=(experts, 16, 24)).astype(np.float32) / 4
    return x, crowded[:, None].astype(np.int32), weights, gate_up, down


def by_numpy(x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    result = np.zeros(x.shape, np.float64)
    for at in np.ndindex(ids.shape):
        gate, up = gate_up[ids[at]].astype(np.float64) @ x[at[:2]]
        result[at[:2]] += weights[at] * (down[ids[at]].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up))
    return result


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("name", EXPERTS)
def test_implementations_agree_in_a_shard_map(name, mesh_of_sizes, sizes):
    mesh = mesh_of_sizes(sizes)
    x, ids, weights, gate_up, down = routed_tokens(16)

    def placed(array: np.ndarray, *spec: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    with jax.set_mesh(mesh):
        batch = batch_axes(16, mesh)
        arrays = [placed(array, batch) for array in (x, ids, weights)]
        arrays += [placed(gate_up, "expert", None, "tensor"), placed(down, "expert", None, "tensor")]
        ops = with_implementations(CPU, experts=name)
        run = jax.jit(lambda *a: run_experts(*a[:3], gate_up=a[3], down=a[4], ops=ops))
        out = run(*arrays)
    assert out.sharding.spec[0] == batch
    np.testing.assert_allclose(out, by_numpy(x, ids, weights, gate_up, down), atol=2e-5)


@pytest.mark.parametrize(
    "name", [name if name == "block_gmm" else pytest.param(name, marks=pytest.mark.slow) for name in EXPERTS]
)
def test_a_whole_model_with_each_implementation(checkpoint, single, mesh_of_sizes, name):
    tokens = published.tokens(8, 9)
    model = glm_jax.load(checkpoint, mesh=mesh_of_sizes((1, 4, 2)), stacked=True)
    reference = np.asarray(single(tokens).logits)
    logits = np.asarray(model(tokens, ops=with_implementations(CPU, experts=name)).logits)
    assert np.abs(logits - reference).max() <= 1e-4 * reference.std()
