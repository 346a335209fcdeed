"""Jobs compiled for virtual devices: the compiler's bytes beside the plan's, and what cannot be compiled."""

from __future__ import annotations

import dataclasses

import pytest

import glm_jax
from glm_jax import configs
from glm_jax.planning import Job, choose_cluster
from glm_jax.planning.compile import compile_job, estimate, mesh_for
from glm_jax.sharding import rules_named

CPUS = choose_cluster("cpu", count=8)


def job(model="tiny-glm", **options) -> Job:
    given = {"kind": "decode", "batch": 8, "length": 64, "weights": "float32", **options}
    given["rules"] = rules_named(given.pop("rules", "default"))
    return Job(config=configs.get(model), **given)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 4, 2), {"rules": "serve_latency"}),
        ((2, 2, 2), {"rules": "serve_throughput", "model": "tiny-deepseek"}),
        ((2, 2, 2), {"kind": "prefill"}),
        pytest.param((2, 2, 2), {"rules": "train", "kind": "train"}, marks=pytest.mark.slow),
        ((1, 4, 2), {"weights": "int8"}),
    ],
)
def test_arguments_are_those_that_were_planned(sizes, options):
    asked, mesh = job(**options), mesh_for(CPUS, sizes)
    compiled, report = compile_job(asked, mesh)
    planned = estimate(asked, mesh)
    # Beside weights, cache and optimizer a step takes its tokens and a few scalars.
    assert planned.arguments == pytest.approx(report.arguments, abs=16 * asked.batch * asked.length + 1024)
    assert report.arguments <= planned.arguments + 16 * asked.batch * asked.length + 1024
    assert report.aliased >= (planned.cache if asked.kind != "train" else 0)
    assert report.arguments == compiled.memory_analysis().argument_size_in_bytes
    assert report.total == report.arguments + report.outputs - report.aliased + report.temporaries
    assert report.sent


def test_the_mtp_layer_is_an_argument_though_decoding_does_not_run_it():
    mesh = mesh_for(choose_cluster("cpu", count=1), (1, 1, 1))
    asked = job(batch=1)
    without = dataclasses.replace(asked, config=dataclasses.replace(asked.config, num_mtp_layers=0, mtp_copies=()))
    held = [compile_job(each, mesh)[1].arguments for each in (asked, without)]
    counts = [glm_jax.model.count_parameters(each.config).without_mtp for each in (asked, without)]
    assert counts[0] == counts[1] and held[0] > held[1]


def test_a_mesh_that_cannot_hold_the_model_is_refused_as_loading_does():
    asked, mesh = job(), mesh_for(CPUS, (1, 2, 4))
    with pytest.raises(glm_jax.ShardingError) as refused:
        compile_job(asked, mesh)
    with pytest.raises(glm_jax.ShardingError) as loading:
        glm_jax.model.Transformer.create(asked.config, mesh=mesh)
    assert str(refused.value) == str(loading.value)


def test_what_planning_only_counts_is_not_compiled():
    with pytest.raises(glm_jax.InputError, match="--cache_dtype int8 is counted only"):
        compile_job(job(cache="int8"), mesh_for(CPUS, (8, 1, 1)))
    with pytest.raises(glm_jax.InputError, match="compiling needs --device"):
        mesh_for(choose_cluster(None, memory=2**30, count=8), (8, 1, 1))
    with pytest.raises(glm_jax.InputError, match="compiling for 16 x cpu needs so many"):
        mesh_for(choose_cluster("cpu", count=16), (16, 1, 1))
