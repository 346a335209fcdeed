"""The jobs that are compiled ahead of time: each at the real size of its model, for a topology that one can rent."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One job on one mesh.

    Attributes:
        name: of the row, and of its file.
        model: a preset.
        device: a kind of `glm_jax.planning.DEVICES`.
        topology: of a TPU slice, in chips; None of GPUs.
        count: of GPUs.
        mesh: sizes of data, expert and tensor.
        rules: a preset of `glm_jax.sharding`.
        kind: decode, prefill or train.
        batch: sequences.
        length: tokens of each.
        weights: a name of `glm_jax.planning.job.WEIGHTS`.
        gib: at most so much a device, as asked; None where nothing was asked.
        seconds: at most so long to compile, on two free processors; likewise.
    """

    name: str
    model: str
    device: str
    mesh: tuple[int, int, int]
    rules: str
    kind: str
    batch: int
    length: int
    topology: str | None = None
    count: int | None = None
    weights: str = "bfloat16"
    gib: float | None = None
    seconds: float | None = None

    def job(self) -> Any:
        """What is to run."""
        from glm_jax import configs
        from glm_jax.planning import Job
        from glm_jax.sharding import rules_named

        return Job(
            config=configs.get(self.model),
            kind=self.kind,
            batch=self.batch,
            length=self.length,
            weights=self.weights,
            rules=rules_named(self.rules),
        )

    def cluster(self) -> Any:
        """Where."""
        from glm_jax.planning import choose_cluster

        return choose_cluster(self.device, count=self.count, topology=self.topology)

    def to_json(self) -> dict[str, Any]:
        """The row as its result holds it; bounds are no part of what is compiled."""
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key not in ("gib", "seconds")}
        return {**fields, "mesh": list(self.mesh)}


def _decode(name: str, model: str, device: str, **options: Any) -> Row:
    return Row(**{"name": name, "model": model, "device": device, "kind": "decode", "length": 4096, **options})


def _prefill(name: str, model: str, device: str, **options: Any) -> Row:
    return _decode(name, model, device, **{"kind": "prefill", **options})


LATENCY, THROUGHPUT = {"rules": "serve_latency"}, {"rules": "serve_throughput"}
DP_ON_64 = {"topology": "4x4x4", "mesh": (1, 16, 4), **THROUGHPUT, "batch": 64}
DP_ON_16_GPUS = {"count": 16, "mesh": (1, 2, 8), **THROUGHPUT, "batch": 64}
ON_16, ON_64 = {"topology": "2x2x4", "mesh": (1, 4, 4)}, {"topology": "4x4x4", "mesh": (1, 8, 8)}
AIR, GLM, DEEPSEEK, KIMI = "glm-4.5-air", "glm-4.5", "deepseek-v3", "kimi-k2"

ROWS = (
    _decode("air-v5p-decode", AIR, "v5p", **ON_16, **LATENCY, batch=64, gib=19, seconds=60),
    _decode("air-v5p-decode-int8", AIR, "v5p", **ON_16, **LATENCY, batch=64, weights="int8"),
    _decode("air-v5p-decode-fp8", AIR, "v5p", **ON_16, **LATENCY, batch=64, weights="fp8"),
    _prefill("air-v6e-prefill", AIR, "v6e", topology="4x4", mesh=(1, 4, 4), **LATENCY, batch=4, gib=15, seconds=300),
    _decode("glm-4.5-v5p-decode", GLM, "v5p", **ON_64, **LATENCY, batch=64, gib=14, seconds=90),
    _decode("glm-4.5-v5p-decode-int8", GLM, "v5p", **ON_64, **LATENCY, batch=64, weights="int8"),
    _decode("glm-4.5-v5p-decode-fp8", GLM, "v5p", **ON_64, **LATENCY, batch=64, weights="fp8"),
    _prefill(
        "glm-4.5-v5p-prefill", GLM, "v5p", topology="4x4x4", mesh=(1, 16, 4), **LATENCY, batch=16, gib=18, seconds=240
    ),
    Row(
        name="glm-4.5-v5p-train",
        model=GLM,
        device="v5p",
        topology="4x4x8",
        mesh=(2, 32, 2),
        rules="train",
        kind="train",
        batch=128,
        length=4096,
        gib=95,
        seconds=1800,
    ),
    _decode("deepseek-v3-v5p-decode", DEEPSEEK, "v5p", **DP_ON_64),
    _decode("deepseek-v3-v5p-decode-fp8", DEEPSEEK, "v5p", **DP_ON_64, weights="fp8"),
    _prefill("deepseek-v3-v5p-prefill-fp8", DEEPSEEK, "v5p", **DP_ON_64, weights="fp8"),
    _decode("kimi-k2-v5p-decode", KIMI, "v5p", **DP_ON_64),
    _decode("kimi-k2-v5p-decode-fp8", KIMI, "v5p", **DP_ON_64, weights="fp8"),
    _prefill("kimi-k2-v5p-prefill-fp8", KIMI, "v5p", **DP_ON_64, weights="fp8"),
    _decode(
        "glm-4.5-h200-decode-fp8",
        GLM,
        "h200",
        count=8,
        mesh=(1, 1, 8),
        rules="default",
        batch=64,
        weights="fp8",
        gib=60,
        seconds=300,
    ),
    _decode("glm-4.5-h200-decode", GLM, "h200", count=8, mesh=(1, 1, 8), rules="default", batch=64),
    _decode(
        "glm-4.5-h200-decode-int8", GLM, "h200", count=8, mesh=(1, 1, 8), rules="default", batch=64, weights="int8"
    ),
    _decode(
        "air-h200-decode-fp8",
        AIR,
        "h200",
        count=1,
        mesh=(1, 1, 1),
        rules="default",
        batch=32,
        weights="fp8",
        gib=130,
        seconds=180,
    ),
    _decode("deepseek-v3-h200-decode-fp8", DEEPSEEK, "h200", **DP_ON_16_GPUS, weights="fp8", gib=130, seconds=300),
    _decode("deepseek-v3-h200-decode", DEEPSEEK, "h200", **DP_ON_16_GPUS),
    _decode("kimi-k2-h200-decode-fp8", KIMI, "h200", **DP_ON_16_GPUS, weights="fp8", gib=130, seconds=300),
    _decode(
        "air-h100-decode-fp8-128k",
        AIR,
        "h100",
        count=4,
        mesh=(1, 1, 4),
        rules="default",
        batch=8,
        length=131072,
        weights="fp8",
        gib=76,
        seconds=180,
    ),
)
