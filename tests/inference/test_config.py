"""What a caller may ask of a generation, and the one line that refuses the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glm_jax import InputError, configs
from glm_jax.inference.config import Sampling, check_prompts, check_steps_per_call

TINY = configs.get("tiny-glm")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, not 0"),
        ({"max_new_tokens": 2**63}, "max_new_tokens must be an integer of at most"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: 1.5 is not an integer"),
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, not -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number of at least 0, not nan"),
        ({"temperature": math.inf}, "temperature must be a finite number of at least 0, not inf"),
        ({"temperature": True}, "temperature must be a finite number"),
        ({"temperature": "1"}, "temperature must be a finite number of at least 0, not '1'"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, not -1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, not 1.01"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, not nan"),
        ({"seed": -1}, "seed must be an integer of at least 0, not -1"),
        ({"seed": True}, "seed: True is not an integer"),
        ({"stop": ("a",)}, "stop: 'a' is not an integer"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(InputError) as caught:
        Sampling(**{"max_new_tokens": 1, **settings})
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    sampling = Sampling(max_new_tokens=np.int64(3), top_k=np.int32(2), seed=np.uint8(1), stop=(np.int64(5),))
    assert sampling == Sampling(max_new_tokens=3, top_k=2, seed=1, stop=(5,))
    assert sampling.greedy and not Sampling(max_new_tokens=1, temperature=0.1).greedy


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["abc"], "prompt 0 is str, not a list of token ids"),
        ([[1], 5], "prompt 1 is int, not a list of token ids"),
        ([[1], []], "prompt 1 is empty; a prompt has at least one token"),
        ([[1, 2.5]], "prompt 0: 2.5 is not an integer"),
        ([[1, 512]], "prompt 0: token 512 is outside the vocabulary 0..511"),
        ([[-1]], "prompt 0: token -1 is outside the vocabulary 0..511"),
        ([[1] * 1023], "prompt 0: 1023 tokens and 2 new ones exceed the model's 1024 positions"),
    ],
)
def test_prompts_that_cannot_be(prompts, words):
    with pytest.raises(InputError) as caught:
        check_prompts(prompts, TINY, 2)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_prompts_are_any_rows_of_integers():
    given = (row for row in [(1, 2), np.array([3, 4]), [511], range(510)])
    assert check_prompts(given, TINY, 2) == [[1, 2], [3, 4], [511], list(range(510))]
    assert check_prompts([[1] * 1022], TINY, 2) == [[1] * 1022]


def test_steps_of_a_call_are_no_more_than_the_tokens():
    assert [check_steps_per_call(steps, 8) for steps in (None, 1, 8, 100)] == [None, 1, 8, 8]
    with pytest.raises(InputError, match="steps_per_call must be an integer of at least 1, not 0"):
        check_steps_per_call(0, 8)
