"""plan: the meshes that divide a model, and what each device then holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_jax
from glm_jax.model import Transformer, create_cache
from glm_jax.sharding import with_dtype, with_shardings

GIB = 2**30


def sizes(entry) -> tuple[int, ...]:
    return tuple(entry["mesh"].values())


def test_meshes_are_those_that_loading_accepts_and_refusals_its_sentences(call):
    planned = call("plan", "--model=tiny-glm", "--devices=8", "--memory=1", "--json").json
    config = glm_jax.configs.get("tiny-glm")
    assert len(planned["meshes"]) + len(planned["refused"]) == 10  # 8 = a * b * c in ten ways
    for entry in planned["refused"]:
        with pytest.raises(glm_jax.ShardingError) as refusal:
            with_shardings(Transformer(config), glm_jax.make_mesh(**entry["mesh"]))
        assert entry["reason"] == str(refusal.value)
    # two kv heads: tensor 4 and 8 are refused
    assert {sizes(entry) for entry in planned["refused"]} == {(1, 1, 8), (1, 2, 4), (2, 1, 4)}


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_bytes_are_those_of_the_arrays(call, mesh_of_sizes, batch):
    flags = ["--devices=8", "--memory=1", f"--batch={batch}", "--length=32", "--dtype=float32", "--json"]
    planned = call("plan", "--model=tiny-glm", *flags).json
    config = glm_jax.configs.get("tiny-glm")
    for entry in planned["meshes"]:
        if sizes(entry) not in {(2, 2, 2), (1, 8, 1)}:
            continue
        placed = with_shardings(with_dtype(Transformer(config), jnp.float32), mesh_of_sizes(sizes(entry)))
        model = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), placed)
        cache = create_cache(model, batch, 32)
        held = {
            name: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
            for name, tree in {"weights": model, "cache": cache}.items()
        }
        assert entry["bytes_per_device"] == {**held, "total": sum(held.values())}


def test_air_on_eight_devices(call):
    flags = ["--devices=8", "--memory=80", "--batch=8", "--length=32768"]
    planned = call("plan", "--model=glm-4.5-air", *flags, "--json").json
    fitting = {sizes(entry) for entry in planned["meshes"] if entry["fits"]}
    assert (1, 8, 1) in fitting and (8, 1, 1) not in fitting
    for entry in planned["meshes"]:
        # 32,768 tokens of 46 layers, keys and values of 8 heads of 128 in two bytes, for one sequence a device
        assert entry["bytes_per_device"]["cache"] == 32_768 * 46 * 2 * 8 * 128 * 2
    table = call("plan", "--model=glm-4.5-air", *flags).out
    assert "data=1,expert=8,tensor=1  37.42    5.75   43.17         fits\n" in table
    assert "data=8,expert=1,tensor=1  203.45   5.75   209.20        does not fit\n" in table


def test_plan_of_a_checkpoint(call, orbax):
    planned = call("plan", f"--model={orbax}", "--devices=1", "--memory=0.001", "--json").json
    (entry,) = planned["meshes"]
    assert entry["fits"] is (entry["bytes_per_device"]["total"] <= int(0.001 * GIB))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--devices=0"], "--devices must be above 0, and finite, not 0"),
        (["--memory=-1"], "--memory must be above 0, and finite, not -1.0"),
        (["--memory=nan"], "--memory must be above 0, and finite, not nan"),
        (["--memory=inf"], "--memory must be above 0, and finite, not inf"),
        (["--devices=1000000000000"], "--devices must be at most 100000, not 1000000000000"),
        (["--batch=0"], "--batch must be above 0, and finite, not 0"),
        (["--length=2000"], "--length 2000 exceeds the model's 1024 positions"),
    ],
)
def test_impossible_requests(call, flags, complaint):
    assert call("plan", "--model=tiny-glm", "--devices=8", "--memory=80", *flags).complaint == complaint
