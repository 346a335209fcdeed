"""DeepSeek-R1's own tokenizer.json: ids as the reference has them, text that comes back, delimiters that stay visible.

The file is read from ../shared/data; without it these tests are skipped.
"""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_jax.errors import TextError
from glm_jax.text import ChatTemplate, JsonTokenizer, beginning_ids, family_of, load_tokenizer
from tests.text.samples import TEXTS, stream

# The ids of DeepSeek-R1's added tokens.
IDS = {
    "<｜begin▁of▁sentence｜>": 0, "<｜end▁of▁sentence｜>": 1, "<｜▁pad▁｜>": 2, "<think>": 128798, "</think>": 128799,
    "<｜fim▁hole｜>": 128800, "<｜fim▁begin｜>": 128801, "<｜fim▁end｜>": 128802, "<｜User｜>": 128803,
    "<｜Assistant｜>": 128804, "<|EOT|>": 128805, "<｜tool▁calls▁begin｜>": 128806, "<｜tool▁calls▁end｜>": 128807,
    "<｜tool▁call▁begin｜>": 128808, "<｜tool▁call▁end｜>": 128809, "<｜tool▁outputs▁begin｜>": 128810,
    "<｜tool▁outputs▁end｜>": 128811, "<｜tool▁output▁begin｜>": 128812, "<｜tool▁output▁end｜>": 128813,
    "<｜tool▁sep｜>": 128814,
}  # fmt: skip
HIDDEN = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|EOT|>")
CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "杭州"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
MORE_TEXTS = (
    "1234567890 ١٢٣٤ 3.14159 2024-05-06",
    "中文、日本語のテキスト、カタカナ。한국어 русский العربية हिन्दी ไทย",
    "🙂👍🏽👨‍👩‍👧‍👦🇨🇳 e\u0301 \u202e \ufeff\u0000",
    "#include <vector>\nint main() {\n\treturn x->y(0x1F) ? a[i++] : ~b;\n}\r\n\r\n   \t ",
    "<｜User｜>hi<｜Assistant｜><think>\nhm\n</think>\n\n" + CALL + "<｜end▁of▁sentence｜>",
    "<｜User｜ >", " <think> <think>", "<｜end▁of▁sentence｜>" * 3,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(deepseek) -> JsonTokenizer:
    loaded = load_tokenizer(deepseek)
    assert isinstance(loaded, JsonTokenizer)
    return loaded


@pytest.fixture(scope="module")
def library(deepseek) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(deepseek / "tokenizer.json"))


@pytest.fixture(scope="module")
def transformers_tokenizer(deepseek):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(deepseek / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS + MORE_TEXTS)
def test_ids_and_text_equal_those_of_transformers(tokenizer, transformers_tokenizer, text):
    ids = transformers_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text) == ids
    for skip in (False, True):
        expected = transformers_tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special=skip) == expected
        assert "".join(stream(tokenizer, ids, skip_special=skip)) == expected


@pytest.mark.parametrize("text", TEXTS + MORE_TEXTS)
def test_nothing_is_lost(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("ab 1\n你🙂é<｜>", max_size=40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back_with_the_librarys_ids(tokenizer, library, text):
    ids = tokenizer.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "".join(stream(tokenizer, ids)) == text


def test_the_added_tokens(tokenizer):
    assert {token: tokenizer.token_id(token) for token in IDS} == IDS
    assert all(tokenizer.encode(f"a{token}b").count(i) == 1 for token, i in IDS.items())
    assert tokenizer.vocab_size == 128815
    assert tokenizer.decode([128815, 129279]) == ""  # the embedding is padded to 129280


def test_delimiters_are_kept_and_ends_are_hidden(tokenizer):
    """A chat hides the special tokens; the delimiters of thoughts and calls must reach the parser."""
    hidden = {tokenizer.token_id(token) for token in HIDDEN}
    places = {tokenizer.token_id(f"<｜place▁holder▁no▁{n}｜>") for n in range(798)}
    assert tokenizer.special_ids == hidden | places and len(places) == 798
    text = "<think>hm</think>Yes." + CALL
    ids = tokenizer.encode("".join(HIDDEN) + text + "<｜place▁holder▁no▁7｜><｜end▁of▁sentence｜>")
    assert tokenizer.decode(ids, skip_special=True) == text
    assert "".join(stream(tokenizer, ids, skip_special=True)) == text


def test_a_tokenizer_adds_no_beginning_of_its_own(tokenizer):
    assert tokenizer.encode("hi") == tokenizer.encode("<｜begin▁of▁sentence｜>hi")[1:]
    assert tokenizer.encode("<｜begin▁of▁sentence｜>hi")[0] == 0
    assert tokenizer.encode("") == []


def test_where_the_beginning_comes_from(deepseek, tokenizer, tmp_path):
    """A chat template writes it; plain text gets it where the configuration says so; never twice, never by encode."""
    config = {"add_bos_token": True, "bos_token": {"content": "<｜begin▁of▁sentence｜>"}}
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert beginning_ids(tmp_path, tokenizer) == [0]
    template = ChatTemplate.load(tmp_path, family_of(tmp_path, tokenizer))
    prompt = tokenizer.encode(template.render([{"role": "user", "content": "hi"}]))
    assert prompt == [0, 128803, *tokenizer.encode("hi"), 128804]
    for without in (config | {"add_bos_token": False}, {"add_bos_token": True}, {}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(without))
        assert beginning_ids(tmp_path, tokenizer) == []
    assert beginning_ids(deepseek, tokenizer) == []
    for token in ("<no such token>", 3):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": token}))
        with pytest.raises(TextError, match="must be a token of the tokenizer"):
            beginning_ids(tmp_path, tokenizer)


def test_a_long_text_comes_back(tokenizer):
    text = "A line of text, 数字 123.\n" * 20_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
