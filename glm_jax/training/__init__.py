"""Training: the loss, the optimizer, and the compiled step that joins them."""

from __future__ import annotations

from glm_jax.training.batch import Batch, pad_rows, place
from glm_jax.training.loss import LossMetrics, cross_entropy, language_model_loss
from glm_jax.training.muon import MatrixAxes, matrix_axes, orthogonalize, scale_by_muon
from glm_jax.training.optimizer import OptimizerConfig, build_optimizer, schedule
from glm_jax.training.saving import restore_state, save_state
from glm_jax.training.step import StepMetrics, TrainState, TrainStep, build_step, create_state

__all__ = [
    "Batch",
    "LossMetrics",
    "MatrixAxes",
    "OptimizerConfig",
    "StepMetrics",
    "TrainState",
    "TrainStep",
    "build_optimizer",
    "build_step",
    "create_state",
    "cross_entropy",
    "language_model_loss",
    "matrix_axes",
    "orthogonalize",
    "pad_rows",
    "place",
    "restore_state",
    "save_state",
    "scale_by_muon",
    "schedule",
]
