"""What a checkpoint leaves unsaid: the template, the answer's format and the stop tokens, by what can be seen."""

from __future__ import annotations

import json
import shutil

import pytest

from glm_jax.errors import TextError
from glm_jax.text import ChatTemplate, GenerationDefaults, family_of, load_tokenizer
from glm_jax.text.answer_format import DEEPSEEK_V3, DEEPSEEK_V31, GLM, KIMI_K2
from tests.text.checkpoints import SEARCH, THINK, write_deepseek, write_kimi

USER = [{"role": "user", "content": "hi"}]


def test_the_family_is_told_by_model_type_and_tokens(tmp_path, demo):
    kimi = write_kimi(tmp_path / "kimi")
    thinking = write_kimi(tmp_path / "thinking", thinks=True)
    labelled = write_kimi(tmp_path / "labelled", model_type="deepseek_v3")
    v3 = write_deepseek(tmp_path / "v3")
    r1 = write_deepseek(tmp_path / "r1", *THINK)
    v31 = write_deepseek(tmp_path / "v31", *THINK, *SEARCH)
    expected = {
        kimi: (KIMI_K2.without_thoughts(), "kimi_k2.jinja", {"has_thoughts": False}),
        thinking: (KIMI_K2, "kimi_k2.jinja", {"has_thoughts": True}),
        labelled: (KIMI_K2.without_thoughts(), "kimi_k2.jinja", {"has_thoughts": False}),
        v3: (DEEPSEEK_V3.without_thoughts(), "deepseek_v3.jinja", {}),
        r1: (DEEPSEEK_V3, "deepseek_v3.jinja", {}),
        v31: (DEEPSEEK_V31, "deepseek_v31.jinja", {}),
    }
    for directory, (answer_format, template, variables) in expected.items():
        for tokenizer in (None, load_tokenizer(directory)):
            family = family_of(directory, tokenizer)
            assert (family.answer_format, family.template.name) == (answer_format, template)
            assert family.template_variables == variables
    other = write_kimi(tmp_path / "other", model_type="glm4_moe")
    foreign = shutil.copytree(demo, tmp_path / "foreign")
    (foreign / "config.json").write_text('{"model_type": "deepseek_v3"}')
    for directory in (demo, other, foreign, tmp_path, tmp_path / "absent"):
        assert (family_of(directory).answer_format, family_of(directory).template) == (GLM, None)


@pytest.mark.parametrize("text", [{"model_type": "kimi_k2"}, {"model_type": "deepseek_v3"}, None])
def test_the_language_model_of_a_multimodal_checkpoint_speaks_as_it_does_alone(tmp_path, text):
    alone = write_kimi(tmp_path / "alone", thinks=True)
    kimi = write_kimi(tmp_path / "kimi", thinks=True)
    config = {"model_type": "kimi_k25", "vision_config": {}}
    config |= {} if text is None else {"text_config": {**text, "eos_token_id": 7}}
    (kimi / "config.json").write_text(json.dumps(config))
    assert family_of(kimi) == family_of(alone)
    stop_ids = GenerationDefaults.load(alone).stop_ids
    assert GenerationDefaults.load(kimi).stop_ids == (stop_ids if text is None else (7, *stop_ids))


def test_the_real_tokenizer_is_that_of_r1(deepseek, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    family = family_of(tmp_path, load_tokenizer(deepseek))
    assert (family.answer_format, family.template.name) == (DEEPSEEK_V3, "deepseek_v3.jinja")


def test_a_checkpoints_own_template_wins(tmp_path):
    kimi = write_kimi(tmp_path / "kimi")
    assert "<|im_middle|>" in ChatTemplate.load(kimi).render(USER)
    config = json.loads((kimi / "tokenizer_config.json").read_text())
    (kimi / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "config's"}))
    assert ChatTemplate.load(kimi).render(USER) == "config's"
    (kimi / "chat_template.jinja").write_text("file's")
    assert ChatTemplate.load(kimi).render(USER) == "file's"


def test_a_type_without_a_template_of_its_own_still_asks_for_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "glm4_moe"}')
    with pytest.raises(TextError, match="has no chat template"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("thinks", [False, True])
def test_kimi_stops_at_the_end_of_text_and_of_a_turn(tmp_path, thinks):
    kimi = write_kimi(tmp_path / "kimi", thinks=thinks)
    assert GenerationDefaults.load(kimi).stop_ids == (257, 258)
    (kimi / "config.json").write_text(json.dumps({"model_type": "kimi_k2", "eos_token_id": 257}))
    (kimi / "generation_config.json").write_text(json.dumps({"eos_token_id": 258}))
    assert GenerationDefaults.load(kimi).stop_ids == (258, 257)
    assert GenerationDefaults.load(kimi, load_tokenizer(kimi)).stop_ids == (258, 257)
    (kimi / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 7]}))
    assert GenerationDefaults.load(kimi).stop_ids == (258, 7, 257)


def test_kimi_with_the_published_number_of_ranks_stops_at_the_published_ids(tmp_path):
    tokens = [*(bytes([byte]) for byte in range(256)), *(i.to_bytes(3, "big") for i in range(163_584 - 256))]
    kimi = write_kimi(tmp_path / "kimi", tokens=tokens)
    assert GenerationDefaults.load(kimi).stop_ids == (163585, 163586)
    assert load_tokenizer(kimi).vocab_size == 163840


def test_deepseek_stops_at_the_end_of_sentence(tmp_path):
    deepseek = write_deepseek(tmp_path / "v3", *THINK)
    end = load_tokenizer(deepseek).token_id("<｜end▁of▁sentence｜>")
    (deepseek / "config.json").write_text('{"model_type": "deepseek_v3"}')
    assert GenerationDefaults.load(deepseek).stop_ids == (end,)


def test_without_a_tokenizer_the_files_alone_say_where_to_stop(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "kimi_k2", "eos_token_id": 163585}')
    assert GenerationDefaults.load(tmp_path).stop_ids == (163585,)
    (tmp_path / "tiktoken.model").write_text("broken")
    with pytest.raises(TextError, match=r"tiktoken.model, line 1"):
        GenerationDefaults.load(tmp_path)
