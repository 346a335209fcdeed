"""chat --tools FILE --messages FILE: a conversation from files, answered with the calls that the model makes."""

from __future__ import annotations

import json

import pytest

import glm_jax
from glm_jax.cli import chat as verb
from glm_jax.serving import Finished, Usage
from glm_jax.text import ToolCall
from tests.conventions.tree import ROOT

DEMO = ROOT / "examples" / "demo_model"
ONE = "--mesh=data=1"
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
QUESTION = {"role": "user", "content": "12*34"}


@pytest.fixture
def written(tmp_path):
    """Writes a file, from a value as JSON or from bytes as they are; returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_answer_is_that_of_the_same_call_in_python(call, written, wrapped):
    """Lists, or the `messages` and `tools` of a whole request."""
    request = {"messages": [QUESTION], "tools": [CALCULATOR]}
    messages = written("messages.json", request if wrapped else request["messages"])
    tools = written("tools.json", request if wrapped else request["tools"])
    expected = glm_jax.Chat(DEMO, mesh=glm_jax.make_mesh())([QUESTION], tools=[CALCULATOR], max_new_tokens=64)
    flags = ["chat", f"--model={DEMO}", f"--messages={messages}", f"--tools={tools}", "--max_new_tokens=64", ONE]
    result = call(*flags, "--json").json
    told = expected.to_json()
    assert {key: result[key] for key in told if key != "usage"} == {key: told[key] for key in told if key != "usage"}
    assert result["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert expected.content in call(*flags).out


class _Caller:
    """A chat that calls every tool that it is given."""

    def stream(self, messages, *, thinking, tools=(), **settings):
        for tool in tools:
            yield ToolCall(tool["function"]["name"], {"expression": messages[-1]["content"]})
        yield Finished("tool_calls" if tools else "stop", Usage(1, 2, 0.1, 0.1))


def test_calls_are_printed_and_join_the_conversation(capsys):
    conversation = verb.Conversation(
        _Caller(), "Be brief.", thinking=True, settings={"tools": [CALCULATOR]}, messages=[QUESTION]
    )
    reply = conversation.answer(None, show=True)
    assert capsys.readouterr().out == "calculator(expression='12*34')\n"
    assert conversation.messages == [{"role": "system", "content": "Be brief."}, QUESTION, reply.message]
    assert reply.to_json()["tool_calls"] == [{"name": "calculator", "arguments": {"expression": "12*34"}}]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "line 1, column 1: Expecting value"),
        (b'[\n  {"role": "user",\n   "content" "a"}\n]', "line 3, column 14: Expecting ':' delimiter"),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        (b"[" * 100_000, "nests too deeply"),
        ("hello", "holds a JSON string; a list of messages was expected"),
        ({"role": "user", "content": "a"}, "holds a JSON object; a list of messages was expected"),
        ([], "has no messages; a conversation begins with one of a user"),
        ([QUESTION, "hello"], 'messages[1] must be a dict with "role" and "content", not a str'),
        ([{"content": "a"}], 'messages[0] has no "role"'),
        ([{"role": "user", "content": 5}], "messages[0].content must be text or a list of parts, not a int"),
    ],
)
def test_what_is_wrong_with_messages_names_file_and_place(call, written, content, complaint):
    path = written("messages.json", content)
    assert call("chat", f"--model={DEMO}", f"--messages={path}").complaint.startswith(f"{path}: {complaint}")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[1,]", "line 1, column "),
        ({"name": "f"}, "holds a JSON object; a list of tools was expected"),
        ([CALCULATOR, "f"], 'tools[1] must be {"type": "function", "function": {...}}, not a str'),
        ([{"type": "function", "function": {}}], "tools[0] has no name; right would be"),
        ([CALCULATOR, {"type": "function"}], "tools[1] has no name; right would be"),
    ],
)
def test_what_is_wrong_with_tools_names_file_and_place(call, written, content, complaint):
    path = written("tools.json", content)
    said = call("chat", f"--model={DEMO}", "--message=a", f"--tools={path}").complaint
    assert said.startswith(f"{path}: {complaint}")


def test_files_that_are_not_there_and_two_system_messages(call, written, tmp_path):
    missing = tmp_path / "nothing.json"
    said = call("chat", f"--model={DEMO}", f"--tools={missing}").complaint
    assert said == f"{missing}: No such file or directory; --tools takes a JSON file"
    path = written("messages.json", [{"role": "system", "content": "a"}, QUESTION])
    said = call("chat", f"--model={DEMO}", f"--messages={path}", "--system=b").complaint
    assert said == f"--system and {path} both have a system message; give one of the two"
