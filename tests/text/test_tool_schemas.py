"""What declared schemas say: types through references and unions, and how written arguments are read by them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.text import ToolCall
from glm_jax.text.tool_schemas import read_tools
from tests.text.test_stream_parser import call, parse

DEFINITIONS = {
    "Name": {"type": "string"},
    "Count": {"type": "integer"},
    "Either": {"anyOf": [{"$ref": "#/$defs/Name"}, {"type": "null"}]},
    "Deep": {"$ref": "#/$defs/Count"},
    "Circle": {"$ref": "#/$defs/Circle"},
    "Round": {"anyOf": [{"$ref": "#/$defs/Trip"}, {"type": "string"}]},
    "Trip": {"allOf": [{"$ref": "#/$defs/Round"}]},
    "odd/name~ %": {"type": "string"},
}


def parameters(schema: Any, **more: Any) -> list[dict[str, Any]]:
    shape = {"type": "object", "properties": {"a": schema}, "$defs": DEFINITIONS, "definitions": DEFINITIONS, **more}
    return [{"type": "function", "function": {"name": "f", "parameters": shape}}]


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"$ref": "#/$defs/Name"}, "001", "001"),
        ({"$ref": "#/definitions/Name"}, "true", "true"),
        ({"$ref": "#/$defs/Count"}, "7", 7),
        ({"$ref": "#/$defs/Deep"}, "7", 7),
        ({"type": "object"}, '{"a": "two\nlines"}', {"a": "two\nlines"}),
        ({"type": ["object", "string"]}, '{"a": "two\nlines"}', '{"a": "two\nlines"}'),
        ({"$ref": "#/$defs/Either"}, "7", "7"),
        ({"$ref": "#/$defs/Either"}, "null", None),
        ({"$ref": "#/$defs/odd~1name~0%20%25"}, "1", "1"),
        ({"$ref": "#/$defs/Circle"}, "1", 1),  # says nothing
        ({"$ref": "#/$defs/Absent"}, "1", 1),
        ({"$ref": "https://example.com/s.json#/x"}, "1", 1),
        ({"$ref": "#/properties/a"}, "1", 1),
        ({"$ref": "#/$defs/Name", "description": "beside it"}, "1", "1"),
        ({"allOf": [{"$ref": "#/$defs/Name"}]}, "1", "1"),
        ({"allOf": [{"$ref": "#/$defs/Name"}, {"minLength": 1}], "default": "x"}, "1", "1"),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": ["string", "null"]}]}, "1", "1"),
        ({"anyOf": [{"$ref": "#/$defs/Name"}, {"$ref": "#/$defs/Count"}]}, "1", 1),
        ({"anyOf": [{"$ref": "#/$defs/Name"}, {"$ref": "#/$defs/Count"}]}, "[1]", "[1]"),
        ({"oneOf": [{"allOf": [{"$ref": "#/$defs/Name"}]}, {"type": "null"}]}, "12", "12"),
        ({"oneOf": [{"const": "1"}, {"const": "2"}]}, "1", "1"),
        ({"anyOf": [{"enum": ["1"]}, {"type": "boolean"}]}, "true", True),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "string", "nullable": True}, "1", "1"),
        ({"type": "string", "anyOf": [{"pattern": "a"}, {"pattern": "b"}]}, "1", "1"),
        ({"type": "number", "enum": [1, 2]}, "1", 1),
        ({"type": "string", "enum": [1]}, "1", "1"),  # a contradiction: the first statement counts
        ({"$ref": "#/$defs/Round"}, "x", "x"),
    ],
)
def test_values_by_references_and_unions(schema, text, value):
    (found,) = parse(call("f", a=text), tools=parameters(schema))
    assert isinstance(found, ToolCall)
    assert found.arguments == {"a": value} and type(found.arguments["a"]) is type(value)


@pytest.mark.parametrize(
    "shape",
    [
        {"$ref": "#/$defs/Arguments", "$defs": {"Arguments": {"properties": {"a": {"type": "string"}}}}},
        {"allOf": [{"properties": {"a": {"type": "string"}}}, {"properties": {"b": {}}}]},
        {"anyOf": [{"properties": {"a": {"type": "string"}}}, {"properties": {"a": {"const": "x"}}}]},
    ],
)
def test_parameters_that_are_put_together(shape):
    tools = [{"type": "function", "function": {"name": "f", "parameters": shape}}]
    assert parse(call("f", a="1"), tools=tools) == [ToolCall("f", {"a": "1"})]


def test_which_arguments_a_tool_accepts():
    (tool,) = read_tools(parameters({"type": "string"}, required=["a"])).values()
    assert tool.accepts({"a": "x"})
    assert not any(tool.accepts(wrong) for wrong in ({}, {"a": 1}, {"a": "x", "b": 1}))
    (tool,) = read_tools(parameters({"type": "number"}, additionalProperties=True)).values()
    assert tool.accepts({}) and tool.accepts({"a": 1, "b": 1}) and tool.accepts({"a": 1.5})
    assert not tool.accepts({"a": True})


def test_a_schema_that_branches_without_end_is_read_in_no_time():
    doubling = {f"D{i}": {"anyOf": [{"$ref": f"#/$defs/D{i + 1}"}] * 2} for i in range(200)}
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(500):
        deep = {"allOf": [deep]}
    tools = parameters(
        {"$ref": "#/$defs/D0"}, **{"$defs": doubling, "properties": {"a": {"$ref": "#/$defs/D0"}, "b": deep}}
    )
    assert read_tools(tools)["f"].types["a"] is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["string", "integer", "#/$defs/Name", "#", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "properties", "required", "$defs"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(schema=json_values, shape=json_values, text=st.text(max_size=8).filter(lambda text: "<" not in text))
@settings(max_examples=300, deadline=None)
def test_schemas_of_any_form_do_no_harm(schema, shape, text):
    for tools in (
        parameters(schema),
        [{"function": {"name": "f", "parameters": shape}}],
        [schema, {"function": shape}],
    ):
        (found,) = parse(call("f", a=text), tools=tools)
        assert isinstance(found, ToolCall) and list(found.arguments) == ["a"]


def test_what_one_of_several_schemas_requires_is_not_required():
    options = [{"required": ["a"]}, {"required": ["b"]}]
    shape = {"properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "anyOf": options, "allOf": [{}]}
    (tool,) = read_tools([{"type": "function", "function": {"name": "f", "parameters": shape}}]).values()
    assert tool.accepts({"a": "x"}) and tool.accepts({"b": "x"})
    (tool,) = read_tools([{"name": "f", "parameters": {**shape, "allOf": [{"required": ["a"]}]}}]).values()
    assert tool.accepts({"a": "x"}) and not tool.accepts({"b": "x"})
