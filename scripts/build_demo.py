"""Builds the demo model, text side and weights: `python -m scripts.build_demo examples/demo_model`.

A decoder of GLM-4.5's kind, small enough for a checkout, learns the tasks of `demo_tasks` from nothing in about
fifteen minutes on two CPU cores: float32, Muon and AdamW, the MTP layer and the routers' biases trained along. It is
written as a Hugging Face directory in bfloat16, read back, and what the read model scores on unseen samples goes into
the README beside it. The run is seeded; on one kind of machine it gives the same model again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from glm_jax.checkpoint.load import load
from glm_jax.checkpoint.names import canonical_mappings
from glm_jax.checkpoint.safetensors import TensorSpec
from glm_jax.checkpoint.safetensors_writer import SafetensorsWriter
from glm_jax.configs import GqaConfig, ModelConfig, MoeConfig, RopeConfig, to_hf
from glm_jax.kernels import with_implementations
from glm_jax.model import Transformer
from glm_jax.sharding import make_mesh, weights_by_name
from glm_jax.text import ChatTemplate, Tokenizer, load_tokenizer
from glm_jax.training import (
    Batch,
    OptimizerConfig,
    StepMetrics,
    TrainState,
    TrainStep,
    build_optimizer,
    build_step,
    create_state,
    pad_rows,
    place,
)
from scripts import demo_eval, demo_tasks, demo_tokenizer

CONFIG = ModelConfig(
    model_type="glm4_moe",
    vocab_size=demo_tokenizer.VOCAB_SIZE,
    embed_dim=128,
    num_layers=4,
    num_dense_layers=1,
    mlp_width=384,
    attention=GqaConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope=RopeConfig(theta=10_000.0, rotary_dim=16),
        qkv_bias=True,
        qk_norm=True,
    ),
    moe=MoeConfig(
        num_experts=8,
        num_experts_per_token=2,
        expert_width=64,
        num_shared_experts=1,
        num_groups=1,
        num_groups_per_token=1,
        normalize_weights=True,
        routed_scaling=2.5,
    ),
    num_mtp_layers=1,
    mtp_copies=(),
    tie_embeddings=False,
    norm_eps=1e-5,
    max_positions=1024,
    initializer_range=0.02,
)
EXPERTS = "block_gmm"  # CPU seconds forward and backward: 0.50, dense 0.67, ragged 0.77


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    Attributes:
        steps: optimizer steps.
        buckets: padded length -> rows of a batch. Each sample goes into the shortest that holds it.
        shares: of the tasks. Tool prompts are long and soon learnt: fewer of them than `demo_tasks.SHARES`.
        evaluate_every: steps between two looks at the accuracies.
        seed: of the weights and the samples.
        drafts: tokens that the MTP layer then learns to draft one after the other, the rest of the model being done.
        draft_steps: of that.
    """

    steps: int = 1400
    buckets: dict[int, int] = dataclasses.field(default_factory=lambda: {64: 32, 112: 18, demo_tasks.MAX_TOKENS: 8})
    shares: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"sum": 0.36, "cups": 0.38, "tool": 0.11, "no_tool": 0.05, "chat": 0.10}
    )
    evaluate_every: int = 200
    muon_rate: float = 0.012
    adam_rate: float = 3e-3
    mtp_weight: float = 0.3
    bias_rate: float = 0.003
    seed: int = 45
    drafts: int = 8
    draft_steps: int = 600
    draft_muon_rate: float = 0.006
    draft_adam_rate: float = 1.5e-3


def batches(recipe: Recipe, tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[Batch]:
    """Yields batches without end, each of samples of about one length."""
    waiting: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {length: [] for length in recipe.buckets}
    for sample in demo_tasks.samples(recipe.seed, shares=recipe.shares):
        row = demo_tasks.encode(sample, tokenizer, template)
        length = next(length for length in recipe.buckets if length >= len(row[0]))
        waiting[length].append(row)
        if len(waiting[length]) == recipe.buckets[length]:
            yield pad_rows(waiting[length], length)
            waiting[length].clear()


def train(recipe: Recipe, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[Transformer, dict[str, float]]:
    """Returns the trained model in float32, and the seconds and tokens that it took."""

    def look(number: int, model: Transformer) -> None:
        if number % recipe.evaluate_every == 0 and number < recipe.steps:
            demo_eval.glance(model, tokenizer, template)

    mesh = make_mesh(devices=jax.devices()[:1])
    model = Transformer.create(CONFIG, mesh=mesh, seed=recipe.seed, dtype=jnp.float32, stacked=True)
    print(f"{sum(w.get_raw_value().size for w in weights_by_name(model).values()):,} parameters", flush=True)
    config = OptimizerConfig(
        muon_rate=recipe.muon_rate,
        adam_rate=recipe.adam_rate,
        steps=recipe.steps,
        warmup_steps=min(40, recipe.steps // 4),
        final_fraction=0.02,
        adam_weights=("embedding.weight", "head.weight", "router.weight"),
    )
    optimizer = build_optimizer(model, config)
    rate = optax.piecewise_constant_schedule(recipe.bias_rate, {int(0.8 * recipe.steps): 0.0})
    ops = with_implementations(model.ops, experts=EXPERTS)
    step = build_step(optimizer, mtp_weight=recipe.mtp_weight, bias_rate=rate, ops=ops)
    state = create_state(model, optimizer)
    return _run(step, state, itertools.islice(batches(recipe, tokenizer, template), recipe.steps), look)


def learn_to_draft(model: Transformer, recipe: Recipe, data: Iterator[Batch]) -> tuple[Transformer, dict[str, float]]:
    """Teaches the MTP layer of a trained float32 model to draft several tokens; nothing else of it changes."""
    config = OptimizerConfig(
        muon_rate=recipe.draft_muon_rate,
        adam_rate=recipe.draft_adam_rate,
        steps=recipe.draft_steps,
        warmup_steps=min(20, recipe.draft_steps // 4),
        final_fraction=0.02,
        adam_weights=("router.weight",),
        trained="mtp.",
    )
    optimizer = build_optimizer(model, config)
    step = build_step(
        optimizer,
        mtp_weight=1.0,
        mtp_drafts=recipe.drafts,
        bias_rate=0.0,
        ops=with_implementations(model.ops, experts=EXPERTS),
        trained=config.trained,
    )
    return _run(step, create_state(model, optimizer), itertools.islice(data, recipe.draft_steps))


def _run(
    step: TrainStep, state: TrainState, data: Iterator[Batch], look: Callable[[int, Transformer], None] | None = None
) -> tuple[Transformer, dict[str, float]]:
    """Takes a step on each batch; returns the model, and the seconds and tokens that it took."""
    start, cpu, tokens, mesh = time.perf_counter(), time.process_time(), 0, state.model.mesh
    with jax.set_mesh(mesh):
        for number, batch in enumerate(data, 1):
            state, metrics = step(state, place(batch, mesh))
            tokens += int(np.sum(batch.padding_mask))
            if number % 20 == 0:
                spent = f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} CPU s"
                print(f"step {number}  {_describe(metrics)}  {tokens:,} tokens, {spent}", flush=True)
            if look is not None:
                look(number, state.model)
    cost = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "tokens": tokens}
    return state.model, cost


def _describe(metrics: StepMetrics) -> str:
    loss = metrics.loss
    return (
        f"loss {loss.next_token:.3f}  mtp {loss.mtp:.3f}  accuracy {loss.accuracy:.3f}/{loss.mtp_accuracy:.3f}  "
        f"gradient {metrics.gradient_norm:.2f}  busiest expert {metrics.imbalance:.2f}"
    )


def write_weights(model: Transformer, directory: Path) -> None:
    """Writes config.json and model.safetensors: bfloat16, and float32 where a weight's dtype is pinned."""
    content = json.dumps(to_hf(model.config), indent=2)
    (directory / "config.json").write_text(content + "\n", encoding="utf-8")
    weights = weights_by_name(model)
    values = {name: np.asarray(weight.get_raw_value()) for name, weight in weights.items()}
    mappings = canonical_mappings(model.config)
    dtypes = {name: "F32" if weights[mapping.weight].pinned else "BF16" for name, mapping in mappings.items()}
    plan = [TensorSpec(name, dtypes[name], mapping.shape) for name, mapping in mappings.items()]
    with SafetensorsWriter(directory, plan) as writer:
        for name, mapping in mappings.items():
            tensor = values[mapping.weight][mapping.index].reshape(mapping.shape)
            writer.write(name, tensor if dtypes[name] == "F32" else tensor.astype(ml_dtypes.bfloat16))


def build(directory: Path, recipe: Recipe, *, samples: int = 200) -> None:
    """Trains the model and writes the directory, README included, with scores on `samples` of each kind."""
    directory.mkdir(parents=True, exist_ok=True)
    demo_tokenizer.build(directory)
    tokenizer, template = load_tokenizer(directory), ChatTemplate.load(directory)
    model, cost = train(recipe, tokenizer, template)
    # The weights are rounded before the drafts are learnt, so that they are learnt of the model that is shipped.
    rounded = _write_and_load(model, directory)
    data = batches(dataclasses.replace(recipe, seed=recipe.seed + 1), tokenizer, template)
    model, more = learn_to_draft(rounded, recipe, data)
    cost = {key: value + more[key] for key, value in cost.items()}
    shipped = _write_and_load(model, directory)
    scores = demo_eval.score(shipped, tokenizer, template, samples=samples)
    table = demo_eval.table(scores)
    print(table, flush=True)
    (directory / "README.md").write_text(_readme(recipe, cost, table), encoding="utf-8")


def _write_and_load(model: Transformer, directory: Path) -> Transformer:
    """The model as it is written: rounded to bfloat16, in float32."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    write_weights(model, directory)
    return load(directory, mesh=model.mesh, dtype=jnp.float32, stacked=True)


def _readme(recipe: Recipe, cost: dict[str, float], table: str) -> str:
    total = sum(int(np.prod(mapping.shape)) for mapping in canonical_mappings(CONFIG).values())
    moe = CONFIG.moe
    made = (
        f"{recipe.steps} and {recipe.draft_steps} steps, {cost['tokens']:,.0f} tokens, seed {recipe.seed}, "
        f"{cost['cpu_seconds']:.0f} CPU seconds with compiling."
    )
    return f"""# The demo model

A toy with the architecture of GLM-4.5, so that everything in this repository can be tried in seconds and without a
download: {total:,} parameters; {CONFIG.num_layers} layers, {CONFIG.num_dense_layers} dense and {CONFIG.num_moe_layers}
with {moe.num_experts} routed experts ({moe.num_experts_per_token} a token) and {moe.num_shared_experts} shared;
QK-norm, partial rotary embedding, one MTP layer, {CONFIG.vocab_size} tokens.

It adds and subtracts digits, follows a ball under five cups, calls a calculator for large numbers and answers from the
result, and greets. In thinking mode it works step by step; in direct mode (`/nothink`) it must answer at once. It knows
nothing else.

## Scores

Greedy decoding with the bfloat16 weights of this directory in float32 arithmetic, on samples from seeds that training
never saw.

{table}

The drafts are those of one token ahead that a greedy decoder accepts, along the reference conversations.

## How it was made

    python -m scripts.build_demo examples/demo_model

{made}

The data are the seeded conversations of `scripts/demo_tasks.py` and nothing else; tokenizer and chat template come from
`scripts/demo_tokenizer.py`. Training ran in float32: Muon (peak rate {recipe.muon_rate}) for matrices, AdamW
({recipe.adam_rate}) for embedding, head, routers, norms and biases; the MTP layer's loss weighs {recipe.mtp_weight};
the routers' correction biases balance the experts without a loss ({recipe.bias_rate} a step) and stay float32 in the
file. Then, all else being done, the MTP layer learnt to draft {recipe.drafts} tokens one after the other, from its own
outputs after the first, for {recipe.draft_steps} steps more.

Licence: Apache-2.0, as the repository.
"""


def main() -> None:
    """Reads the command line and builds."""
    parser = argparse.ArgumentParser(description="Build the demo model.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--samples", type=int, default=200, help="of each kind in the final score")
    arguments = parser.parse_args()
    build(arguments.directory, Recipe(steps=arguments.steps, seed=arguments.seed), samples=arguments.samples)


if __name__ == "__main__":
    main()
