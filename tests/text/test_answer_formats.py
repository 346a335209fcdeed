"""Answers in the formats of DeepSeek and Kimi K2: what is found, and that it is found however the text is cut."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.text import ChatTemplate, ContentDelta, MalformedToolCall, ReasoningDelta, StreamParser, ToolCall
from glm_jax.text.answer_format import DEEPSEEK_V3, DEEPSEEK_V31, GLM, KIMI_K2, AnswerFormat
from tests.text.checkpoints import SEARCH, THINK, write_deepseek, write_kimi
from tests.text.test_stream_parser import joined

R, C, T, B = ReasoningDelta, ContentDelta, ToolCall, MalformedToolCall
FORMATS = {"v3": DEEPSEEK_V3, "v3.1": DEEPSEEK_V31, "kimi": KIMI_K2}


def parse(*deltas: str, answer_format: AnswerFormat, **options: Any) -> list[Any]:
    parser = StreamParser(answer_format=answer_format, **options)
    events = [event for delta in deltas for event in parser.push(delta)]
    return joined(events + parser.finish())


def written(name: str, call: str, arguments: str, number: int = 0) -> str:
    """A call as the format has it."""
    return {
        "v3": f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call}\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
        "v3.1": f"<｜tool▁call▁begin｜>{call}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        "kimi": f"<|tool_call_begin|>functions.{call}:{number}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
    }[name]


def found(name: str, call: str, arguments: dict[str, Any], number: int = 0) -> ToolCall:
    return ToolCall(call, arguments, f"functions.{call}:{number}" if name == "kimi" else None)


def section(name: str, *calls: str) -> str:
    begin, end = FORMATS[name].calls.section or ("", "")
    return begin + ("\n" if name == "v3" else "").join(calls) + end


def cases(name: str) -> list[tuple[str, dict[str, Any], list[Any]]]:
    """(text, options, events)."""
    form = FORMATS[name]
    begin, end = form.calls.section or ("", "")
    close = "<|tool_call_end|>" if name == "kimi" else "<｜tool▁call▁end｜>"
    f, g = written(name, "f", '{"a": 1}'), written(name, "g.h-2", "{}", 1)
    is_f, is_g = found(name, "f", {"a": 1}), found(name, "g.h-2", {}, 1)
    speaks = {"a": f'}}"\\{close}{end}{form.calls.begin}</think>', "b": ["\\", '"', "\\\\"]}
    speaks_json = '{"a": "}\\"\\\\' + close + end + form.calls.begin + '</think>", "b": ["\\\\", "\\"", "\\\\\\\\"]}'
    broken = {
        "not JSON": written(name, "f", "{a: 1}"),
        "no object": written(name, "f", "[1]"),
        "a half of a pair": written(name, "f", '{"a": "\\ud83d"}'),
        "infinite": written(name, "f", '{"a": 1e999}'),
        "not a number": written(name, "f", '{"a": NaN}'),
        **({} if name == "v3.1" else {"no name": written(name, "", "{}")}),
        **({"a name in two": written(name, "f g", "{}")} if name == "v3" else {}),
        "no separator": form.calls.begin + "f" + close,
        "nothing": form.calls.begin + close,
    }
    return [
        ("", {}, []),
        ("hello\n", {}, [C("hello")]),
        ("<think>\nr\n</think>\n\na", {}, [R("r"), C("a")]),
        ("r</think>a", {"in_thinking": True}, [R("r"), C("a")]),
        (section(name, f, g), {}, [is_f, is_g]),
        ("Look." + section(name, f), {}, [C("Look."), is_f]),
        ("<think>r</think>" + section(name, f) + "\nthen", {}, [R("r"), is_f, C("then")]),
        ("<think>r" + section(name, f) + "</think>then", {}, [R("r"), is_f, C("then")]),
        (section(name, f) + section(name, g), {}, [is_f, is_g]),
        (begin + "\n" + f + "\n \n" + g + "\n" + end, {}, [is_f, is_g]),
        (f, {}, [is_f]),  # without the delimiters around all calls
        (section(name, written(name, "f", "")), {}, [found(name, "f", {})]),
        (section(name, written(name, "f", ' \n{"a":\n\t"x\ny"}\n ')), {}, [found(name, "f", {"a": "x\ny"})]),
        (section(name, written(name, "f", speaks_json), g), {}, [found(name, "f", speaks), is_g]),
        (section(name, written(name, "f", '{"名": "北京 🙂"}')), {}, [found(name, "f", {"名": "北京 🙂"})]),
        # other text between the calls is answer; text before the first makes the section's delimiter a mention
        (begin + f + " two " + g + " three " + end, {}, [is_f, C(" two"), is_g, C("  three")]),
        (begin + " one " + f + " two " + end + end, {}, [C(begin + " one"), is_f, C("  two " + end)]),
        # cut off: what is complete counts, the rest is text
        (begin + f, {}, [is_f]),
        (begin, {}, [B(begin)]),
        ("a" + begin[:-1], {}, [C("a" + begin[:-1])]),
        (begin + f + g[:-1], {}, [is_f, B(g[:-1])]),
        (begin + f + end[:-1], {}, [is_f, C(end[:-1])]),
        # malformed: never a call
        *((section(name, bad), {}, [B(bad)]) for bad in broken.values()),
        (section(name, broken["not JSON"], g), {}, [B(broken["not JSON"]), is_g]),
        (begin + end + "x", {}, [B(begin + end), C("x")]),
        (begin + '{"name": "f"}' + end, {}, [C(begin + '{"name": "f"}' + end)]),
        # without tools the delimiters are text
        ("<think>r " + begin + "</think>" + f, {"parse_tools": False}, [R("r " + begin), C(f)]),
    ]  # fmt: skip


CASES = [pytest.param(name, *case, id=f"{name}-{i}") for name in FORMATS for i, case in enumerate(cases(name))]


@pytest.mark.parametrize(("name", "text", "options", "expected"), CASES)
def test_what_is_found_at_every_split(name, text, options, expected):
    form = FORMATS[name]
    assert parse(text, answer_format=form, **options) == expected
    assert parse(*text, answer_format=form, **options) == expected
    for cut in range(1, len(text)):
        assert parse(text[:cut], text[cut:], answer_format=form, **options) == expected


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_however_the_text_is_cut(name, data):
    form = FORMATS[name]
    delimiters = [delimiter for delimiter in form.delimiters if len(delimiter) > 2]
    more = ['"', "\\", '\\"', "\n", " ", "x", "<", "<｜", "<|", "名", "{", "}", written(name, "f", '{"a": "b"}')]
    text = "".join(data.draw(st.lists(st.sampled_from([*delimiters, *more]), max_size=16)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    deltas = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    options = {"in_thinking": data.draw(st.booleans()), "parse_tools": data.draw(st.booleans())}
    assert parse(*deltas, answer_format=form, **options) == parse(text, answer_format=form, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_without_thought_delimiters_may_write_them(name):
    form = FORMATS[name].without_thoughts()
    call = written(name, "f", "{}")
    assert parse("<think>a</think>b" + call, answer_format=form) == [C("<think>a</think>b"), found(name, "f", {})]


def test_kimi_reads_the_name_off_the_id():
    def one(call_id: str) -> list[Any]:
        text = f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        return parse(text, answer_format=KIMI_K2)

    assert one(" functions.get_weather:12 ") == [T("get_weather", {}, "functions.get_weather:12")]
    assert one("get_weather:0") == [T("get_weather", {}, "get_weather:0")]
    assert one("functions.a.b:0") == [T("a.b", {}, "functions.a.b:0")]
    for wrong in ("functions.f", "f", "functions.f:x", "functions.:0", "functions:0", "0", ":0"):
        assert [type(event) for event in one(wrong)] == [MalformedToolCall]
    for prose in ("functions.f :0", "functions.f:0 x"):
        assert [type(event) for event in one(prose)] == [ContentDelta]


def test_deepseek_v3_reads_the_fence():
    def one(inside: str) -> list[Any]:
        return parse(f"<｜tool▁call▁begin｜>{inside}<｜tool▁call▁end｜>", answer_format=DEEPSEEK_V3)

    assert one("function<｜tool▁sep｜>f\n```json\n{}\n```") == [T("f", {})]
    assert one('function<｜tool▁sep｜>f ```{"a": "```"}``` \n') == [T("f", {"a": "```"})]
    for wrong in (
        "function<｜tool▁sep｜>f\n{}",
        "function<｜tool▁sep｜>f\n```json\n{}",
        "code<｜tool▁sep｜>f\n```json\n{}\n```",
    ):
        assert [type(event) for event in one(wrong)] == [MalformedToolCall]


def test_nesting_without_end_is_no_call():
    deep = written("kimi", "f", '{"a": ' + "[" * 100_000 + "}")
    assert parse(deep, answer_format=KIMI_K2) == [B(deep)]


@pytest.mark.parametrize("name", FORMATS)
def test_text_streams_at_once_and_only_what_may_be_a_delimiter_waits(name):
    parser = StreamParser(answer_format=FORMATS[name])
    begin = FORMATS[name].calls.begin
    assert parser.push("Hel") == [C("Hel")]
    assert parser.push("lo" + begin[:5]) == [C("lo")]
    assert parser.push("x") == [C(begin[:5] + "x")]
    assert parser.push(written(name, "f", "{}")) == [found(name, "f", {})]
    assert parser.finish() == []


@pytest.mark.parametrize("form", [GLM, *FORMATS.values()])
def test_a_long_value_is_read_in_linear_time(form):
    name = next((name for name, known in FORMATS.items() if known is form), None)
    value = 'ab\\"<c \\\\ ' * 20_000
    if name is None:
        text = f"<tool_call>f<arg_key>a</arg_key><arg_value>{value}</arg_value></tool_call>"
    else:
        text = written(name, "f", f'{{"a": "{value}"}}')
    for deltas in ([text], [text[at : at + 7] for at in range(0, len(text), 7)]):
        started = time.process_time()
        (event,) = parse(*deltas, answer_format=form)
        assert isinstance(event, ToolCall) and len(event.arguments["a"]) >= 140_000
        assert time.process_time() - started < 10  # a second or so; quadratic would be hours


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
names = st.from_regex(r"[a-z_][a-z0-9_.-]{0,8}", fullmatch=True)


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> dict[str, ChatTemplate]:
    made = tmp_path_factory.mktemp("checkpoints")
    return {
        "v3": ChatTemplate.load(write_deepseek(made / "r1", *THINK)),
        "v3.1": ChatTemplate.load(write_deepseek(made / "v31", *THINK, *SEARCH)),
        "kimi": ChatTemplate.load(write_kimi(made / "kimi", thinks=True)),
    }


@pytest.mark.parametrize("name", FORMATS)
@given(content=texts, calls=st.lists(st.tuples(names, st.dictionaries(texts, values, max_size=3)), max_size=3))
@settings(max_examples=60, deadline=None)
def test_it_reads_back_what_the_template_writes(templates, name, content, calls):
    user = {"role": "user", "content": "q"}
    turn = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": called, "arguments": arguments}} for called, arguments in calls],
    }
    prompt = templates[name].render([user])
    whole = templates[name].render([user, turn], add_generation_prompt=False)
    assert whole.startswith(prompt)
    end = "<|im_end|>" if name == "kimi" else "<｜end▁of▁sentence｜>"
    answer = whole.removeprefix(prompt).removesuffix(end)
    expected = [C(content.lstrip("\r\n").rstrip())] if content.strip() else []
    expected += [found(name, called, arguments, number) for number, (called, arguments) in enumerate(calls)]
    assert parse(*answer, answer_format=FORMATS[name]) == expected
