"""Calls that are nearly of the model's form: mended where it is clear what was meant, never a call with less in it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.text import ContentDelta, MalformedToolCall, ReasoningDelta, StreamParser, ToolCall
from glm_jax.text.answer_format import DEEPSEEK_V3, DEEPSEEK_V31, GLM, KIMI_K2, AnswerFormat
from tests.text.test_answer_formats import parse, written
from tests.text.test_stream_parser import tool

R, C, T, B = ReasoningDelta, ContentDelta, ToolCall, MalformedToolCall
TEXT = {"type": "string"}
TOOLS = [
    tool("list_dir", path=TEXT),
    tool("write", path=TEXT, text=TEXT, mode={"type": "integer"}),
    tool("send_command_to_shell", command=TEXT, shell=TEXT),
    tool("get_time"),
]
DIRECTORY = T("list_dir", {"path": "/tmp/x"})


def every_way(text: str, answer_format: AnswerFormat = GLM, **options: Any) -> list[Any]:
    """The events, the same for the whole text, for each cut into two, and for single characters."""
    expected = parse(text, answer_format=answer_format, **options)
    assert parse(*text, answer_format=answer_format, **options) == expected
    for cut in range(1, len(text)):
        assert parse(text[:cut], text[cut:], answer_format=answer_format, **options) == expected
    return expected


# -- GLM: tags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside",
    [
        "<arg_key>path</arg_key></arg_key><arg_value>/tmp/x</arg_value>",
        "<arg_key><arg_key>path</arg_key><arg_value>/tmp/x</arg_value>",
        "\n<arg_key>\n<arg_key>path</arg_key>\n</arg_key>\n<arg_value>/tmp/x</arg_value>\n",
        "</arg_key><arg_key>path</arg_key><arg_value>/tmp/x</arg_value>",
        "<arg_key>path</arg_key><arg_key><arg_value>/tmp/x</arg_value>",
        "<arg_key>path</arg_key><arg_value>/tmp/x</arg_value></arg_key>",
        "<arg_key>path<arg_value>/tmp/x</arg_value>",
        "<arg_key>path</arg_key><arg_value><arg_value>/tmp/x</arg_value>",
        "<arg_key>path</arg_key>/tmp/x</arg_value>",
        "<arg_key>path</arg_key>\n/tmp/x\n</arg_value>",
        "path</arg_key><arg_value>/tmp/x</arg_value>",
        "\npath</arg_key>\n<arg_value>/tmp/x</arg_value>\n",
        "path<arg_value>/tmp/x</arg_value>",
    ],
)
def test_tags_that_are_stray_doubled_or_missing(inside):
    assert every_way(f"<tool_call>list_dir{inside}</tool_call>", tools=TOOLS) == [DIRECTORY]


@pytest.mark.parametrize(
    "inside",
    [
        "list_dir<arg_key>path</arg_key>",  # a key alone
        "list_dir<arg_key>path</arg_key></arg_key>",
        "list_dir<arg_key>path</arg_key></arg_value>",
        "list_dir</arg_key>",
        "list_dir<arg_value>/tmp/x</arg_value>",  # of which parameter?
        "list_dir<arg_key></arg_key><arg_value>/tmp/x</arg_value>",
        "list_dir<arg_key>path</arg_key><arg_value>a</arg_value><arg_key>pa<th</arg_key><arg_value>b</arg_value>",
        "list_dir<arg_key>path</arg_key> and <arg_value>/tmp/x</arg_value>",
        "list_dir<arg_key>a</arg_key><arg_key>b</arg_key><arg_value>/tmp/x</arg_value>",
        "list_dirpaths</arg_key><arg_value>/tmp/x</arg_value>",  # no declared parameter
        "list_dir\n<arg_key>path</arg_key>\n<arg_value>/tmp/x</tool_call>",
    ],
)
def test_what_is_not_clear_is_no_call(inside):
    text = f"<tool_call>{inside}</tool_call>"
    assert every_way(text, tools=TOOLS) == [B(text)]


def test_a_call_without_its_last_value_ends_where_it_is_closed():
    inside = "<arg_key>path</arg_key><arg_value>a</arg_value></arg_key><arg_key>mode</arg_key>"
    call = f"<tool_call>list_dir{inside}</tool_call>"
    assert every_way(call + "ok", tools=TOOLS) == [B(call), C("ok")]


def test_a_key_that_is_there_twice():
    def inside(second: str) -> str:
        value = "<arg_key>path</arg_key><arg_value>{}</arg_value>"
        return f"<tool_call>list_dir{value.format('/tmp/x')}{value.format(second)}</tool_call>"

    assert every_way(inside("/tmp/x"), tools=TOOLS) == [DIRECTORY]
    assert every_way(inside("/tmp/y"), tools=TOOLS) == [B(inside("/tmp/y"))]


@pytest.mark.parametrize("space", ["\n" + " " * 12, "\n" * 9, "\r\n\t\t" * 30])
def test_white_space_between_tags(space):
    parts = ("<tool_call>", "list_dir", "<arg_key>path</arg_key>", "<arg_value>/tmp/x</arg_value>", "</tool_call>")
    assert every_way(space.join(parts) + "ok", tools=TOOLS) == [DIRECTORY, C("ok")]
    assert every_way(f"<tool_call>get_time{space}</tool_call>") == [T("get_time", {})]


def test_names_and_keys_that_are_long():
    name, key = "n" * 80, "k" * 80
    tools = [tool(name, **{key: TEXT})]
    call = f"<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    assert every_way(call, tools=tools) == [T(name, {key: "1"})]
    assert every_way(call) == [C(call)]


def test_a_key_that_is_glued_to_the_name_needs_the_declared_tools():
    text = "<tool_call>send_command_to_shellcommand</arg_key><arg_value>echo test</arg_value></tool_call>"
    assert every_way(text, tools=TOOLS) == [T("send_command_to_shell", {"command": "echo test"})]
    assert every_way(text) == [B(text)]
    ambiguous = [tool("ab", c=TEXT), tool("a", bc=TEXT)]
    assert every_way(
        "<tool_call>abc</arg_key><arg_value>x</arg_value></tool_call>", tools=ambiguous
    ) == [B("<tool_call>abc</arg_key><arg_value>x</arg_value></tool_call>")]  # fmt: skip


def test_a_missing_opening_tag_of_a_value():
    text = "<tool_call>search<arg_key>query</arg_key>how many vacation days left</arg_value></tool_call>"
    assert every_way(text) == [T("search", {"query": "how many vacation days left"})]


def test_a_missing_opening_tag_of_a_later_key():
    inside = "<arg_key>path</arg_key><arg_value>a</arg_value>\ntext</arg_key><arg_value>b</arg_value>"
    text = f"<tool_call>write{inside}</tool_call>"
    assert every_way(text, tools=TOOLS) == [T("write", {"path": "a", "text": "b"})]


VALUES = [
    "close with </arg_value> tag",
    "</arg_value>",
    "</arg_value></arg_value>",
    "a</arg_value>\n\nb </arg_value>c",
    "<arg_value>x</arg_value>",
    "</tool_call></arg_value><arg_keys>",
    "<arg_key>k</arg_key>\n<arg_value>v</arg_value> and so on",
    "</arg_value><tool_call>not a call</arg_value>",
    "<tool_call>f\n</tool_call>",
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("break_", ["", "\n"])
def test_a_value_may_contain_its_own_closing_tag(value, break_):
    def pair(key: str, value: str) -> str:
        return f"<arg_key>{key}</arg_key>{break_}<arg_value>{value}</arg_value>{break_}"

    text = f"<tool_call>write{break_}{pair('text', value)}{pair('mode', '7')}</tool_call>"
    assert every_way(text, tools=TOOLS) == [T("write", {"text": value, "mode": 7})]
    text = f"<tool_call>write{break_}{pair('mode', '7')}{pair('text', value)}</tool_call>"
    assert every_way(text, tools=TOOLS) == [T("write", {"mode": 7, "text": value})]


# -- a model that speaks of its own delimiters -------------------------------------------------------------------------

SPOKEN = {
    "prose": "Use <tool_call> now.",
    "in code": "The tag `<tool_call>` opens a call, `</tool_call>` closes it.",
    "at a line's end": "It writes <tool_call>\nand then a name.",
    "twice": "<tool_call> <tool_call> and again <tool_call>.",
    "with braces": '<tool_call>{"name": "f"}</tool_call>',
    "closing alone": "a</tool_call>b</arg_value>",
    "another script": "\u7528<tool_call>\u3002\u597d",
    "a long name": "<tool_call>" + "a" * 80,
    "a long key": "<tool_call>f<arg_key>" + "then comes the key, " * 4 + ".",
    "a key that is none": "<tool_call>f<arg_key>a<b>c</b>",
}


@pytest.mark.parametrize("spoken", SPOKEN.values(), ids=SPOKEN)
def test_a_mention_is_text_and_calls_after_it_count(spoken):
    call = "\n<tool_call>get_time\n</tool_call>"
    assert every_way(spoken, tools=TOOLS) == [C(spoken)]
    assert every_way(spoken + call, tools=TOOLS) == [C(spoken), T("get_time", {})]
    assert every_way(f"<think>{spoken}</think>{call}", tools=TOOLS) == [R(spoken), T("get_time", {})]
    assert every_way(f"<think>{spoken}</think>\nok{call}", tools=TOOLS) == [R(spoken), C("ok"), T("get_time", {})]


@pytest.mark.parametrize("name", ["glm", "v3", "v3.1", "kimi"])
def test_thoughts_that_end_in_a_call_end_it(name):
    form = {"glm": GLM, "v3": DEEPSEEK_V3, "v3.1": DEEPSEEK_V31, "kimi": KIMI_K2}[name]
    whole = "<tool_call>f<arg_key>a</arg_key>..." if name == "glm" else written(name, "f", "...")
    cut, call = (
        whole[: whole.index("...") + 3],
        "<tool_call>g\n</tool_call>" if name == "glm" else written(name, "g", "{}"),
    )
    found = every_way(f"<think>As in {cut}</think>{call}ok", form)
    assert found[:2] == [R("As in"), B(cut)]
    assert [event.name for event in found[2:3]] == ["g"] and found[3:] == [C("ok")]
    assert every_way(f"<think>As in {cut}</think>\nok", form) == [R("As in"), B(cut), C("ok")]
    text = "<arg_value>a</think>b</arg_value></tool_call>" if name == "glm" else '{"a": "a</think>b"}'
    inside = whole.replace("...", text)
    assert [event.arguments for event in every_way(f"<think>So.{inside}", form)[1:]] == [{"a": "a</think>b"}]


@pytest.mark.parametrize("name", ["glm", "v3", "v3.1", "kimi"])
def test_a_call_that_is_closed_twice(name):
    form = {"glm": GLM, "v3": DEEPSEEK_V3, "v3.1": DEEPSEEK_V31, "kimi": KIMI_K2}[name]
    call = "<tool_call>f\n</tool_call>" if name == "glm" else written(name, "f", "{}")
    end = form.calls.head_ends[-1]
    for text in (call + end, f"{call}\n{end} {end}", call + end + call):
        found = every_way(text, form)
        assert {type(event) for event in found} == {ToolCall}
    assert every_way(f"{call}x{end}", form)[1:] == [C(f"x{end}")]


def test_a_call_that_was_never_closed_ends_where_the_next_begins():
    call = "<tool_call>get_time\n</tool_call>"
    begun = "<tool_call>write\n<arg_key>text</arg_key>\n<arg_value>a</arg_value>\n"
    assert every_way(begun + call) == [B(begun.rstrip("\n") + "\n"), T("get_time", {})]
    assert every_way("<tool_call>write\n" + call) == [C("<tool_call>write"), T("get_time", {})]
    assert every_way("<tool_call>write<arg_key>text" + call) == [B("<tool_call>write<arg_key>text"), T("get_time", {})]
    for form in ("v3", "v3.1", "kimi"):
        format_ = {"v3": DEEPSEEK_V3, "v3.1": DEEPSEEK_V31, "kimi": KIMI_K2}[form]
        whole, cut = written(form, "f", "{}"), written(form, "g", '{"a": 1')
        cut = cut.split(', "')[0].removesuffix(format_.delimiters[-1])
        cut = cut[: cut.index("1") + 1]
        found = every_way(cut + whole, format_)
        assert [type(event) for event in found] == [B, T] and found[0] == B(cut)


@pytest.mark.parametrize("form", [DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2])
def test_mentions_of_sections_and_their_calls(form):
    begin, end = form.calls.section or ("", "")
    name = "v3" if form is DEEPSEEK_V3 else "v3.1" if form is DEEPSEEK_V31 else "kimi"
    call = begin + written(name, "f", "{}") + end
    for spoken in (f"I write {begin} first.", f"{begin}{form.calls.begin} is how", f"`{form.calls.begin}`"):
        found = every_way(f"<think>{spoken}</think>ok {call}", form)
        assert found[:2] == [R(spoken), C("ok")]
        assert [event.name for event in found[2:]] == ["f"]


@pytest.mark.parametrize("form", [GLM, DEEPSEEK_V3, DEEPSEEK_V31, KIMI_K2])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_prose_with_delimiters_streams(form, data):
    """All of it comes out; what is held back is at most two delimiters and a word between them."""
    known = [delimiter for delimiter in (*form.delimiters, "<think>") if len(delimiter) > 2]
    words = st.sampled_from(["so ", "it is", " a", "\n", ". ", "\u597d ", '"', "{", "<", "1"])
    text = "x " + "".join(
        data.draw(
            st.lists(st.tuples(st.sampled_from(known), words, words).map(lambda t: f"{t[0]} {t[1]}{t[2]} "), max_size=8)
        )
    )
    parser = StreamParser(answer_format=form.without_thoughts())
    out = ""
    bound = 2 * max(map(len, known)) + len("function")
    for size, character in enumerate(text, 1):
        for event in parser.push(character):
            assert isinstance(event, ContentDelta | MalformedToolCall)  # a call with nothing in it is malformed
            out += event.text
        assert len("".join(text[:size].split())) - len("".join(out.split())) <= bound
    rest = parser.finish()
    out += "".join(event.text for event in rest if isinstance(event, ContentDelta | MalformedToolCall))
    assert "".join(out.split()) == "".join(text.split())


@pytest.mark.parametrize("name", ["glm", "v3", "v3.1", "kimi"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_generated_markup(name, data):
    """No exception, no text lost, no key with `<`, and never a call that the text does not have whole."""
    form = {"glm": GLM, "v3": DEEPSEEK_V3, "v3.1": DEEPSEEK_V31, "kimi": KIMI_K2}[name].without_thoughts()
    whole = "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    whole = whole if name == "glm" else written(name, "f", '{"a": 1}')
    words = [
        "f",
        "list_dir",
        "path",
        "functions.f:0",
        "x",
        " ",
        "\n",
        "<",
        "</",
        '"',
        "{",
        "}",
        "{}",
        '{"a": 1}',
        "```json\n",
    ]
    part = st.sampled_from([*form.delimiters, whole, whole[:-3], whole[3:], *words])
    text = "".join(data.draw(st.lists(part, max_size=16)))
    events = parse(*text, answer_format=form, tools=TOOLS)
    assert events == parse(text, answer_format=form, tools=TOOLS)
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert not any("<" in key or ">" in key for call in calls if name == "glm" for key in call.arguments)
    assert len(calls) <= text.count(form.calls.begin)
    if not calls:
        # The delimiters of a section are dropped also where its calls cannot be read.
        out = "".join(event.text for event in events)
        for delimiter in form.calls.section or ():
            out, text = out.replace(delimiter, ""), text.replace(delimiter, "")
        assert "".join(out.split()) == "".join(text.split())
    ends = [end for state in form.calls.states.values() for end, after in state.items() if after == ""]
    assert len(calls) <= sum(text.count(end) for end in set(ends))


# -- thoughts again ----------------------------------------------------------------------------------------------------


def test_thoughts_open_again():
    assert every_way("<think>a</think>text\n<think>b</think>\nmore") == [R("a"), C("text"), R("b"), C("\n\nmore")]
    assert every_way("<think>a</think>text<think>b</think>more") == [R("a"), C("text"), R("b"), C("more")]
    assert every_way("<think>a</think>Done.<think>b</think>") == [R("a"), C("Done."), R("b")]
    assert every_way("<think>a</think>\n<think>b</think>c") == [R("ab"), C("c")]
    call = "<tool_call>get_time\n</tool_call>"
    assert every_way(f"<think>a</think>{call}\n<think>b</think>{call}") == [
        R("a"), T("get_time", {}), R("b"), T("get_time", {}),
    ]  # fmt: skip
    assert every_way("one\n<think>b</think>two") == [C("one"), R("b"), C("\ntwo")]


@pytest.mark.parametrize("spoken", ["the <think> tag", "`<think>`", '"<think>"', "(<think>)", "a <think> b </think> c"])
def test_a_mention_of_thoughts_is_text(spoken):
    assert every_way(f"<think>a</think>{spoken}") == [R("a"), C(spoken)]
    assert every_way(spoken) == [C(spoken)]


def test_thoughts_glued_to_text_need_thoughts_before():
    assert every_way("text<think>b</think>more") == [C("text<think>b</think>more")]


# -- Kimi's ids --------------------------------------------------------------------------------------------------------

WEATHER, EXEC = tool("get_weather", city=TEXT), tool("exec", city=TEXT)
TOKYO = {"city": "Tokyo"}


def kimi(call_id: str, arguments: Any, tools: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    call = f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{text}<|tool_call_end|>"
    whole = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>"
    (found,) = every_way(whole, KIMI_K2, tools=tools, **options)
    if isinstance(found, MalformedToolCall):
        assert found.text == call
    return found


@pytest.mark.parametrize(
    ("call_id", "tools"),
    [
        ("functions_get_weather_1", [WEATHER, tool("f", x=TEXT)]),
        ("functions.get_weather", [WEATHER, tool("f", x=TEXT)]),
        ("function.get_weather:3", [WEATHER, tool("f", x=TEXT)]),
        ("functions-get-weather-3", [WEATHER]),
        ("get_weather", [WEATHER, EXEC]),
        ("get_weather_12", [WEATHER, EXEC]),
        ("Functions.GetWeather:0", [WEATHER, EXEC]),
        ("0", [WEATHER, tool("f", x=TEXT)]),
        ("3", [WEATHER, tool("get_time")]),
        ("call_abc123", [WEATHER, tool("f", x=TEXT)]),
        ("chatcmpl-tool-1b2c", [WEATHER]),
        ("3f2a91c07d", [WEATHER]),
        ("toolu_01AbC", [WEATHER]),
        ("", [WEATHER]),
        ("functions", [WEATHER]),
        ("functions:0", [WEATHER]),
        ("functions.0:0", [WEATHER]),
        ("`3`", [WEATHER]),
        ("functions.get_weather[0]", [WEATHER, EXEC]),
        ('"functions.get_weather:0"', [WEATHER, EXEC]),
    ],
)
def test_kimi_ids_of_another_form(call_id, tools):
    assert kimi(call_id, TOKYO, tools) == T("get_weather", TOKYO, "functions.get_weather:0")
    assert kimi(call_id, TOKYO, tools, first_call=4) == T("get_weather", TOKYO, "functions.get_weather:4")


def test_kimi_ids_that_run_into_the_name():
    assert kimi("functionsexec5", TOKYO, [WEATHER, EXEC]) == T("exec", TOKYO, "functions.exec:0")
    versions = [tool("get_v2", city=TEXT), tool("get", city=TEXT)]
    assert kimi("functions_get_v2_1", TOKYO, versions).name == "get_v2"
    assert kimi("functions_get_1", TOKYO, versions).name == "get"


def test_kimi_ids_with_long_names():
    for size in (54, 55, 64, 100):
        name = "n" * size
        assert kimi(f"functions.{name}:12", TOKYO, [tool(name, city=TEXT)]) == T(name, TOKYO, f"functions.{name}:12")


def test_kimi_ids_that_are_a_number_name_the_tool_of_that_name():
    assert kimi("functions.7:0", TOKYO, [tool("7", city=TEXT)]) == T("7", TOKYO, "functions.7:0")


def test_kimi_ids_of_its_own_form_stay():
    assert kimi("functions.get_weather:7", TOKYO, [WEATHER]) == T("get_weather", TOKYO, "functions.get_weather:7")
    assert kimi("get_weather:0", TOKYO, [WEATHER]) == T("get_weather", TOKYO, "get_weather:0")
    assert kimi("functions.absent:0", TOKYO, [WEATHER]).name == "absent"  # the caller says that there is none


@pytest.mark.parametrize(
    ("call_id", "arguments", "tools"),
    [
        ("0", TOKYO, [WEATHER, EXEC]),  # two tools accept them
        ("0", TOKYO, [tool("f", x=TEXT)]),
        ("0", {"city": 3}, [WEATHER]),
        ("call_abc123", TOKYO, None),
        ("functions_other_1", TOKYO, [WEATHER]),  # names another tool
    ],
)
def test_kimi_ids_that_say_nothing(call_id, arguments, tools):
    assert isinstance(kimi(call_id, arguments, tools), MalformedToolCall)


def test_kimi_arguments_that_name_the_tool():
    wrapped = {"name": "get_weather", "arguments": TOKYO}
    assert kimi("0", wrapped, [WEATHER, EXEC]) == T("get_weather", TOKYO, "functions.get_weather:0")
    assert kimi("0", {**wrapped, "arguments": json.dumps(TOKYO)}, [WEATHER, EXEC]).arguments == TOKYO
    assert kimi("0", {"name": "exec", **TOKYO}, [WEATHER, EXEC]) == T("exec", TOKYO, "functions.exec:0")


def test_kimi_numbers_new_ids_by_the_calls_before():
    def call(call_id: str) -> str:
        return f'<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{{"city":"x"}}<|tool_call_end|>'

    found = every_way(call("0") + call("functions.get_weather:9") + call("1"), KIMI_K2, tools=[WEATHER], first_call=3)
    assert [event.id for event in found] == [
        "functions.get_weather:3", "functions.get_weather:9", "functions.get_weather:5",
    ]  # fmt: skip


# -- arguments encoded twice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v3", "v3.1", "kimi"])
def test_arguments_encoded_twice(name):
    form = {"v3": DEEPSEEK_V3, "v3.1": DEEPSEEK_V31, "kimi": KIMI_K2}[name]
    for value in ({"todos": []}, {"a": 'x "y" \\ <|tool_call_end|>', "b": {"c": [1, None]}}, {}):
        twice = json.dumps(json.dumps(value))
        (found,) = every_way(written(name, "f", twice), form)
        assert isinstance(found, ToolCall) and found.arguments == value
        (found,) = parse(written(name, "f", json.dumps(twice)), answer_format=form)
        assert found.arguments == value
    for wrong in ('"[1]"', '"x"', '"{"', "3"):
        assert [type(event) for event in every_way(written(name, "f", wrong), form)] == [B]


def test_single_arguments_encoded_twice_are_decoded_where_the_schema_allows_no_string():
    tools = [tool("f", items={"type": "array"}, text=TEXT, n={"type": "integer"}, any={})]
    arguments = {"items": '["a"]', "text": '["a"]', "n": "3", "any": "3"}
    found = kimi("functions.f:0", arguments, tools)
    assert found.arguments == {"items": ["a"], "text": '["a"]', "n": 3, "any": "3"}
    assert kimi("functions.f:0", {"items": "x", "n": "[]"}, tools).arguments == {"items": "x", "n": "[]"}
