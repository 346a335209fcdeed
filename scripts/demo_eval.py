"""How good the demo model is: a quick look during training, and the scores by greedy decoding.

The quick look holds the argmax of one forward pass against the reference (every token of a turn must be right). The
scores let the model write each turn itself and ask `demo_tasks.verify`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.inference.generate import generate
from glm_jax.kernels import with_implementations
from glm_jax.model import Transformer
from glm_jax.model.transformer import forward
from glm_jax.text import ChatTemplate, Tokenizer
from glm_jax.training import Batch, pad_rows
from scripts import demo_tasks
from scripts.demo_tasks import DIRECT, THINKING, Sample

# What is scored: title, task, size (None: any), turn.
CELLS = (
    ("sum of 4", "sum", 4, 0),
    ("sum of 8", "sum", 8, 0),
    ("cups, 4 swaps", "cups", 4, 0),
    ("cups, 8 swaps", "cups", 8, 0),
    ("calculator: the call", "tool", None, 0),
    ("calculator: the answer", "tool", None, 1),
    ("calculator not needed", "no_tool", None, 0),
    ("chat", "chat", None, 0),
)
SEED = 1_000_003
MTP = "MTP draft accepted"
STOPS = ("<|user|>", "<|observation|>", "<|endoftext|>")

Scores = dict[str, dict[str, float]]


def unseen(task: str, mode: str, size: int | None, count: int) -> list[Sample]:
    """Returns samples that no training seed makes."""
    rng = random.Random(f"{SEED} {task} {mode} {size}")
    return [demo_tasks.make(task, mode, rng, size=size) for _ in range(count)]


def glance(model: Transformer, tokenizer: Tokenizer, template: ChatTemplate, *, samples: int = 24) -> Scores:
    """Print and return the share of samples whose tokens in the loss mask are all the argmax."""
    scores: Scores = {}
    for title, task, size, turn in CELLS:
        for mode in () if turn else (THINKING, DIRECT):
            rows = [demo_tasks.encode(s, tokenizer, template) for s in unseen(task, mode, size, samples)]
            right, accepted = _check_rows(model, pad_rows(rows, demo_tasks.MAX_TOKENS))
            scores.setdefault(title, {})[mode] = float(np.mean(right))
            scores.setdefault(MTP, {}).setdefault(mode, 0.0)
            scores[MTP][mode] = accepted if task == "cups" else scores[MTP][mode]
    print("  " + "; ".join(f"{title} {s[THINKING]:.2f}/{s[DIRECT]:.2f}" for title, s in scores.items()), flush=True)
    return scores


def score(model: Transformer, tokenizer: Tokenizer, template: ChatTemplate, *, samples: int) -> Scores:
    """Returns title -> mode -> share of right turns by greedy decoding, and the MTP layer's accepted drafts."""
    scores: Scores = {}
    for mode in (THINKING, DIRECT):
        accepted, counted = 0.0, 0
        for title, task, size, turn in CELLS:
            chosen = unseen(task, mode, size, samples)
            texts = list(_written(model, tokenizer, template, chosen, turn=turn))
            right = [demo_tasks.verify(s, text, turn=turn) for s, text in zip(chosen, texts, strict=True)]
            scores.setdefault(title, {})[mode] = float(np.mean(right))
            if turn == 0:
                rows = [demo_tasks.encode(s, tokenizer, template) for s in chosen]
                share = _check_rows(model, pad_rows(rows, demo_tasks.MAX_TOKENS))[1]
                weight = sum(int(mask.sum()) for _, mask in rows)
                accepted, counted = accepted + share * weight, counted + weight
        scores.setdefault(MTP, {})[mode] = accepted / counted
    return scores


def table(scores: Scores) -> str:
    """The scores as a Markdown table."""
    lines = ["| task | thinking | direct |", "|---|---|---|"]
    lines += [f"| {title} | {score[THINKING]:.3f} | {score[DIRECT]:.3f} |" for title, score in scores.items()]
    return "\n".join(lines)


def _written(
    model: Transformer, tokenizer: Tokenizer, template: ChatTemplate, samples: list[Sample], *, turn: int
) -> Iterator[str]:
    prompts = [demo_tasks.prompt(sample, tokenizer, template, turn=turn) for sample in samples]
    stops = [tokenizer.token_id(stop) for stop in STOPS]
    new = generate(model, prompts, max_new_tokens=96, stop=[stop for stop in stops if stop is not None])
    yield from (tokenizer.decode(tokens) for tokens in new)


def _check_rows(model: Transformer, batch: Batch) -> tuple[np.ndarray, float]:
    with jax.set_mesh(model.mesh):
        right, accepted = _check(model, batch)
    return np.asarray(right), float(accepted)


@jax.jit
def _check(model: Transformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Whether the argmax is right for each row's whole loss mask, and the share of it that MTP drafts likewise."""
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.loss_mask)
    output = forward(model, tokens, mtp=True, ops=with_implementations(model.ops, experts="block_gmm"))
    choice = jnp.argmax(output.logits, axis=-1)
    assert output.mtp_logits is not None
    draft = jnp.argmax(output.mtp_logits, axis=-1)
    right = jnp.all((choice[:, :-1] == tokens[:, 1:]) | ~mask[:, 1:], axis=-1)
    # A draft is made once the model has written a token itself: from the second token of a turn on.
    drafted = mask[:, 2:] & mask[:, 1:-1]
    agreed = (draft[:, :-1] == choice[:, 1:-1]) & drafted
    return right, jnp.sum(agreed) / jnp.maximum(jnp.sum(drafted), 1)
