"""What benchmarks share: sections within a time budget, timing, random models on the device, roofline formulas."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.configs import ModelConfig
from glm_jax.model import Transformer
from glm_jax.model.transformer import runtime_model, with_layer_layout
from glm_jax.sharding import Constant, map_weights, with_shardings


class Run:
    """Sections with results, in which a failure is a result too, and none begins after the budget is spent."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.started = time.monotonic()
        self.sections: dict[str, dict[str, Any]] = {}

    def section(self, name: str, rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """Collect the rows of a section; what came before an error or the end of the budget is kept."""
        result: dict[str, Any] = {"rows": []}
        self.sections[name] = result
        if self.spent():
            result["skipped"] = f"{self.budget:.0f} seconds were over"
            return
        began = time.monotonic()
        log(f"\n{name}")
        try:
            for row in rows():
                result["rows"].append(row)
                log("  " + "  ".join(f"{key} {_shown(value)}" for key, value in row.items()))
                if self.spent():
                    result["cut"] = f"{self.budget:.0f} seconds were over"
                    break
        except Exception as error:  # the other sections are worth having
            result["error"] = f"{type(error).__name__}: {error}"[:2000]
            result["traceback"] = traceback.format_exc()[-2000:]
            log(f"  FAILED: {result['error'][:300]}")
        result["seconds"] = round(time.monotonic() - began, 1)

    def attempt(self, row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row with its measures, or with the error that kept them from being taken."""
        try:
            return row | measure()
        except Exception as error:  # so that one implementation that does not fit hides no other
            return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}

    def spent(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() - self.started > self.budget

    @property
    def failures(self) -> int:
        """Sections and rows that failed."""
        rows = [row for section in self.sections.values() for row in section["rows"]]
        return sum("error" in part for part in (*self.sections.values(), *rows))


def log(line: str) -> None:
    """Print a line for people, at once."""
    print(line, file=sys.stderr, flush=True)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call: median and least of several."""

    median: float
    least: float


def measure(call: Callable[[], Any], *, repeats: int, warmup: int = 2) -> Times:
    """Time a call that ends in arrays; the first calls compile and are not counted."""
    for _ in range(warmup):
        jax.block_until_ready(call())
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - began)
    return Times(statistics.median(taken), min(taken))


def random_model(config: ModelConfig, mesh: Any, dtype: Any, *, seed: int = 0) -> Transformer:
    """A model whose weights are drawn on the device, layer by layer, so that little more than their own room is taken.

    Norms are about 1, and biases are not 0.
    """
    abstract = with_shardings(with_layer_layout(runtime_model(config, mesh, dtype=dtype), stacked=False), mesh)

    @functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any, mean: float, std: float) -> jax.Array:
        return (mean + std * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)

    def weight(name: str, declared: Any) -> jax.Array:
        value, key = declared.get_raw_value(), jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        initial = declared.initializer
        mean, std = (initial.value, 0.1) if isinstance(initial, Constant) else (0.0, initial.std)
        return jax.device_put(draw(key, value.shape, value.dtype, mean, std), value.sharding)

    return map_weights(weight, abstract)


# --- what the arithmetic and the memory cost, by formula --------------------------------------------------------------


def attention_parameters(config: ModelConfig) -> int:
    """Parameters of the attention projections of one layer."""
    attention = config.attention
    return config.embed_dim * attention.head_dim * (2 * attention.num_heads + 2 * attention.num_kv_heads)


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one routed expert."""
    return 3 * config.embed_dim * config.moe.expert_width


def prefill_flops(config: ModelConfig, batch: int, length: int) -> float:
    """Operations of a prefill that computes the last position's logits only; scores are counted causally."""
    moe = config.moe
    per_moe = expert_parameters(config) * (moe.num_experts_per_token + moe.num_shared_experts)
    per_moe += moe.num_experts * config.embed_dim
    matrices = config.num_layers * attention_parameters(config) + config.num_moe_layers * per_moe
    matrices += config.num_dense_layers * 3 * config.embed_dim * config.mlp_width
    scores = config.num_layers * 2 * config.attention.num_heads * config.attention.head_dim * length * (length + 1) / 2
    return 2.0 * batch * (matrices * length + scores + config.embed_dim * config.vocab_size)


def distinct_experts(config: ModelConfig, tokens: int) -> float:
    """Experts that a batch of tokens hits on average, if each is chosen as often as any other."""
    moe = config.moe
    return moe.num_experts * (1 - (1 - moe.num_experts_per_token / moe.num_experts) ** tokens)


def decode_bytes(config: ModelConfig, batch: int, context: int, itemsize: int) -> float:
    """Bytes that one decode step must read: each weight that is used once, and the cache of all sequences."""
    moe, attention = config.moe, config.attention
    experts = (distinct_experts(config, batch) + moe.num_shared_experts) * expert_parameters(config)
    weights = config.num_layers * attention_parameters(config) + config.num_moe_layers * experts
    weights += config.num_dense_layers * 3 * config.embed_dim * config.mlp_width
    weights += config.num_moe_layers * moe.num_experts * config.embed_dim + config.embed_dim * config.vocab_size
    cache = 2 * config.num_layers * batch * context * attention.num_kv_heads * attention.head_dim
    return itemsize * (weights + cache)


def ops_with(model: Any, experts: str | None) -> Any:
    """The model's operations, with an implementation of the routed experts by name."""
    from glm_jax.kernels import with_implementations

    return model.ops if experts is None else with_implementations(model.ops, experts=experts)
