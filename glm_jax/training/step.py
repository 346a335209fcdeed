"""One training step as one compiled function: forward, loss, gradient, optimizer, router biases.

The state is donated: the new one takes its memory. Everything runs under the mesh that is set (`jax.set_mesh`); the
state lies like the model, the batch like `batch.place` puts it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from glm_jax.errors import InputError
from glm_jax.kernels import Ops, check_ops
from glm_jax.model import Transformer
from glm_jax.model.transformer import forward
from glm_jax.sharding import PackedBfloat16, QuantizedArray, map_weights, short_repr, weights_by_name
from glm_jax.training.balance import expert_loads, imbalance, update_router_biases
from glm_jax.training.batch import Batch
from glm_jax.training.loss import LossMetrics, language_model_loss
from glm_jax.training.mtp_drafts import mtp_draft_logits


@functools.partial(jax.tree_util.register_dataclass, data_fields=["model", "optimizer", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step: the model, the optimizer's state, the number of steps done (int32)."""

    model: Transformer
    optimizer: Any
    step: jax.Array

    __repr__ = short_repr


@functools.partial(jax.tree_util.register_dataclass, data_fields=["loss", "gradient_norm", "imbalance"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Scalars of one step: the loss, the gradient's norm before clipping, the busiest expert's load over the mean."""

    loss: LossMetrics
    gradient_norm: jax.Array
    imbalance: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def values_by_name(model: Any) -> dict[str, jax.Array]:
    """The values of a model's weights (or of its gradient's) by name.

    Raises:
        InputError: some are quantised, or a CPU's bits of bfloat16: these have no gradient.
    """
    values = {name: weight.get_raw_value() for name, weight in weights_by_name(model).items()}
    if any(isinstance(value, PackedBfloat16) for value in values.values()):
        raise InputError("a CPU holds bfloat16 as bits, which cannot be trained; load the model with dtype='float32'")
    quantized = [name for name, value in values.items() if isinstance(value, QuantizedArray)]
    if quantized:
        raise InputError(
            f"{len(quantized)} of the model's weights are quantised ({quantized[0]}) and cannot be trained; load it "
            "with quantized='dequantize'"
        )
    return values


def create_state(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step. The model's arrays go into it: the first step consumes them.

    Raises:
        InputError: some of the model's weights are quantised.
    """
    with jax.set_mesh(model.mesh):
        return TrainState(model, jax.jit(optimizer.init)(values_by_name(model)), jnp.int32(0))


def build_step(
    optimizer: optax.GradientTransformation,
    *,
    mtp_weight: float = 0.3,
    mtp_drafts: int = 1,
    bias_rate: optax.Schedule | float = 0.001,
    ops: Ops | None = None,
    remat: bool = True,
    trained: str = "",
) -> TrainStep:
    """Return the compiled step of a run, to be called under the mesh; it compiles once for each shape of batch.

    Args:
        optimizer: a transform of dicts by weight name (`optimizer.build_optimizer`).
        mtp_weight: of the MTP layer's loss; 0 leaves the layer out.
        mtp_drafts: tokens that the MTP layer learns to draft one after the other, from its own outputs after the first.
            Each costs a pass of the layer and the head.
        bias_rate: of the routers' biases a step, a number or a schedule.
        ops: the operations to use, by default the model's own.
        remat: keep only the input of each layer for the backward pass, and recompute the rest.
        trained: as in the optimizer's configuration: no gradients are computed of other weights.

    Raises:
        InputError: `mtp_drafts` is below 1; at the first step, it is above 1 and sequences are split over devices.
    """
    check_ops(ops)
    if mtp_drafts < 1:
        raise InputError(f"mtp_drafts must be at least 1, not {mtp_drafts}; mtp_weight 0 leaves the MTP layer out")

    def held(name: str, weight: Any) -> jax.Array:
        value = weight.get_raw_value()
        return value if name.startswith(trained) else jax.lax.stop_gradient(value)

    def loss(model: Transformer, batch: Batch) -> tuple[jax.Array, tuple[LossMetrics, dict[str, jax.Array]]]:
        model = map_weights(held, model)
        mtp = model.mtp is not None and mtp_weight > 0
        tokens = jnp.asarray(batch.tokens)
        output = forward(model, tokens, mtp=mtp, ops=ops, routing=True, remat=remat, keep_last=True)
        drafts = mtp_drafts if mtp else 1
        draft_logits = mtp_draft_logits(model, tokens, output, drafts=drafts, ops=ops, remat=remat)
        metrics = language_model_loss(output, batch, mtp_weight=mtp_weight, draft_logits=draft_logits)
        return metrics.loss, (metrics, expert_loads(output, batch, experts=model.config.moe.num_experts))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        params = values_by_name(state.model)
        gradient, (metrics, loads) = jax.grad(loss, has_aux=True)(state.model, batch)
        gradients = values_by_name(gradient)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, params)
        params = optax.apply_updates(params, updates)
        model = map_weights(lambda name, _: params[name], state.model)
        rate = bias_rate(state.step) if callable(bias_rate) else bias_rate
        model = update_router_biases(model, loads, rate)
        measured = StepMetrics(metrics, optax.tree.norm(gradients), imbalance(loads))
        return TrainState(model, optimizer_state, state.step + 1), measured

    return jax.jit(step, donate_argnums=0)
