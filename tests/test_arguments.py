"""Arguments of the wrong kind: an error of the package that says what would be right, never one of Python's."""

from __future__ import annotations

import numpy as np
import pytest

import glm_jax
from tests.conventions.tree import ROOT

DEMO = ROOT / "examples" / "demo_model"


@pytest.fixture(scope="module")
def model():
    return glm_jax.load(DEMO, dtype="float32", layers="0:1")


@pytest.mark.parametrize("dtype", ["fp8", "int8", "float64", "half a float", 3, np.int32, [], object()])
def test_a_dtype_that_no_model_computes_in(dtype):
    with pytest.raises(glm_jax.InputError, match="right would be one of 'bfloat16', 'float16', 'float32'"):
        glm_jax.load(DEMO, dtype=dtype)
    with pytest.raises(glm_jax.InputError, match="is none that a model computes in"):
        glm_jax.Transformer.create(glm_jax.configs.get("tiny-glm"), dtype=dtype)


def test_a_mesh_or_rules_by_their_names():
    with pytest.raises(glm_jax.ShardingError, match=r"mesh 'tensor=2' is no mesh; right would be glm_jax.make_mesh\("):
        glm_jax.load(DEMO, mesh="tensor=2")
    with pytest.raises(glm_jax.ShardingError, match=r"rules_named\('serve_latency'\)"):
        glm_jax.load(DEMO, rules="serve_throughput")


@pytest.mark.parametrize("stop", [5, None, "5", b"5", 1.5, {"a": 1}, [5, "6"], [[5]], [True]])
def test_what_is_no_list_of_stop_tokens(model, stop):
    with pytest.raises(glm_jax.InputError, match="stop: "):
        glm_jax.generate(model, [[5]], max_new_tokens=1, stop=stop)


@pytest.mark.parametrize("stop", [[7], (7,), {7}, np.array([7]), range(7, 8)])
def test_stop_tokens_in_any_collection(model, stop):
    assert len(glm_jax.generate(model, [[5]], max_new_tokens=1, stop=stop)[0]) == 1


@pytest.mark.parametrize("prompts", [5, "hello", None, 1.5])
def test_what_are_no_prompts(model, prompts):
    with pytest.raises(glm_jax.InputError, match=r"not a list of lists of token ids, as \[\[5, 6, 7\]\]"):
        glm_jax.generate(model, prompts, max_new_tokens=1)


@pytest.mark.parametrize("prompts", [iter([[5], [6, 7]]), np.array([[5, 6]]), ((5,),)])
def test_prompts_in_any_collection(model, prompts):
    assert all(len(new) == 1 for new in glm_jax.generate(model, prompts, max_new_tokens=1))


def test_a_directory_in_place_of_a_model():
    with pytest.raises(glm_jax.InputError, match=r"model is str, not a model; right would be glm_jax.load\("):
        glm_jax.generate(str(DEMO), [[5]], max_new_tokens=1)
