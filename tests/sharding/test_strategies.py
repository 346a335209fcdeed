"""Every preset of rules computes the same model: logits, prefill and decode, and gradients of the training loss."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import glm_jax
from glm_jax import Rules, ShardingError, configs
from glm_jax.kernels import Ops
from glm_jax.model.transformer import forward, runtime_model, with_layer_layout
from glm_jax.sharding import PRESETS, QuantizedArray, map_weights, rules_named, with_shardings
from glm_jax.training import Batch, language_model_loss, place
from glm_jax.training.step import values_by_name
from tests import decoding, published
from tests.operations import DENSE, EXCHANGE

FAMILIES = ["glm4_moe", "deepseek_v3"]
SIZES = {"serve_latency": (2, 2, 2), "serve_throughput": (2, 2, 2), "train": (2, 2, 2), "long_context": (2, 2, 2)}
# Every preset with either attention; of the costly statements the half that covers both runs always.
ALL = [(family, preset) for family in FAMILIES for preset in SIZES]
FAST = {
    *(("glm4_moe", preset) for preset in ("serve_latency", "train")),
    *(("deepseek_v3", preset) for preset in ("serve_throughput", "long_context")),
}
COSTLY = [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in ALL]


@pytest.fixture(scope="module")
def expected(single_of) -> Any:
    """Logits and MTP logits of one device."""

    @functools.cache
    def run(model_type: str, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        out = single_of(model_type)(published.tokens(batch, length), mtp=True, ops=DENSE)
        return np.asarray(out.logits), np.asarray(out.mtp_logits)

    return run


@pytest.fixture(scope="module")
def sharded(checkpoint_of, mesh_of_sizes) -> Any:
    @functools.cache
    def load(model_type: str, preset: str) -> Any:
        mesh = mesh_of_sizes(SIZES[preset])
        return glm_jax.load(checkpoint_of(model_type), mesh=mesh, rules=rules_named(preset), stacked=preset == "train")

    return load


def check_equal(actual: Any, reference: np.ndarray, what: str = "") -> None:
    assert np.abs(np.asarray(actual) - reference).max() <= 1e-4 * reference.std(), what


@pytest.mark.parametrize(("model_type", "preset"), ALL)
def test_logits_and_mtp_logits(sharded, expected, model_type, preset):
    out = sharded(model_type, preset)(published.tokens(8, 16), mtp=True, ops=DENSE)
    logits, mtp_logits = expected(model_type, 8, 16)
    check_equal(out.logits, logits)
    check_equal(out.mtp_logits, mtp_logits)


@pytest.mark.parametrize(("model_type", "preset"), COSTLY)
def test_prefill_and_decode(sharded, expected, model_type, preset):
    """Rows of unequal length, and at last a batch that no axis divides."""
    for batch, lengths in ((8, [1, 4, 16, 6, 2, 9, 8, 3]), (1, [8])):
        logits = decoding.teacher_forced(
            sharded(model_type, preset), published.tokens(batch, 16), np.array(lengths), ops=DENSE
        )
        check_equal(logits, expected(model_type, batch, 16)[0])


def training_loss(model: Any, batch: Batch, *, ops: Ops = EXCHANGE) -> jax.Array:
    """The loss of a training step, each layer computed anew in the backward pass."""
    output = forward(model, batch.tokens, mtp=True, ops=ops, remat=True, keep_last=True)
    return language_model_loss(output, batch, mtp_weight=0.3).loss


def loss_gradient(model: Any, batch: Batch, ops: Ops) -> tuple[float, dict[str, jax.Array]]:
    with jax.set_mesh(model.mesh):
        loss = jax.jit(jax.value_and_grad(functools.partial(training_loss, ops=ops)))
        value, gradient = loss(model, place(batch, model.mesh, model.rules))
    return float(value), values_by_name(gradient)


@pytest.fixture(scope="module")
def expected_gradient(single_of) -> Any:
    return functools.cache(lambda model_type: loss_gradient(single_of(model_type), training_batch(), DENSE))


def training_batch() -> Batch:
    mask = np.arange(16) < np.array([16, 16, 9, 16, 12, 16, 5, 16])[:, None]
    return Batch(np.where(mask, published.tokens(8, 16), 0).astype(np.int32), mask, mask)


@pytest.mark.parametrize(("model_type", "preset"), COSTLY)
def test_gradients_of_the_training_loss(checkpoint_of, expected_gradient, mesh_of_sizes, model_type, preset):
    """Each gradient lies as its weight does, and is the one device's."""
    mesh = mesh_of_sizes(SIZES[preset])
    model = glm_jax.load(checkpoint_of(model_type), mesh=mesh, rules=rules_named(preset), stacked=True)
    value, gradients = loss_gradient(model, training_batch(), EXCHANGE)
    expected_value, expected = expected_gradient(model_type)
    assert value == pytest.approx(expected_value, rel=1e-5)
    weights = values_by_name(model)
    for name, gradient in gradients.items():
        reference = np.asarray(expected[name])
        assert np.abs(np.asarray(gradient) - reference).max() <= 1e-4 * max(reference.std(), 1e-3), name
        assert gradient.sharding.is_equivalent_to(weights[name].sharding, gradient.ndim), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_own_rules(checkpoint_of, expected, mesh_of_sizes, model_type):
    """Those of the documentation: whole experts everywhere, matrices that FSDP splits along `data`."""
    experts = ("expert", "tensor")
    rules = Rules(heads=("tensor",), kv_heads=("tensor",), expert=experts, mlp=(), fsdp=("data",))
    model = glm_jax.load(checkpoint_of(model_type), mesh=mesh_of_sizes((2, 2, 2)), rules=rules, stacked=False)
    for ops in (DENSE, EXCHANGE):
        check_equal(model(published.tokens(8, 16), ops=ops).logits, expected(model_type, 8, 16)[0])


FORMS = {"glm4_moe": (np.int8, None), "deepseek_v3": ("int4", 8)}  # per channel, in groups


def quantized(model: Any, form: tuple[Any, int | None]) -> tuple[Any, Any]:
    """Random quantised weights for every projection and expert of an abstract model, and the model dequantised."""
    dtype, group = form

    def of(name: str, weight: Any) -> Any:
        value, rng = weight.get_raw_value(), np.random.default_rng(len(name))
        if not weight.contracting_dims:
            return jax.numpy.asarray(rng.normal(1, 0.3, value.shape), value.dtype)
        outputs, inputs = value.shape[: -weight.contracting_dims], int(np.prod(value.shape[-weight.contracting_dims :]))
        groups = () if group is None else (inputs // group,)
        scale = jax.numpy.asarray(rng.uniform(0.5, 1.5, outputs + groups) * 0.25 * inputs**-0.5, jax.numpy.float32)
        values = jax.numpy.asarray(rng.integers(-7, 8, value.shape), jax.numpy.int8).astype(dtype)
        return QuantizedArray(values, scale, weight.contracting_dims)

    narrow = map_weights(of, model)
    return narrow, map_weights(lambda _, w: wide(w.get_raw_value()), narrow)


def wide(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedArray) else value


@pytest.mark.parametrize(("model_type", "preset"), COSTLY)
def test_quantised_weights(checkpoint_of, mesh_of_sizes, one_device, model_type, preset):
    """A prompt gathers matrices that FSDP splits, a decode step moves tokens: with their scales, both are exact."""
    config = configs.from_hf(checkpoint_of(model_type))
    mesh, rules, tokens = mesh_of_sizes(SIZES[preset]), rules_named(preset), published.tokens(8, 8)
    abstract = with_layer_layout(runtime_model(config, mesh, dtype=np.float32, rules=rules), stacked=False)
    narrow, reference = quantized(abstract, FORMS[model_type])
    placed = with_shardings(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), narrow), mesh, rules)
    ours = jax.tree.map(lambda a, target: jax.device_put(a, target.sharding), narrow, placed)
    single = jax.device_put(reference, NamedSharding(one_device, PartitionSpec()))
    expected = np.asarray(single(tokens, ops=DENSE).logits)
    check_equal(ours(tokens, ops=EXCHANGE).logits, expected)
    check_equal(decoding.teacher_forced(ours, tokens, np.full(8, 7), ops=DENSE), expected)


def test_presets_are_known_by_name():
    assert set(SIZES) < set(PRESETS)
    with pytest.raises(ShardingError, match=r"'fast'.*known: default, serve_latency, serve_throughput, train"):
        rules_named("fast")
