"""The choice of operations: by platform, by name, and of one's own; what does not exist is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_jax
from glm_jax import InputError
from glm_jax.kernels import Operation, Storage, ops_for, ops_for_platform, with_implementations
from glm_jax.kernels.ops import IMPLEMENTATIONS
from glm_jax.planning.meshes import abstract_mesh

TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def model():
    return glm_jax.Transformer.create(glm_jax.configs.get("tiny-glm"), mesh=glm_jax.make_mesh())


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_mesh_decides_even_an_abstract_one(platform):
    ops = ops_for(abstract_mesh((1, 2, 4), platform))
    assert ops == ops_for_platform(platform) and hash(ops) == hash(ops_for_platform(platform))
    assert set(IMPLEMENTATIONS) <= set(ops.to_json())


def test_a_model_carries_what_suits_its_mesh(model):
    assert model.ops == ops_for_platform("cpu")
    assert model.ops.to_json()["experts"] == "expert_loop"


def test_names_that_do_not_exist(one_device):
    with pytest.raises(InputError, match="experts has no implementation 'fast'; there are dense, block_gmm, gemv"):
        ops_for(one_device, experts="fast")
    with pytest.raises(InputError, match="no operation is called 'matmull'; there are matmul, attend, experts, top_k"):
        ops_for(one_device, matmull="reference")
    with pytest.raises(InputError, match="platform 'abacus'; known: cpu, gpu, tpu"):
        ops_for_platform("abacus")


@pytest.mark.parametrize(
    ("operation", "name"),
    [(operation, name) for operation, known in IMPLEMENTATIONS.items() for name in known if operation != "storage"],
)
def test_every_implementation_gives_the_logits_of_the_reference(model, operation, name):
    """Each by itself beside the references of all others."""
    references = {"matmul": "reference", "attend": "reference", "experts": "dense"}
    reference = with_implementations(model.ops, **references)
    expected = model(TOKENS, ops=reference, mtp=True)
    ours = model(TOKENS, ops=with_implementations(reference, **{operation: name}), mtp=True)
    np.testing.assert_allclose(ours.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(ours.mtp_logits, expected.mtp_logits, atol=1e-5)


def test_the_one_of_the_documentation(model):
    """The block of docs/kernels.md, as it stands."""
    text = Path(__file__).parents[2].joinpath("docs", "kernels.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {"model": model, "tokens": TOKENS}
    exec(block, names)
    assert names["ops"].to_json()["matmul"] == "mine"
    np.testing.assert_allclose(names["out"].logits, model(TOKENS).logits, atol=1e-5)


def test_a_local_one_gets_matrices_of_a_device_on_a_mesh(mesh_of_sizes):
    seen = []

    def matmul(x, w, *, dtype=None):
        seen.append((x.ndim, w.ndim))
        return jnp.matmul(x, w.T).astype(dtype or x.dtype)

    model = glm_jax.Transformer.create(glm_jax.configs.get("tiny-glm"), mesh=mesh_of_sizes((2, 2, 2)))
    ops = with_implementations(model.ops, matmul=Operation("own", matmul, local=True))
    np.testing.assert_allclose(model(TOKENS, ops=ops).logits, model(TOKENS).logits, atol=1e-5)
    assert set(seen) == {(2, 2)}


def test_argmax_takes_the_first_of_equals():
    rows = jnp.asarray([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-jnp.inf, -jnp.inf, 0.0]])
    for operation in IMPLEMENTATIONS["argmax"].values():
        np.testing.assert_array_equal(jax.jit(operation.function)(rows), [1, 0, 2])


def test_storage_says_how_quantised_values_are_held():
    small = {"float8_e4m3fn": "uint8", "int4": "int8", "int8": "int8"}
    held = {name: ops_for_platform("cpu").storage.quantized_dtype(jnp.dtype(name)).name for name in small}
    assert held == small
    assert all(Storage().quantized_dtype(jnp.dtype(name)) == jnp.dtype(name) for name in small)
