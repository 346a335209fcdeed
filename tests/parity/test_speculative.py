"""Speculation against that of transformers with the same MTP layer, generate(use_mtp=True), and its plain generate."""

from __future__ import annotations

import pytest

import glm_jax
from glm_jax.serving import TextProcessor
from tests import oracle
from tests.inference import checkpoints
from tests.inference.checkpoints import FAMILIES

NEW = 48


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])]
)
def test_random_checkpoints(tmp_path, one_device, family):
    """Of both kinds: drafts that are nearly always wrong, and drafts that are often right."""
    for seed, directory in enumerate(
        (
            oracle.save(tmp_path / "saved", model_type=family, num_hidden_layers=2, vocab_size=32, seed=1),
            checkpoints.write(tmp_path / "agreeing", model_type=family),
        )
    ):
        theirs, ours = oracle.load(directory), glm_jax.load(directory, mesh=one_device, stacked=True)
        prompts = checkpoints.prompts((3 + seed, 1, 17))
        expected = oracle.greedy(theirs, prompts, NEW)
        assert [oracle.greedy_with_mtp(theirs, prompt, NEW) for prompt in prompts] == expected
        assert glm_jax.generate(ours, prompts, max_new_tokens=NEW, speculative=1 + seed) == expected


def test_the_demo_checkpoint(one_device):
    text, ours = TextProcessor.load(checkpoints.DEMO), checkpoints.load_demo(one_device)
    theirs = oracle.load(checkpoints.DEMO)
    questions = ("What is 3+4-7+1-1+7+1+9?", "A ball is under cup 2 of 5. Swap 3-5 5-1 3-2. Where is it?", "hello")
    for question in questions:
        prompt = text.tokenizer.encode(text.template.render([{"role": "user", "content": question}]))
        expected = oracle.greedy_with_mtp(theirs, prompt, NEW)
        assert glm_jax.generate(ours, [prompt], max_new_tokens=NEW, speculative=1) == [expected]
