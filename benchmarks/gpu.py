"""One GPU: is it right, and how near to the machine's limits is it?

    python benchmarks/gpu.py --output benchmarks/results/NAME.json

First parity: a small random model on the GPU against the same weights in float32 on the CPU. Then speed: prefill and
decode of a model of four layers with the widths and the vocabulary of GLM-4.5-Air, as fractions of the matmul rate and
the copy bandwidth that this machine shows. JSON on stdout or in a file, lines for people on stderr. It needs no
installed package, only jax, flax and numpy. Without a GPU it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import glm_jax
from benchmarks import _common as common
from benchmarks import _parity as parity
from glm_jax.kernels import Ops
from glm_jax.model import create_cache
from glm_jax.sharding import batch_sharding

IMPLEMENTATIONS = (None, "dense", "block_gmm", "ragged")  # None: what the platform chooses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: full size, or tiny to try the program on a CPU."""

    config: glm_jax.configs.ModelConfig
    matmul: int
    copy_bytes: int
    prefills: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    context: int
    steps: int
    repeats: int
    implementations: tuple[str | None, ...] = IMPLEMENTATIONS


def sizes(tiny: bool) -> Sizes:
    """The sizes of a run; the model is that of GLM-4.5-Air cut to one dense layer and three with experts."""
    if tiny:
        config = dataclasses.replace(glm_jax.configs.get("tiny-glm"), num_layers=2, num_mtp_layers=0)
        return Sizes(config, 128, 1 << 16, ((1, 32),), (4, 8), 32, 2, 2, (None, "block_gmm"))
    air = glm_jax.configs.get("glm-4.5-air")
    config = dataclasses.replace(air, num_layers=4, num_mtp_layers=0, mtp_copies=())
    return Sizes(config, 8192, 2 << 30, ((1, 2048), (4, 2048)), (1, 8, 32), 2048, 16, 10)


# --- the machine ------------------------------------------------------------------------------------------------------


def measure_machine(device: Any, size: Sizes) -> Iterator[dict[str, Any]]:
    """The matmul rate in bfloat16 and the copy bandwidth, the limits that speeds are held against."""
    n = size.matmul
    left, right = (jax.device_put(jnp.ones((n, n), jnp.bfloat16), device) for _ in range(2))
    times = common.measure(functools.partial(jax.jit(jnp.matmul), left, right), repeats=2 * size.repeats)
    yield {"what": f"matmul {n}^3 bfloat16", "ms": times.median * 1e3, "tflops": 2 * n**3 / times.least / 1e12}
    source = jax.device_put(jnp.ones(size.copy_bytes // 2, jnp.bfloat16), device)
    times = common.measure(functools.partial(jax.jit(jnp.negative), source), repeats=2 * size.repeats)
    gbps = 2 * source.nbytes / times.least / 1e9
    yield {"what": f"copy {source.nbytes >> 20} MiB", "ms": times.median * 1e3, "gbps": gbps}


# --- speed ------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="ops", donate_argnames="cache")
def prefill(model: Any, tokens: jax.Array, cache: Any, *, ops: Ops) -> Any:
    """The likeliest next tokens [B] of prompts [B, T], and their cache."""
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    context = model.context(positions, prefill=True, ops=ops)
    hidden, cache, _ = model.hidden_states(tokens, context=context, cache=cache)
    return ops.argmax(model.logits(hidden[:, -1:], ops=ops)[:, 0]), cache


@functools.partial(jax.jit, static_argnames=("steps", "ops"), donate_argnames="cache")
def decode(model: Any, tokens: jax.Array, positions: jax.Array, cache: Any, *, steps: int, ops: Ops) -> Any:
    """`steps` greedy steps from tokens [B] at positions [B]: the last tokens, and the cache."""

    def body(carry, _):
        tokens, positions, cache = carry
        context = model.context(positions[:, None], prefill=False, ops=ops)
        hidden, cache, _ = model.hidden_states(tokens[:, None], context=context, cache=cache)
        return (ops.argmax(model.logits(hidden, ops=ops)[:, 0]), positions + 1, cache), None

    (tokens, _, cache), _ = jax.lax.scan(body, (tokens, positions, cache), length=steps)
    return tokens, cache


class Speed:
    """Prefill and decode of one model, as fractions of the machine's rate and bandwidth."""

    def __init__(self, run: common.Run, model: Any, size: Sizes, limits: tuple[float, float]) -> None:
        self.run, self.model, self.size = run, model, size
        self.flops, self.bandwidth = limits
        self.mesh = model.mesh

    def place(self, array: np.ndarray) -> jax.Array:
        """An array of sequences on the device."""
        return jax.device_put(array, batch_sharding(array.shape[0], self.mesh))

    def prefills(self) -> Iterator[dict[str, Any]]:
        """Rows of prompts of one length, none padded."""
        for batch, length in self.size.prefills:
            for name in self.size.implementations:
                row = {"batch": batch, "length": length, "experts": name or "default"}
                yield self.run.attempt(row, functools.partial(self.time_prefill, batch, length, name))

    def time_prefill(self, batch: int, length: int, name: str | None) -> dict[str, Any]:
        """One prefill, its cache handed on from call to call."""
        rng = np.random.default_rng(0)
        with jax.set_mesh(self.mesh):
            tokens = self.place(rng.integers(0, self.model.config.vocab_size, (batch, length)).astype(np.int32))
            cache = create_cache(self.model, batch, length)

            def call() -> jax.Array:
                nonlocal cache
                first, cache = prefill(self.model, tokens, cache, ops=common.ops_with(self.model, name))
                return first

            times = common.measure(call, repeats=self.size.repeats)
        rate = common.prefill_flops(self.model.config, batch, length) / times.median
        return {
            "ms": times.median * 1e3,
            "least_ms": times.least * 1e3,
            "tokens_per_second": batch * length / times.median,
            "tflops": rate / 1e12,
            "of_matmul_rate": rate / self.flops,
        }

    def decodes(self) -> Iterator[dict[str, Any]]:
        """Rows of batches at the same full context."""
        for batch in self.size.batches:
            for name in self.size.implementations:
                row = {"batch": batch, "context": self.size.context, "experts": name or "default"}
                yield self.run.attempt(row, functools.partial(self.time_decode, batch, name))

    def time_decode(self, batch: int, name: str | None) -> dict[str, Any]:
        """Several steps at the end of the context; attention reads the whole cache whatever it holds."""
        size, rng = self.size, np.random.default_rng(0)
        with jax.set_mesh(self.mesh):
            tokens = self.place(rng.integers(0, self.model.config.vocab_size, batch).astype(np.int32))
            positions = self.place(np.full(batch, size.context - size.steps, np.int32))
            cache = create_cache(self.model, batch, size.context)

            def call() -> jax.Array:
                nonlocal cache
                last, cache = decode(
                    self.model, tokens, positions, cache, steps=size.steps, ops=common.ops_with(self.model, name)
                )
                return last

            times = common.measure(call, repeats=size.repeats)
        step = times.median / size.steps
        read = common.decode_bytes(self.model.config, batch, size.context, jnp.dtype(self.model.dtype).itemsize)
        return {
            "ms": step * 1e3,
            "least_ms": times.least / size.steps * 1e3,
            "tokens_per_second": batch / step,
            "gbps": read / step / 1e9,
            "of_copy_bandwidth": read / step / self.bandwidth,
        }

    def generations(self) -> Iterator[dict[str, Any]]:
        """What a caller of `glm_jax.generate` gets, prompts and all."""
        rng, new = np.random.default_rng(0), 4 * self.size.steps
        length = self.size.context // 4
        for batch in self.size.batches:
            prompts = rng.integers(0, self.model.config.vocab_size, (batch, length)).tolist()
            call = functools.partial(glm_jax.generate, self.model, prompts, max_new_tokens=new)
            times = common.measure(call, repeats=3, warmup=1)
            yield {"batch": batch, "prompt": length, "new": new, "ms": times.median * 1e3} | {
                "new_tokens_per_second": batch * new / times.median
            }


def run_all(device: Any, *, tiny: bool, budget: float) -> dict[str, Any]:
    """All sections, in the order of what matters most."""
    size, run = sizes(tiny), common.Run(budget)
    run.section("machine", functools.partial(measure_machine, device, size))
    run.section("parity", functools.partial(parity.measure, run, device, size.implementations))
    found = {key: row[key] for row in run.sections["machine"]["rows"] for key in ("tflops", "gbps") if key in row}
    limits = (found.get("tflops", float("nan")) * 1e12, found.get("gbps", float("nan")) * 1e9)
    made: dict[str, Speed] = {}

    def build() -> Iterator[dict[str, Any]]:
        model = common.random_model(size.config, glm_jax.make_mesh(devices=[device]), jnp.bfloat16)
        jax.block_until_ready(jax.tree.leaves(model))
        made["speed"] = Speed(run, model, size, limits)
        leaves = jax.tree.leaves(model)
        yield {"parameters": sum(leaf.size for leaf in leaves), "bytes": sum(leaf.nbytes for leaf in leaves)}

    run.section("model", build)
    for name in ("decodes", "prefills", "generations") if made else ():
        run.section(name, getattr(made["speed"], name))
    return {
        "device": {"kind": device.device_kind, "platform": device.platform, "memory": memory_of(device)},
        "versions": {"jax": jax.__version__, "glm_jax": glm_jax.__version__, "python": sys.version.split()[0]},
        "model": dataclasses.asdict(size.config),
        "sections": run.sections,
        "failures": run.failures,
        "parity_within_limits": parity.within_limits(run.sections["parity"]["rows"]),
    }


def memory_of(device: Any) -> int | None:
    """Bytes that the device offers to this process, if it says."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def find_device(platform: str) -> Any | None:
    """The first device of a platform, or None."""
    try:
        return jax.devices(platform)[0]
    except RuntimeError:
        return None


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the JSON here instead of to stdout")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which nothing new is begun")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the program itself")
    parser.add_argument("--platform", default="gpu", help="gpu, or cpu with --tiny")
    arguments = parser.parse_args()
    device = find_device(arguments.platform)
    if device is None:
        print(f"no {arguments.platform} here: nothing was measured")
        return
    result = run_all(device, tiny=arguments.tiny, budget=arguments.budget)
    text = json.dumps(result, indent=1)
    if arguments.output is None:
        print(text)
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
