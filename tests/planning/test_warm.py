"""A cache of compiled programs: filled ahead by other processes, generation finds in it all that it compiles."""

from __future__ import annotations

import dataclasses

import jax
import pytest

import glm_jax
from glm_jax import configs
from glm_jax.planning import Job, choose_cluster
from glm_jax.planning.warm import Target, cache_of, warm
from glm_jax.runtime import cache_directory
from tests import processes

SIZES = (1, 2, 1)
# What a verb that loads does, with random weights: in a process of its own, with the devices of the cache.
GENERATE = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
import glm_jax
from glm_jax.inference import generate
from glm_jax.model import Transformer
from glm_jax.runtime import keep_programs
import dataclasses
config, mesh = dataclasses.replace(glm_jax.configs.get("tiny-glm"), num_layers=2), glm_jax.make_mesh(expert=2)
print(keep_programs(sys.argv[1], config, mesh))
model = Transformer.create(config, mesh=mesh, dtype="float32")
generate(model, [[1, 2, 3], [4, 5, 6, 7]], max_new_tokens=8)
"""


def target(root, **options) -> Target:
    config = dataclasses.replace(configs.get("tiny-glm"), num_layers=2)
    job = Job(config=config, kind="decode", batch=2, length=16, weights="float32", **options)
    cluster = choose_cluster("cpu", count=2)
    return Target(job=job, cluster=cluster, sizes=SIZES, root=str(root), samplings=("greedy",))


def kept(directory) -> set[str]:
    """The programs of generation that a cache holds."""
    return {
        file.name
        for file in directory.iterdir()
        if file.name.startswith(("jit_prefill", "jit_decode")) and file.name.endswith("-cache")
    }


def test_generation_finds_every_program_that_was_warmed(tmp_path):
    what = target(tmp_path)
    assert [done.program for done in warm(what, processes=1)] == ["decode greedy", "prefill 16 greedy"]
    before = kept(cache_of(what))
    assert len(before) == 2
    assert processes.said(GENERATE, tmp_path).strip() == str(cache_of(what))
    assert kept(cache_of(what)) == before, "a program of another key was compiled"


def test_directories_are_of_one_architecture_mesh_and_version(mesh_of_sizes):
    config, other = configs.get("tiny-glm"), configs.get("tiny-kimi")
    found = {
        cache_directory("root", architecture, mesh_of_sizes(sizes))
        for architecture in (config, other)
        for sizes in (SIZES, (2, 1, 1))
    }
    assert len(found) == 4
    assert all(glm_jax.__version__ in path.name and jax.__version__ in path.name for path in found)


def test_what_cannot_be_warmed_starts_no_process(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(glm_jax.InputError, match="Not a directory; right would be a directory to write to"):
        next(warm(target(file)))
    with pytest.raises(glm_jax.InputError, match="--cache_dtype fp8 is counted only"):
        next(warm(target(tmp_path, cache="fp8")))
