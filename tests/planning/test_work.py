"""Operations and collectives of a step: against a count by hand, and against the compiled program's."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from glm_jax import configs
from glm_jax.model.transformer import forward, runtime_model, with_layer_layout
from glm_jax.planning.job import Job
from glm_jax.planning.memory import Optimizer, measure
from glm_jax.planning.meshes import abstract_mesh
from glm_jax.planning.placement import abstract_model, place
from glm_jax.planning.work import step_work
from glm_jax.sharding import batch_sharding, rules_named, with_shardings
from tests.conventions.tree import ROOT

BATCH, LENGTH = 8, 16


def planned(job: Job, sizes):
    model = abstract_model(job)
    placement = place(model, job, abstract_mesh(sizes))
    optimizer = Optimizer.of(model) if job.kind == "train" else None
    return step_work(job, placement, measure(model, job, placement, optimizer), optimizer), placement


def compiled_collectives(text: str) -> Counter[str]:
    """Bytes of the results of each kind of collective of a compiled program, groups of one device left out."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", line)
        if match is None or re.search(r"replica_groups=(\{\{0\}|\[\d+,1\])", line):
            continue
        for sizes in re.findall(r"[fs]32\[([\d,]*)\]", match[1]):
            found[match[2]] += 4 * math.prod(int(size) for size in sizes.split(",") if size)
    return found


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("default", (1, 4, 2)),
        ("default", (2, 2, 2)),
        ("serve_latency", (2, 2, 2)),
        ("serve_throughput", (2, 2, 2)),
        ("train", (2, 2, 2)),
        ("long_context", (2, 2, 2)),
    ],
)
def test_collectives_are_those_of_the_compiled_program(mesh_of_sizes, preset, sizes):
    config, mesh, rules = configs.get("tiny-glm"), mesh_of_sizes(sizes), rules_named(preset)
    abstract = with_layer_layout(runtime_model(config, mesh, dtype=jnp.float32, rules=rules), stacked=False)
    model = with_shardings(abstract, mesh, rules)
    placing = batch_sharding(BATCH, mesh, rules, length=LENGTH)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=placing)

    def hidden(model, tokens):
        return forward(model, tokens, mtp=False).hidden

    with jax.set_mesh(mesh):
        found = compiled_collectives(jax.jit(hidden).lower(model, tokens).compile().as_text())
    job = Job(config=config, kind="prefill", batch=BATCH, length=LENGTH, weights="float32", rules=rules)
    work, placement = planned(job, sizes)
    expected: Counter[str] = Counter()
    for each in work.collectives:
        if each.what == "head.weight":
            continue
        parts = placement.devices(each.axes) if each.kind in ("reduce-scatter", "all-to-all") else 1
        expected[each.kind] += each.times * each.nbytes // parts
    assert +found == +expected


@pytest.mark.parametrize("name", ["glm-4.5-v5p-decode", "air-v5p-decode"])
def test_queries_keys_and_values_share_the_exchange_that_moves_their_tokens(name):
    kept = json.loads((ROOT / "benchmarks/results/aot" / f"{name}.json").read_text(encoding="utf-8"))
    row = kept["row"]
    fields = {key: row[key] for key in ("kind", "batch", "length", "weights")}
    job = Job(config=configs.get(row["model"]), rules=rules_named(row["rules"]), **fields)
    work, _ = planned(job, tuple(row["mesh"]))
    times = sum(each.times for each in work.collectives if each.kind == "all-to-all")
    assert times == sum(each["times"] for each in kept["report"]["sent"] if each["kind"] == "all-to-all")


def test_operations_of_a_decode_step_are_two_for_each_active_parameter_and_the_attention():
    config = configs.get("glm-4.5-air")
    job = Job(config=config, kind="decode", batch=4, length=100)
    work, _ = planned(job, (1, 1, 1))
    attention, experts = config.attention, 3 * 4096 * 1408
    projections = 2 * (96 + 8) * 128 * 4096
    layers = 46 * projections + 3 * 4096 * 10_944 + 45 * (9 * experts + 128 * 4096)
    scores = 46 * attention.num_heads * 2 * attention.head_dim * 100
    assert work.operations == pytest.approx(4 * 2 * (layers + 151_552 * 4096 + scores), rel=1e-9)
    assert work.collectives == ()


def test_work_divides_over_devices():
    job = Job(config=configs.get("glm-4.5-air"), kind="prefill", batch=16, length=512)
    one, _ = planned(job, (1, 1, 1))
    many, _ = planned(job, (2, 2, 4))
    router = 2.0 * 16 * 512 * 45 * 128 * 4096  # each of the four that share a batch scores all experts
    assert many.operations * 16 == pytest.approx(one.operations + 3 * router, rel=1e-9)


def test_training_sums_gradients_over_the_devices_that_saw_other_tokens():
    job = Job(config=configs.get("tiny-glm"), kind="train", batch=8, length=16)
    work, placement = planned(job, (2, 2, 2))
    sums = {each.axes: each.nbytes for each in work.collectives if each.what == "gradients"}
    experts = sum(part.nbytes for part in placement.parts.values() if part.is_experts)
    assert sums == {
        ("data",): experts,
        ("data", "expert"): sum(part.nbytes for part in placement.parts.values()) - experts,
    }


def test_a_small_batch_reads_the_experts_it_chose():
    config = configs.get("glm-4.5-air")
    one, _ = planned(Job(config=config, kind="decode", batch=1, length=1), (1, 1, 1))
    many, _ = planned(Job(config=config, kind="decode", batch=64, length=1), (1, 1, 1))
    experts = 45 * 128 * 3 * 4096 * 1408 * 2
    assert many.traffic - one.traffic == pytest.approx(experts * (15 / 16 - (15 / 16) ** 64), rel=0.02)
