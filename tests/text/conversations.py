"""Message lists that the chat template tests share."""

from __future__ import annotations

from typing import Any

USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city: <b>now</b> & 'later', 天气.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NO_ARGUMENTS = {"type": "function", "function": {"name": "noargs", "parameters": {"type": "object", "properties": {}}}}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_loop(last: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A question, two calls with thoughts, two results, and what may come last."""
    arguments = {"city": "北京", "n": 3, "flag": True, "o": {"a": [1]}}
    messages = [
        USER,
        {
            "role": "assistant",
            "content": "Calling.",
            "reasoning_content": "think",
            "tool_calls": [call("get_weather", arguments), call("noargs", {})],
        },
        {"role": "tool", "content": "T1"},
        {"role": "tool", "content": "T2"},
    ]
    return messages if last is None else [*messages, last]


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [{"role": "system", "content": "S"}, USER],
    "two turns": [USER, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}],
    "thoughts in content": [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "<think>\nr1\n</think>\n\na1\n"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "reasoning_content": " r2 ", "content": " a2 "},
    ],
    "thoughts in the last content": [
        USER,
        {"role": "assistant", "content": "x<think>\n\nr</think>mid</think>\n\n end"},
    ],
    "empty thoughts": [USER, {"role": "assistant", "reasoning_content": "", "content": "a"}],
    "blank answer": [USER, {"role": "assistant", "reasoning_content": "r", "content": " \n "}],
    "nothink already": [{"role": "user", "content": "q/nothink"}, {"role": "assistant", "content": "a"}, USER],
    "tool loop": tool_loop(),
    "tool loop, answered": tool_loop({"role": "assistant", "reasoning_content": "after", "content": "Done."}),
    "tool loop, then a user": tool_loop({"role": "user", "content": "thanks"}),
    "tool first": [{"role": "tool", "content": "T"}, USER],
    "tool list": [USER, {"role": "tool", "content": [{"name": "f", "output": "O1"}, "plain", {"output": 7}]}],
    "flat calls": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": None}}]}],
    "parts": [
        {"role": "system", "content": ["A", {"type": "text", "text": "B"}]},
        {"role": "user", "content": [{"type": "image", "image": "i"}, {"type": "text", "text": "C"}, "D", 5]},
        {"role": "assistant", "content": [{"type": "text", "text": " E "}]},
    ],
    "assistant only": [{"role": "assistant", "reasoning_content": "r", "content": "a"}],
    "markup and scripts": [{"role": "user", "content": "<a href='x'>&amp;</a> {{ 1 }} 你好 🙂 é\n\n  end  "}],
    "none": [USER, {"role": "assistant", "content": None, "tool_calls": [call("noargs", {})], "name": None}],
}
