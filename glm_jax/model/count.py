"""Parameter counts, total and active, from the declared weights."""

from __future__ import annotations

import dataclasses
import math

from glm_jax.configs import ModelConfig
from glm_jax.model.transformer import Transformer
from glm_jax.sharding import weights_by_name


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, each way that the papers and checkpoints count them.

    Attributes:
        total: everything the checkpoint stores, the MTP layer and its copies included.
        without_mtp: the decoder alone, with embedding and head.
        report: as GLM-4.5's report counts: with the MTP layer, without any embedding or output head.
        report_without_mtp: the same without the MTP layer.
        active: used for one token: of the routed experts only the chosen, and not the router's correction bias, which
            moves the choice but enters no product; otherwise counted as `report`.
        active_without_mtp: the same without the MTP layer.
        active_with_embeddings: `active_without_mtp` plus embedding and head.
    """

    total: int
    without_mtp: int
    report: int
    report_without_mtp: int
    active: int
    active_without_mtp: int
    active_with_embeddings: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of a configuration."""
    sizes = {name: math.prod(w.get_raw_value().shape) for name, w in weights_by_name(Transformer(config)).items()}
    unused = 1 - config.moe.num_experts_per_token / config.moe.num_experts
    idle = {name: round(size * unused) for name, size in sizes.items() if ".experts." in name}
    vocabulary = {name for name in sizes if name.split(".")[-2] in ("embedding", "head")}
    mtp = {name for name in sizes if name.startswith("mtp.")}

    def total(names: set[str]) -> int:
        return sum(sizes[name] for name in names)

    def active(names: set[str]) -> int:
        return sum(sizes[name] - idle.get(name, 0) for name in names if not name.endswith(".router.bias"))

    everything = set(sizes)
    return ParameterCounts(
        total=total(everything),
        without_mtp=total(everything - mtp),
        report=total(everything - vocabulary),
        report_without_mtp=total(everything - vocabulary - mtp),
        active=active(everything - vocabulary),
        active_without_mtp=active(everything - vocabulary - mtp),
        active_with_embeddings=active(everything - mtp),
    )
