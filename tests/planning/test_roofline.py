"""Rates at the hardware's best, beside a count by hand for H200 of 4.3 TB/s and 790 Tflop/s, contexts of 2,048."""

from __future__ import annotations

import dataclasses

import pytest

from glm_jax import configs
from glm_jax.planning.job import Job
from glm_jax.planning.kinds import DEVICES, Device, Speed
from glm_jax.planning.memory import measure
from glm_jax.planning.meshes import abstract_mesh
from glm_jax.planning.placement import abstract_model, place
from glm_jax.planning.roofline import step_times
from glm_jax.planning.work import Collective, Work, step_work

RATES = [
    ("glm-4.5-air", "bfloat16", (1, 1, 1), {1: 165, 8: 356, 32: 690, 128: 2102}),
    ("glm-4.5-air", "fp8", (1, 1, 1), {1: 311, 8: 682, 32: 1291, 128: 3523}),
    ("glm-4.5", "fp8", (1, 1, 8), {1: 1000, 8: 2022, 32: 3524, 128: 9761}),
]
FREE = 1e30  # bytes a second of links that take no time


def device(*, link: float = FREE, latency: float = 0.0, domain: int | None = None) -> Device:
    speed = Speed(
        bfloat16=790e12,
        float32=60e12,
        fp8=1500e12,
        int8=1500e12,
        memory=4.3e12,
        link=link,
        network=link / 10,
        latency=latency,
        network_latency=10 * latency,
    )
    return Device(name="any", memory=2**40, speed=speed, domain=domain)


def placed(job: Job, sizes):
    model = abstract_model(job)
    placement = place(model, job, abstract_mesh(sizes))
    return placement, step_work(job, placement, measure(model, job, placement))


@pytest.mark.parametrize(("model", "weights", "sizes", "rates"), RATES)
def test_decode_rates(model, weights, sizes, rates):
    for batch, rate in rates.items():
        job = Job(config=configs.get(model), kind="decode", batch=batch, length=2048, weights=weights)
        placement, work = placed(job, sizes)
        times = step_times(work, job, placement, device())
        assert times is not None and times.bound == "memory"
        # GLM-4.5's embedding is on each device, where the count by hand splits it
        assert batch / times.step == pytest.approx(rate, rel=0.02 if sizes == (1, 1, 1) else 0.08)


def test_a_long_prompt_is_bound_by_arithmetic():
    job = Job(config=configs.get("glm-4.5-air"), kind="prefill", batch=1, length=8192)
    placement, work = placed(job, (1, 1, 1))
    times = step_times(work, job, placement, device())
    assert times is not None and times.bound == "compute"
    assert 8192 / times.step == pytest.approx(23_500, rel=0.25)  # tokens a second, attention counted as little there


@pytest.mark.parametrize(
    ("kind", "axes", "seconds"),
    [
        ("all-gather", ("tensor",), 0.001 + 3 / 4 * 8e9 / 1e11),
        ("all-reduce", ("tensor",), 0.001 + 2 * 3 / 4 * 8e9 / 1e11),
        ("reduce-scatter", ("expert",), 0.001 + 1 / 2 * 8e9 / 1e11),
        ("all-reduce", ("data",), 0.010 + 2 * 1 / 2 * 8e9 / 1e10),  # eight apart: over the network
        ("all-gather", ("data", "tensor"), 0.010 + 7 / 8 * 8e9 / 1e10),
    ],
)
def test_collectives_are_rings_over_the_links_that_join_the_group(kind, axes, seconds):
    job = Job(config=configs.get("tiny-glm"), kind="decode", batch=8, length=8)
    placement, _ = placed(dataclasses.replace(job, config=eight_heads()), (2, 2, 4))
    exchange = Collective(what="x", kind=kind, axes=axes, nbytes=8 * 10**9, times=3)
    work = Work(operations=0.0, traffic=0.0, collectives=(exchange,))
    times = step_times(work, job, placement, device(link=1e11, latency=0.001, domain=8))
    assert times is not None
    assert times.step == times.communication == pytest.approx(3 * seconds)
    assert times.bound == "communication"


def eight_heads():
    config = configs.get("tiny-glm")
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, num_kv_heads=8))


def test_without_speeds_there_is_no_time():
    job = Job(config=configs.get("tiny-glm"), kind="decode", batch=8, length=8)
    placement, work = placed(job, (1, 1, 1))
    assert step_times(work, job, placement, dataclasses.replace(DEVICES["cpu"], speed=None)) is None


def test_float32_runs_at_its_own_rate():
    half = Job(config=configs.get("glm-4.5-air"), kind="prefill", batch=1, length=4096)
    full = dataclasses.replace(half, weights="float32")
    times = [step_times(*reversed_pair(placed(job, (1, 1, 1)), job), device()) for job in (half, full)]
    assert times[1].compute == pytest.approx(times[0].compute * 790 / 60)


def reversed_pair(pair, job):
    placement, work = pair
    return work, job, placement
