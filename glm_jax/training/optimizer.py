"""The optimizer of a model: Muon for matrices, AdamW for the rest, one schedule, one clip.

It works on the weights as a dict by name, so that its state reads like a checkpoint. Which weight goes where derives
from the declarations. GLM-4.5's report (arXiv 2508.06471, section 2.4) uses Muon for all but word embedding, biases
and norms; what optimizes those it does not say, AdamW is assumed. The routers' correction biases are no optimizer's:
`training.balance` moves them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import optax  # type: ignore[import-untyped]

from glm_jax.sharding import weights_by_name
from glm_jax.training.balance import is_bias
from glm_jax.training.muon import matrix_axes, scale_by_muon

MUON, ADAM, ADAM_NO_DECAY, FROZEN = "muon", "adam", "plain adam", "frozen"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a run moves its weights. The defaults are the report's where it gives them.

    Attributes:
        muon_rate: peak learning rate of the matrices.
        adam_rate: peak learning rate of the rest.
        steps: steps of the whole schedule.
        warmup_steps: the rates rise linearly from 0 for so many steps, then fall along a cosine.
        final_fraction: of the peak rates, at the end.
        weight_decay: decoupled and times the rate, on matrices and the embedding.
        adam_weights: ends of names of matrices that AdamW moves. The report excepts the embedding only; smaller models
            often do better with head and router here, too.
        clip_norm: the gradient is scaled down to this global norm.
        momentum: Muon's.
        adam_betas: AdamW's.
        trained: the beginning of the names of the weights that move, as `mtp.`; the rest stays as it is.
    """

    muon_rate: float = 2.5e-4
    adam_rate: float = 2.5e-4
    steps: int
    warmup_steps: int
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    adam_weights: tuple[str, ...] = ("embedding.weight",)
    clip_norm: float = 1.0
    momentum: float = 0.95
    adam_betas: tuple[float, float] = (0.9, 0.95)
    trained: str = ""


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a fraction of its peak: linear warm-up, then a cosine down to `final_fraction`."""
    return optax.warmup_cosine_decay_schedule(
        0.0, 1.0, config.warmup_steps, config.steps, end_value=config.final_fraction
    )


def optimizer_labels(model: Any, config: OptimizerConfig) -> dict[str, str]:
    """Which of MUON, ADAM (with decay), ADAM_NO_DECAY (without) and FROZEN each weight of a model is."""
    found = {}
    for name, weight in weights_by_name(model).items():
        if is_bias(name) or not name.startswith(config.trained):
            found[name] = FROZEN
        elif matrix_axes(weight) is None:
            found[name] = ADAM_NO_DECAY
        else:
            found[name] = ADAM if name.endswith(config.adam_weights) else MUON
    return found


def build_optimizer(model: Any, config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the optimizer for a model (abstract or not), a transform of dicts by weight name."""
    axes = {name: found for name, weight in weights_by_name(model).items() if (found := matrix_axes(weight))}
    shape = schedule(config)

    def descend(rate: float) -> optax.GradientTransformation:
        return optax.scale_by_learning_rate(lambda step: rate * shape(step))

    decay = optax.add_decayed_weights(config.weight_decay)
    adam = optax.scale_by_adam(*config.adam_betas)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(
            {
                MUON: optax.chain(scale_by_muon(axes, momentum=config.momentum), decay, descend(config.muon_rate)),
                ADAM: optax.chain(adam, decay, descend(config.adam_rate)),
                ADAM_NO_DECAY: optax.chain(adam, descend(config.adam_rate)),
                FROZEN: optax.set_to_zero(),
            },
            optimizer_labels(model, config),
        ),
    )
