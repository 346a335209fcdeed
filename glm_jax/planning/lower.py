"""The programs of a job, lowered for a mesh from abstract shapes: the ones that generation and training run.

Nothing is allocated. All weights are arguments, those of the MTP layer too, as a run that drafts or trains holds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glm_jax.errors import InputError
from glm_jax.inference.config import Sampling
from glm_jax.inference.generate import MIN_BUCKET, bucket
from glm_jax.inference.runner import Runner, abstract_prompts, programs
from glm_jax.inference.sampling import Sampler
from glm_jax.kernels import Ops, ops_for
from glm_jax.model import Transformer, abstract_cache
from glm_jax.model.transformer import runtime_model, with_layer_layout
from glm_jax.planning.job import DECODE, TRAIN, Job
from glm_jax.planning.placement import abstract_model, as_stored
from glm_jax.sharding import batch_sharding, with_shardings
from glm_jax.training.batch import Batch
from glm_jax.training.optimizer import OptimizerConfig, build_optimizer
from glm_jax.training.step import TrainState, build_step, values_by_name

SCHEDULE = OptimizerConfig(steps=10_000, warmup_steps=100)
SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=1),
    "sampled": Sampling(max_new_tokens=1, temperature=1.0),
    "filtered": Sampling(max_new_tokens=1, temperature=1.0, top_p=0.95),
}


def lower_job(job: Job, mesh: Mesh, *, stacked: bool | None = None, ops: Ops | None = None) -> Any:
    """Return one step of a job, lowered for a mesh (`jax.stages.Lowered`).

    Args:
        job: what to run. Decoding is one step with a full cache, the newest token of each sequence to be chosen.
        mesh: of the devices to compile for.
        stacked: scan over the layers or unroll them; by default as the platform runs the job.
        ops: the operations to use, by default the platform's.

    Raises:
        InputError: the job is one that planning only counts.
        ShardingError: the mesh cannot hold the model.
    """
    model = model_on(job, mesh, stacked=stacked)
    ops = model.ops if ops is None else ops
    with jax.set_mesh(mesh):
        if job.kind == TRAIN:
            return _train(job, model, ops)
        return _inference(job, model, ops)


def check_job(job: Job) -> None:
    """Check that a job can be compiled.

    Raises:
        InputError: it is one that planning only counts.
    """
    if job.kind != TRAIN and job.cache_storage.scaled:
        raise InputError(f"--cache_dtype {job.cache} is counted only: no program of this version keeps it")


def model_on(job: Job, mesh: Mesh, *, stacked: bool | None = None) -> Transformer:
    """The abstract model of a job on a mesh, in the layout in which a run holds it.

    Raises:
        InputError: the job is one that planning only counts.
        ShardingError: the mesh cannot hold the model.
    """
    check_job(job)
    if job.quantized:
        model, _ = as_stored(abstract_model(job), job, mesh)
        model.rules, model.ops = job.rules, ops_for(mesh)
    else:
        model = runtime_model(job.config, mesh, dtype=job.dtype, rules=job.rules)
    stacked = (model.ops.stacked_layers or job.kind == TRAIN) if stacked is None else stacked
    with_shardings(model, mesh, job.rules)  # refuses a mesh in the words of loading, which are of the stacked model
    return with_shardings(with_layer_layout(model, stacked=stacked), mesh, job.rules)


def generation_programs(
    job: Job, mesh: Mesh, *, samplings: Sequence[str] = tuple(SAMPLINGS)
) -> dict[str, Callable[[], Any]]:
    """What generation compiles for batches of a job, by name: each a function that lowers one program.

    These are `prefill` for every bucket of prompts up to the job's length, and `decode`, with caches of that length's
    bucket; each for the ways of choosing tokens, which are names of `SAMPLINGS`.

    Raises:
        InputError: the cache is to be of another dtype than the weights, which generation does not run.
        ShardingError: the mesh cannot hold the model.
    """
    if job.cache_storage.dtype != job.dtype:
        raise InputError(f"--cache_dtype {job.cache} is counted only: generation keeps what it caches in {job.dtype}")
    config = job.config
    found: dict[str, Callable[[], Any]] = {}
    cache_length = bucket(job.length, config.max_positions)
    lengths = [MIN_BUCKET]
    while lengths[-1] < cache_length:
        lengths.append(2 * lengths[-1])
    lengths = sorted({bucket(length, config.max_positions) for length in lengths})
    runner = Runner(model_on(job, mesh))
    for name in samplings:
        sampler = jax.eval_shape(functools.partial(Sampler.create, SAMPLINGS[name]))
        found[f"decode {name}"] = functools.partial(runner.lower_decode, job.batch, sampler, cache_length=cache_length)
        for length in lengths:
            found[f"prefill {length} {name}"] = functools.partial(
                runner.lower_prefill, job.batch, sampler, padded_length=length, cache_length=cache_length
            )
    return found


def _train(job: Job, model: Transformer, ops: Ops) -> Any:
    optimizer = build_optimizer(model, SCHEDULE)
    step: Any = build_step(optimizer, ops=ops)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(model, jax.eval_shape(optimizer.init, values_by_name(model)), number)  # type: ignore[arg-type]
    place = batch_sharding(job.batch, model.mesh, job.rules, length=job.length)
    rows: Any = functools.partial(jax.ShapeDtypeStruct, (job.batch, job.length), sharding=place)
    return step.lower(state, Batch(rows(jnp.int32), rows(jnp.bool_), rows(jnp.bool_)))


def _inference(job: Job, model: Transformer, ops: Ops) -> Any:
    leaves, structure = jax.tree.flatten(model)
    plain = programs(structure, ops)
    cache = abstract_cache(model, job.batch, job.length, dtype=job.cache_storage.dtype)
    sampler = jax.eval_shape(functools.partial(Sampler.create, SAMPLINGS["greedy"]))
    tokens, each = abstract_prompts(model, job.batch, job.length)
    if job.kind == DECODE:
        step = jax.jit(plain.decode_one, donate_argnums=1, keep_unused=True)
        return step.lower(leaves, cache, each, each, sampler)
    return jax.jit(plain.prefill, donate_argnums=3, keep_unused=True).lower(leaves, tokens, each, cache, sampler)
