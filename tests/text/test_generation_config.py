"""The generation defaults of a checkpoint directory."""

from __future__ import annotations

import json

import pytest

from glm_jax.errors import TextError
from glm_jax.text import GenerationDefaults


def written(directory, generation=None, config=None) -> GenerationDefaults:
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (directory / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return GenerationDefaults.load(directory)


def test_the_demo_stops_like_glm(demo):
    assert GenerationDefaults.load(demo) == GenerationDefaults((476, 483, 485))


def test_values(tmp_path):
    values = {"eos_token_id": [3, 1, 3], "temperature": 1, "top_p": 0.95, "top_k": 40, "do_sample": True}
    assert written(tmp_path, values) == GenerationDefaults((3, 1), 1.0, 0.95, 40)


@pytest.mark.parametrize(
    ("generation", "config", "stop_ids"),
    [
        (None, None, ()),
        ({}, {}, ()),
        ({"eos_token_id": 0}, {"eos_token_id": 5}, (0, 5)),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": [5, 6]}, (7, 5, 6)),
        (None, {"eos_token_id": 5}, (5,)),
        ({"temperature": None}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
    ],
)
def test_where_the_stop_ids_come_from(tmp_path, generation, config, stop_ids):
    assert written(tmp_path, generation, config) == GenerationDefaults(stop_ids)


@pytest.mark.parametrize(
    ("generation", "fault"),
    [
        ("", "is empty"),
        ('{"eos_token_id": [1', "is not JSON"),
        ("[]", "holds a JSON list"),
        ({"eos_token_id": "1"}, "eos_token_id is '1'"),
        ({"eos_token_id": [1, -2]}, "eos_token_id"),
        ({"eos_token_id": [True]}, "eos_token_id"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": -1}, "temperature is -1.0; it must be 0 or more"),
        ('{"temperature": NaN}', "temperature is nan"),
        ({"top_p": 0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be an integer"),
        ({"top_k": True}, "top_k"),
    ],
)
def test_broken_files(tmp_path, generation, fault):
    with pytest.raises(TextError, match=fault) as caught:
        written(tmp_path, generation)
    assert "generation_config.json: " in str(caught.value)


def test_a_broken_config(tmp_path):
    with pytest.raises(TextError, match=r"[/\\]config.json: eos_token_id"):
        written(tmp_path, None, {"eos_token_id": {}})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"repetition_penalty": 1.05, "min_p": 0.1}, ["repetition_penalty 1.05", "min_p 0.1"]),
        ({"stop_strings": ["\nUser:"]}, ['stop_strings ["\\nUser:"]']),
        ({"do_sample": False, "temperature": 0.6}, ["do_sample false (temperature 0 is greedy)"]),
        ({"no_repeat_ngram_size": 3, "num_beams": 4}, ["no_repeat_ngram_size 3", "num_beams 4"]),
        ({"do_sample": False}, []),
        ({"repetition_penalty": 1.0, "min_p": None, "stop_strings": None, "num_beams": 1, "top_k": 0}, []),
        ({"max_length": 131072, "transformers_version": "4.55", "pad_token_id": 3, "_from_model_config": True}, []),
    ],
)
def test_settings_that_are_not_honoured_are_named(tmp_path, values, named):
    notes = written(tmp_path, values).notes
    assert len(notes) == bool(named)
    assert all(name in notes[0] for name in named)


def test_the_values_that_transformers_fills_in_change_nothing(tmp_path):
    transformers = pytest.importorskip("transformers")
    for filled in (transformers.GenerationConfig(), transformers.GenerationConfig(do_sample=True, temperature=0.6)):
        assert written(tmp_path, filled.to_json_string(use_diff=False)).notes == ()
