"""What everything public looks like at a prompt: at most 20 lines, and a table of models and configs in a notebook."""

from __future__ import annotations

import dataclasses
import html.parser
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_jax
from glm_jax import inference, kernels, model, serving, text
from glm_jax.checkpoint import open_source
from glm_jax.evaluation import trace
from glm_jax.sharding import QuantizedArray, describe
from glm_jax.training import OptimizerConfig, build_optimizer, create_state, pad_rows
from tests.conventions.tree import ROOT

DEMO = ROOT / "examples" / "demo_model"
LARGE = ("glm-4.5", "deepseek-v3", "kimi-k2")


@pytest.fixture(scope="module")
def chat():
    return glm_jax.Chat(DEMO, dtype="float32")


@pytest.fixture(scope="module")
def shown(chat):
    """Every public value that a user gets hold of, by its name."""
    loaded, tokens = chat.model, np.zeros((2, 16), np.int32)
    sampling = inference.Sampling(max_new_tokens=2)
    cache = model.create_cache(loaded, batch=2, length=64, mtp=True)
    return {
        "model": loaded,
        "stacked": glm_jax.load(DEMO, dtype="float32", stacked=True),
        "abstract": glm_jax.Transformer(glm_jax.configs.get("deepseek-v3")),
        "config": loaded.config,
        "mesh": loaded.mesh,
        "rules": loaded.rules,
        "ops": loaded.ops,
        "load": kernels.Load(1, 2, 8, 8),
        "chat": chat,
        "text": chat.text,
        "events": text.ToolCall("f", {"a": 1}),
        "output": loaded(tokens, mtp=True),
        "cache": cache,
        "sampling": sampling,
        "stream": inference.stream(loaded, [[5]], sampling),
        "reply": chat("hello", max_new_tokens=4),
        "generation": serving.Generation(loaded, [5], sampling),
        "finished": serving.Finished("stop", serving.Usage(1, 2, 0.1, 0.2)),
        "source": open_source(DEMO),
        "trace": trace(loaded, tokens),
        "batch": pad_rows([(tokens[0], tokens[0] > 0)], 16),
        "state": create_state(loaded, build_optimizer(loaded, OptimizerConfig(steps=10, warmup_steps=1))),
        "counts": glm_jax.count_parameters(loaded.config),
        "quantized": QuantizedArray(jnp.zeros((64, 64), jnp.int8), jnp.zeros(64)),
    }


def test_at_most_20_lines_none_of_which_is_an_address(shown):
    for name, value in shown.items():
        lines = repr(value).splitlines()
        assert 1 <= len(lines) <= 20, (name, len(lines))
        assert max(map(len, lines)) <= 1000, name
        assert " at 0x" not in repr(value) and not re.search(r"\b[Aa]rray\(", repr(value)), (name, repr(value))


def test_arrays_are_shown_by_dtype_and_shape(shown):
    assert repr(shown["output"]).startswith("Output(logits=float32[2, 16, 512], hidden=float32[2, 16, 128], ")
    assert repr(shown["quantized"]) == "QuantizedArray(values=int8[64, 64], scale=float32[64], contracting_dims=1)"
    assert "KvCache(k=float32[2, 2, 64, 32], v=float32[2, 2, 64, 32])" in repr(shown["cache"])


def test_a_model_says_what_it_is_and_where(shown):
    said = dict(line.split(maxsplit=1) for line in repr(shown["model"]).splitlines()[1:])
    config = shown["model"].config
    assert said["layers"] == "1 dense, 3 of experts, 1 MTP"
    assert said["vocabulary"] == f"{config.vocab_size}"
    assert said["weights"].endswith(f"on mesh {describe(shown['model'].mesh)}")
    total = sum(leaf.size for leaf in jax.tree.leaves(shown["model"]))
    assert said["parameters"] == f"{total:,}"
    assert "without values" in repr(shown["abstract"]) and "671," not in repr(shown["abstract"]).splitlines()[0]


def test_a_model_is_shown_while_it_is_traced(shown):
    seen = []
    jax.jit(lambda traced: seen.append(repr(traced)) or 0)(shown["model"])
    assert 1 <= len(seen[0].splitlines()) <= 20


class _Cells(html.parser.HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("name", LARGE)
def test_a_config_is_a_table_with_every_field(name):
    config = glm_jax.configs.get(name)
    assert repr(config).count("\n") < 20
    cells = _Cells(config._repr_html_()).texts
    values = dict(zip(cells[1::2], cells[2::2], strict=True))
    for field in dataclasses.fields(config.attention):
        value = getattr(config.attention, field.name)
        if isinstance(value, int) and not isinstance(value, bool):
            assert values[f"attention.{field.name}"] == f"{value:,}"
    assert values["moe.num_experts"] == f"{config.moe.num_experts:,}"


def test_a_model_is_a_table_of_what_its_repr_says(shown):
    cells = _Cells(shown["model"]._repr_html_()).texts
    rows = [line.split(maxsplit=1) for line in repr(shown["model"]).splitlines()[1:]]
    assert cells[1:] == [cell for row in rows for cell in row]
