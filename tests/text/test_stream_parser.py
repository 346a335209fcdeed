"""The parser of GLM-4.5's output: what it finds, and that it finds it however the text is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.text import ChatTemplate, ContentDelta, Event, MalformedToolCall, ReasoningDelta, StreamParser, ToolCall


def joined(events: list[Event]) -> list[Event]:
    """Events with neighbouring deltas of one kind put together."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, ReasoningDelta | ContentDelta) and type(last) is type(event):
            result[-1] = type(event)(last.text + event.text)
        else:
            result.append(event)
    return result


def parse(*deltas: str, **options: Any) -> list[Event]:
    parser = StreamParser(**options)
    events = [event for delta in deltas for event in parser.push(delta)]
    return joined(events + parser.finish())


def call(name: str, **arguments: str) -> str:
    pairs = (f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items())
    return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"


def tool(name: str, **schemas: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": schemas}}}


R, C, T, B = ReasoningDelta, ContentDelta, ToolCall, MalformedToolCall
CASES: list[tuple[str, dict[str, Any], list[Event]]] = [
    ("", {}, []),
    ("\n", {}, []),
    ("hello", {}, [C("hello")]),
    ("\nhello\n", {}, [C("hello")]),
    ("\n    return x\n\n  y  \n", {}, [C("    return x\n\n  y")]),
    ("\n<think>a b</think>\nhello", {}, [R("a b"), C("hello")]),
    ("\n<think>\na\n\nb\n</think>\n\nhello", {}, [R("a\n\nb"), C("hello")]),
    ("\n<think></think>\nhello", {}, [C("hello")]),
    ("<think>cut", {}, [R("cut")]),
    ("<think>cut</thi", {}, [R("cut</thi")]),
    ("<thin", {}, [C("<thin")]),
    ("a <think> b </think> c", {}, [C("a <think> b </think> c")]),
    ("<think>a <b> <think> c</think>d", {}, [R("a <b> <think> c"), C("d")]),
    ("<think>a</think>b</think>c", {}, [R("a"), C("b</think>c")]),
    # the prompt ended inside <think>
    ("a</think>b", {"in_thinking": True}, [R("a"), C("b")]),
    ("\n<think>a</think>b", {"in_thinking": True}, [R("a"), C("b")]),
    ("</think>\n\nb", {"in_thinking": True}, [C("b")]),
    ("cut", {"in_thinking": True}, [R("cut")]),
    ("<", {"in_thinking": True}, [R("<")]),
    # calls
    (call("f"), {}, [T("f", {})]),
    ("<tool_call>f</tool_call>", {}, [T("f", {})]),
    ("<tool_call>\nf \n\n</tool_call>", {}, [T("f", {})]),
    (call("f", a="1", b="two words", c='{"x": [1]}'), {}, [T("f", {"a": 1, "b": "two words", "c": {"x": [1]}})]),
    ("<tool_call>f<arg_key> a </arg_key><arg_value>1</arg_value></tool_call>", {}, [T("f", {"a": 1})]),
    ("\n<think>x</think>\nSee.\n" + call("f") + "\n" + call("g"), {}, [R("x"), C("See."), T("f", {}), T("g", {})]),
    ("A\n" + call("f") + "\nB", {}, [C("A"), T("f", {}), C("\n\nB")]),
    ("\n" + call("f") + "\nB\n", {}, [T("f", {}), C("B")]),
    ("a < b <tool <tool_calls>", {}, [C("a < b <tool <tool_calls>")]),
    # thoughts end at a call; the </think> that may come late is no text
    ("<think>use f\n" + call("f") + "</think>\ndone", {}, [R("use f"), T("f", {}), C("done")]),
    ("<think>use f" + call("f"), {}, [R("use f"), T("f", {})]),
    ("use f" + call("f"), {"in_thinking": True}, [R("use f"), T("f", {})]),
    # a value may speak of tags
    (call("f", a="x</tool_call><tool_call>g</think>"), {}, [T("f", {"a": "x</tool_call><tool_call>g</think>"})]),
    (call("f", a="  def x():\n\treturn 1\n"), {}, [T("f", {"a": "  def x():\n\treturn 1\n"})]),
    # cut off or malformed: never a call
    ("A\n<tool_call>", {}, [C("A"), B("<tool_call>")]),
    ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_va", {}, [B("<tool_call>f\n<arg_key>a</arg_key>\n<arg_va")]),
    ("<tool_call>f\n</tool_cal", {}, [B("<tool_call>f\n</tool_cal")]),
    ("<tool_call>\n</tool_call>x", {}, [B("<tool_call>\n</tool_call>"), C("x")]),
    ("<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>", {}, [B("<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>")]),
    # what cannot be a call's head is text
    ("<tool_call>f g\n</tool_call>", {}, [C("<tool_call>f g\n</tool_call>")]),
    ('<tool_call>{"name": "f"}\n{}</tool_call>', {}, [C('<tool_call>{"name": "f"}\n{}</tool_call>')]),
    # no tools
    ("<think>a <tool_call> b</think>" + call("f"), {"parse_tools": False}, [R("a <tool_call> b"), C(call("f"))]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "options", "expected"), CASES)
def test_what_it_finds(text, options, expected):
    assert parse(text, **options) == expected
    assert parse(*text, **options) == expected


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_however_the_text_is_cut(data):
    tags = [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ]
    part = st.sampled_from([*tags, call("f"), call("f", a="1"), "\n", " ", "x", "<", "</", "<t", "名", "\r\n"])
    text = "".join(data.draw(st.lists(part, max_size=14)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    deltas = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    options = {"in_thinking": data.draw(st.booleans()), "parse_tools": data.draw(st.booleans())}
    assert parse(*deltas, **options) == parse(text, **options)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
names = st.from_regex(r"[a-z_][a-z0-9_.-]{0,8}", fullmatch=True)
SCHEMAS = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}


@given(
    thoughts=texts,
    content=texts,
    calls=st.lists(st.tuples(names, st.dictionaries(names, values, max_size=3)), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_it_reads_back_what_the_template_writes(template, thoughts, content, calls):
    turn = {
        "role": "assistant",
        "reasoning_content": thoughts,
        "content": content,
        "tool_calls": [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls],
    }
    prompt = template.render([{"role": "user", "content": "q"}])
    whole = template.render([{"role": "user", "content": "q"}, turn], add_generation_prompt=False)
    parsed = parse(*whole.removeprefix(prompt))
    expected: list[Event] = [
        *([R(thoughts.strip())] if thoughts.strip() else []),
        *([C(content.strip())] if content.strip() else []),
    ]
    assert parsed[: len(expected)] == expected
    assert [event.name for event in parsed[len(expected) :]] == [name for name, _ in calls]
    for name, arguments in calls:  # each on its own: two calls of one name may have arguments of different types
        schemas = {key: {"type": SCHEMAS[type(value)]} for key, value in arguments.items()}
        single = template.render(
            [{"role": "user", "content": "q"}, {**turn, "tool_calls": [{"name": name, "arguments": arguments}]}],
            add_generation_prompt=False,
        )
        assert parse(single.removeprefix(prompt), tools=[tool(name, **schemas)])[-1] == T(name, arguments)


@pytest.fixture(scope="module")
def template(demo) -> ChatTemplate:
    return ChatTemplate.load(demo)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "001", "001"),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, ' "x" ', ' "x" '),
        ({"type": "string"}, "null", "null"),
        ({"type": "integer"}, " 42\n", 42),
        ({"type": "integer"}, "forty", "forty"),
        ({"type": "number"}, "1.5e3", 1500.0),
        ({"type": "array"}, '["a"]', ["a"]),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "42", "42"),
        ({"type": ["string", "null"]}, '"q"', '"q"'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "007", "007"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "7", 7),
        ({"anyOf": [{"type": "string"}, {"$ref": "#/x"}]}, "7", 7),
        ({"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, "true", True),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": "1"}, "1", "1"),
        ({"description": "anything"}, "1", 1),
        ({}, "001", "001"),
        ({}, "0x10", "0x10"),
        ({}, "NaN", "NaN"),
        ({}, "[-Infinity]", "[-Infinity]"),
        ({}, "1e999", "1e999"),
        ({}, "9" * 5000, "9" * 5000),
        ({}, "[" * 100_000, "[" * 100_000),
        ({}, '"\\ud83d"', '"\\ud83d"'),
        ({}, "'single'", "'single'"),
        ({}, "True", "True"),
        (None, '"x"', "x"),
        (None, "", ""),
        ({}, "北京", "北京"),
    ],
)
def test_values(schema, text, value):
    tools = [tool("g"), tool("f", **({} if schema is None else {"a": schema}))]
    (found,) = parse(call("f", a=text), tools=tools)
    assert isinstance(found, ToolCall)
    assert found.arguments == {"a": value} and type(found.arguments["a"]) is type(value)


def test_tools_of_odd_forms_do_no_harm():
    tools = [{}, {"function": {"name": "f"}}, {"name": "f", "parameters": {"properties": 3}}, tool("f", a=True)]
    assert parse(call("f", a="1"), tools=tools) == [T("f", {"a": 1})]


def test_text_streams_at_once_and_only_what_may_be_a_tag_waits():
    parser = StreamParser()
    assert parser.push("\n") == []
    assert parser.push("Hel") == [C("Hel")]
    assert parser.push("lo\n") == [C("lo")]
    assert parser.push("a<tool") == [C("\na")]
    assert parser.push("s>") == [C("<tools>")]
    assert parser.push(" " + call("f")) == [T("f", {})]
    assert parser.finish() == []


def test_a_long_value_is_read_in_linear_time():
    parser = StreamParser()
    parser.push("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>")
    for _ in range(100_000):
        parser.push("ab<c ")
    (found,) = parser.push("</arg_value>\n</tool_call>")
    assert isinstance(found, ToolCall) and len(found.arguments["a"]) == 500_000
