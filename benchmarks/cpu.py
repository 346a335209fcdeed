"""What a CPU can measure: glm_jax against transformers, on one random model, interleaved in one run.

    python benchmarks/cpu.py [--quick] [--json=FILE] [--repeats=N]

The model is GLM-4.5's architecture at 200M parameters (8 layers of width 512, 64 experts of width 256, 8 chosen). It
is made by transformers, saved, and loaded by both. Timed are a prefill of 1 x 512 tokens and decode steps of batches
of 1, 8 and 32 sequences, each from a prompt of 128 tokens; greedy, the choice of the token included. transformers runs
a loop written by hand (faster than `generate`) over a DynamicCache, with sdpa attention, in float32 and bfloat16, each
with its grouped and its eager experts; glm_jax runs its own generation in both dtypes.

Single times on a shared machine mean little. All rivals take turns within a round, rounds repeat, and what counts is
the ratio of medians, or of minima, of the same run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import torch
import transformers
from absl import app, flags
from rich.console import Console
from rich.table import Table

import glm_jax
from glm_jax.inference.config import Sampling
from glm_jax.inference.runner import Runner
from glm_jax.inference.sampling import Sampler

QUICK = flags.DEFINE_bool("quick", False, "few repeats, batches of 1 and 8 only, no eager experts")
JSON = flags.DEFINE_string("json", None, "also write all times to this file")
REPEATS = flags.DEFINE_integer("repeats", 12, "rounds of each phase", lower_bound=2)

VOCAB = 8192
PREFILL_LENGTH = 512
PROMPT_LENGTH = 128
STEPS = 4  # decode steps a turn
CACHE_LENGTH = 256  # of glm_jax: the prompt and all steps of a phase, rounded up to a power of two
PAUSE = 0.02  # seconds between turns: the idle threads of the last one go to sleep
OURS = ("glm_jax float32", "glm_jax bfloat16")


class Rival(Protocol):
    """One implementation: prefill, and decode steps that continue one batch."""

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """The token after each prompt int [B, T]."""

    def start(self, tokens: np.ndarray) -> np.ndarray:
        """Prefill, and keep the batch to decode."""

    def decode(self, steps: int) -> np.ndarray:
        """The next `steps` tokens [steps, B] of the batch kept."""


class GlmJax:
    """This project, through the runner that its own generation uses."""

    def __init__(self, directory: Path, dtype: str):
        self._runner = Runner(glm_jax.load(directory, dtype=dtype))
        self._sampler = Sampler.create(Sampling(max_new_tokens=1))
        self._state: Any = None

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """See `Rival`."""
        return np.asarray(self._run(tokens, cache_length=tokens.shape[1]).tokens)

    def start(self, tokens: np.ndarray) -> np.ndarray:
        """See `Rival`."""
        self._state = self._run(tokens, cache_length=CACHE_LENGTH)
        return np.asarray(self._state.tokens)

    def decode(self, steps: int) -> np.ndarray:
        """See `Rival`."""
        self._state, tokens = self._runner.decode(self._state, self._sampler, steps=steps)
        return np.asarray(tokens)

    def _run(self, tokens: np.ndarray, *, cache_length: int) -> Any:
        return self._runner.prefill(
            tokens.tolist(), self._sampler, padded_length=tokens.shape[1], cache_length=cache_length
        )


class Transformers:
    """transformers in one dtype with one implementation of the experts; rivals of one dtype share the weights."""

    def __init__(self, model: Any, experts: str):
        self._model, self._experts = model, experts
        self._cache: Any = None
        self._newest: Any = None

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """See `Rival`."""
        return self._step(torch.from_numpy(tokens), self._new_cache()).numpy()

    def start(self, tokens: np.ndarray) -> np.ndarray:
        """See `Rival`."""
        self._cache = self._new_cache()
        self._newest = self._step(torch.from_numpy(tokens), self._cache)
        return self._newest.numpy()

    def decode(self, steps: int) -> np.ndarray:
        """See `Rival`."""
        taken = []
        for _ in range(steps):
            self._newest = self._step(self._newest[:, None], self._cache)
            taken.append(self._newest)
        return torch.stack(taken).numpy()

    def _new_cache(self) -> Any:
        return transformers.DynamicCache(config=self._model.config)

    def _step(self, tokens: Any, cache: Any) -> Any:
        self._model.set_experts_implementation(self._experts)
        with torch.inference_mode():
            out = self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)


def save_model(directory: Path) -> int:
    """Let transformers make and save the random model; returns its number of parameters."""
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=256,
        n_routed_experts=64,
        num_experts_per_tok=8,
        n_shared_experts=1,
        first_k_dense_replace=1,
        max_position_embeddings=4096,
        attention_bias=True,
        dtype="float32",
    )
    model = transformers.Glm4MoeForCausalLM(config)
    model.save_pretrained(directory)
    return model.num_parameters()


def rivals(directory: Path, implementations: tuple[str, ...]) -> dict[str, Rival]:
    """glm_jax, and transformers with these implementations of the experts, over the same checkpoint."""
    made: dict[str, Rival] = {ours: GlmJax(directory, ours.split()[1]) for ours in OURS}
    for dtype in ("float32", "bfloat16"):
        model = transformers.Glm4MoeForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        for experts in implementations:
            made[f"transformers {dtype} {experts}"] = Transformers(model, experts)
    return made


@dataclasses.dataclass
class Phase:
    """The times of one phase in seconds, by rival, a value a round; and how many tokens agree with transformers."""

    name: str
    times: dict[str, list[float]]
    agreement: float

    def best(self, prefix: str) -> str:
        """The rival with this prefix that has the lowest median."""
        return min((n for n in self.times if n.startswith(prefix)), key=lambda n: statistics.median(self.times[n]))

    def ratio(self, ours: str, prefix: str, of: Callable[[list[float]], float]) -> float:
        """How many times faster we are in a dtype than the best rival with this prefix, by medians or minima."""
        return of(self.times[self.best(prefix)]) / of(self.times[ours])


def measure(name: str, turns: dict[str, Callable[[], float]], repeats: int, agreement: float) -> Phase:
    """Let all rivals take turns, each round beginning with another one."""
    times: dict[str, list[float]] = {rival: [] for rival in turns}
    names = list(turns)
    for number in range(repeats):
        for rival in names[number % len(names) :] + names[: number % len(names)]:
            time.sleep(PAUSE)
            times[rival].append(turns[rival]())
    return Phase(name, times, agreement)


def measure_prefill(everyone: dict[str, Rival], repeats: int) -> Phase:
    """Time of a whole prompt to its first token."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (1, PREFILL_LENGTH))
    firsts = {name: rival.prefill(tokens) for name, rival in everyone.items()}

    def turn(rival: Rival) -> float:
        start = time.perf_counter()
        rival.prefill(tokens)
        return time.perf_counter() - start

    turns = {name: lambda rival=rival: turn(rival) for name, rival in everyone.items()}
    return measure(f"prefill 1 x {PREFILL_LENGTH}", turns, repeats, _agreement(firsts))


def measure_decode(everyone: dict[str, Rival], batch: int, repeats: int) -> Phase:
    """Time of one decode step of a batch."""
    tokens = np.random.default_rng(batch).integers(0, VOCAB, (batch, PROMPT_LENGTH))
    repeats = min(repeats, (CACHE_LENGTH - PROMPT_LENGTH) // STEPS // 2 - 1)
    firsts = {name: np.vstack([rival.start(tokens), rival.decode(STEPS)]) for name, rival in everyone.items()}

    def turn(rival: Rival) -> float:
        rival.decode(1)
        start = time.perf_counter()
        rival.decode(STEPS)
        return (time.perf_counter() - start) / STEPS

    turns = {name: lambda rival=rival: turn(rival) for name, rival in everyone.items()}
    return measure(f"decode, batch {batch}", turns, repeats, _agreement(firsts))


def _agreement(firsts: dict[str, np.ndarray]) -> float:
    return float(np.mean(firsts[OURS[0]] == firsts["transformers float32 grouped_mm"]))


def environment() -> dict[str, Any]:
    """What the times depend on."""
    return {
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "load average before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def show(phases: list[Phase], around: dict[str, Any]) -> None:
    """Print the times and the ratios."""
    console = Console(width=130)
    table = Table("milliseconds, median (min)", *(phase.name for phase in phases), title="Less is better")
    for rival in phases[0].times:
        cells = (f"{1e3 * statistics.median(p.times[rival]):.1f} ({1e3 * min(p.times[rival]):.1f})" for p in phases)
        table.add_row(rival, *cells)
    console.print(table)
    table = Table("glm_jax is faster by, median (min)", *(phase.name for phase in phases))
    for ours, title, prefix in (
        (OURS[0], "than the best float32", "transformers float32"),
        (OURS[1], "than the best float32", "transformers float32"),
        (OURS[0], "than the best of all", "transformers"),
        (OURS[1], "than the best of all", "transformers"),
    ):
        cells = (f"{p.ratio(ours, prefix, statistics.median):.2f} ({p.ratio(ours, prefix, min):.2f})" for p in phases)
        table.add_row(f"{ours.split()[1]}, {title}", *cells)
    table.add_row("first float32 tokens equal", *(f"{100 * p.agreement:.0f}%" for p in phases))
    console.print(table)
    console.print(", ".join(f"{key}: {value}" for key, value in around.items()), soft_wrap=True, highlight=False)
    if around["load average before"][0] > around["cores"] / 4:
        console.print(
            "The machine was busy with other work. That slows torch's threads, which wait for one another, far"
        )
        console.print("more than ours: do not quote these ratios.")


def main(arguments: list[str]) -> None:
    """Measure, print, and write the times where asked to."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    repeats = min(REPEATS.value, 4) if QUICK.value else REPEATS.value
    batches = (1, 8) if QUICK.value else (1, 8, 32)
    around = environment()
    with tempfile.TemporaryDirectory() as directory:
        around["parameters"] = save_model(Path(directory))
        everyone = rivals(Path(directory), ("grouped_mm",) if QUICK.value else ("grouped_mm", "eager"))
        print("prefill", file=sys.stderr)
        phases = [measure_prefill(everyone, repeats)]
        for batch in batches:
            print(f"decode, batch {batch}", file=sys.stderr)
            phases.append(measure_decode(everyone, batch, repeats))
    show(phases, around)
    if JSON.value:
        report = {"environment": around, "phases": [dataclasses.asdict(phase) for phase in phases]}
        Path(JSON.value).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
