from __future__ import annotations

import numpy as np
import pytest

from scripts import build_demo, demo_tasks

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    buckets = {demo_tasks.MAX_TOKENS: 2}
    recipe = build_demo.Recipe(steps=20, draft_steps=4, buckets=buckets, evaluate_every=100)
    build_demo.build(directory, recipe, samples=1)
    return directory


@pytest.mark.slow
def test_transformers_loads_what_is_built(built):
    import transformers

    from glm_jax.checkpoint.load import load

    tokenizer = transformers.AutoTokenizer.from_pretrained(built)
    ids = np.array([tokenizer.encode("[gMASK]<sop><|user|>\n1+2<|assistant|>")], np.int32)
    oracle = pytest.importorskip("tests.oracle")
    expected = oracle.logits(oracle.load(built), ids)
    logits = np.asarray(load(built)(ids).logits)
    assert np.abs(logits - expected).max() < 1e-3 * expected.std()


@pytest.mark.slow
def test_the_directory_is_complete(built):
    names = {path.name for path in built.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in built.iterdir()) < 8_000_000
    assert "calculator: the call" in (built / "README.md").read_text(encoding="utf-8")
