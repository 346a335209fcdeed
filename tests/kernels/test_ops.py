"""The choice of operations: by platform, by name, and of one's own; what does not exist is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glm_jax
from glm_jax import InputError
from glm_jax.inference import Sampling, stream
from glm_jax.kernels import Operation, Storage, ops_for, ops_for_platform, reference, with_implementations
from glm_jax.kernels.ops import IMPLEMENTATIONS
from glm_jax.planning.meshes import abstract_mesh
from glm_jax.sharding import QuantizedArray, as_array, map_weights
from glm_jax.training import build_step

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


def test_a_local_attention_gets_the_heads_of_a_device(mesh_of_sizes):
    """Whole sequences of its part of the batch, queries of some heads beside the keys of theirs."""
    seen = set()

    def attend(q, k, v, **options):
        seen.add((q.shape[0], q.shape[2], k.shape[1]))
        return reference.attend(q, k, v, **options)

    config = glm_jax.configs.get("tiny-glm")
    model = glm_jax.Transformer.create(config, mesh=mesh_of_sizes((2, 2, 2)))
    ops = with_implementations(model.ops, attend=Operation("own", attend, local=True))
    np.testing.assert_allclose(model(TOKENS, ops=ops).logits, model(TOKENS).logits, atol=1e-5)
    assert seen == {(len(TOKENS) // 2, config.attention.num_heads // 2, config.attention.num_kv_heads // 2)}


def test_a_local_argmax_gets_whole_vocabularies(mesh_of_sizes):
    seen = set()

    def argmax(scores):
        seen.add(scores.shape[-1])
        return reference.argmax(scores)

    config = glm_jax.configs.get("tiny-glm")
    model = glm_jax.Transformer.create(config, mesh=mesh_of_sizes((2, 2, 2)))
    ops = with_implementations(model.ops, argmax=Operation("own", argmax, local=True))
    sampling = Sampling(max_new_tokens=3)
    ours = list(stream(model, TOKENS.tolist(), sampling, ops=ops))
    assert ours == list(stream(model, TOKENS.tolist(), sampling))
    assert seen == {config.vocab_size}


def plain_matmul(x, w, *, dtype=None):
    return jnp.matmul(x, w.T).astype(dtype or x.dtype)


def plain_experts(x, ids, weights, *, gate_up_E2FD, down_EDF):
    gate, up = jnp.einsum("td,ecfd->ctef", x, gate_up_E2FD)
    outputs = jnp.einsum("tef,edf->ted", jax.nn.silu(gate) * up, down_EDF)
    chosen = jnp.sum(jnp.where(ids[:, :, None] == jnp.arange(len(down_EDF)), weights[:, :, None], 0.0), axis=1)
    return jnp.einsum("ted,te->td", outputs, chosen)


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_an_own_one_gets_arrays_of_weights_in_any_storage(stored):
    """Implementations that know arrays only multiply what a model has packed or quantised."""
    config, mesh = glm_jax.configs.get("tiny-glm"), glm_jax.make_mesh(data=1, expert=1, tensor=1)
    model = glm_jax.Transformer.create(config, mesh=mesh, dtype="bfloat16" if stored == "bfloat16" else "float32")
    if stored == "int8":
        model = map_weights(_quantized, model)
    own = {"matmul": Operation("own", plain_matmul, local=True), "experts": Operation("own", plain_experts, local=True)}
    dequantised = map_weights(lambda _, weight: as_array(weight.get_raw_value(), jnp.float32), model)
    expected = dequantised(TOKENS, ops=with_implementations(model.ops, matmul="reference", experts="dense")).logits
    np.testing.assert_allclose(model(TOKENS, ops=with_implementations(model.ops, **own)).logits, expected, atol=1e-5)


def _quantized(name, weight):
    """Matrices of experts and of the dense layers with a scale for each output."""
    value = weight.get_raw_value()
    if not name.endswith(("gate_up", "down")):
        return value
    scale = jnp.max(jnp.abs(value), axis=-1) / 127
    return QuantizedArray(jnp.round(value / scale[..., None]).astype(jnp.int8), scale, 1)


@pytest.mark.parametrize(
    ("operation", "value", "right"),
    [
        ("matmul", reference.matmul, "Operation('mine', function), or one of reference, flat, cpu"),
        ("attend", Storage(), "Operation('mine', function), or one of reference, blockwise"),
        ("matmul", IMPLEMENTATIONS["experts"]["gpu"], "Operation('mine', function), or one of"),
        ("storage", Operation("own", plain_matmul), "Storage(...), or one of array, packed_bfloat16, lanes"),
        ("experts", None, "Operation('mine', function), or one of dense"),
    ],
    ids=["a function", "a storage", "a choice of experts", "an operation", "nothing"],
)
def test_what_is_no_implementation(one_device, operation, value, right):
    with pytest.raises(InputError, match=f"{operation} is .*, no implementation; right would be") as raised:
        ops_for(one_device, **{operation: value})
    assert right in str(raised.value)


@pytest.mark.parametrize("ops", ["cpu", {}, ops_for])
def test_what_is_no_set_of_operations(model, ops):
    for call in (
        lambda: model(TOKENS, ops=ops),
        lambda: stream(model, TOKENS.tolist(), Sampling(max_new_tokens=1), ops=ops),
        lambda: build_step(optax.identity(), ops=ops),
    ):
        with pytest.raises(InputError, match=r"right would be what glm_jax.kernels.ops_for\(mesh\) returns"):
            call()


def test_argmax_takes_the_first_of_equals():
    rows = jnp.asarray([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-jnp.inf, -jnp.inf, 0.0]])
    for operation in IMPLEMENTATIONS["argmax"].values():
        np.testing.assert_array_equal(jax.jit(operation.function)(rows), [1, 0, 2])


def test_storage_says_how_quantised_values_are_held():
    small = {"float8_e4m3fn": "uint8", "int4": "int8", "int8": "int8"}
    held = {name: ops_for_platform("cpu").storage.quantized_dtype(jnp.dtype(name)).name for name in small}
    assert held == small
    assert all(Storage().quantized_dtype(jnp.dtype(name)) == jnp.dtype(name) for name in small)
