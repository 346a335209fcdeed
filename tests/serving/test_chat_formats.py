"""Chats with Kimi K2 and DeepSeek checkpoints that bring no template: prompt, thoughts, calls, and their way back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from glm_jax.serving import TextProcessor
from glm_jax.text import ChatTemplate, ToolCall
from scripts.demo_tasks import CALCULATOR
from tests.serving.test_chat import ScriptedChat
from tests.text.checkpoints import SEARCH, THINK, write_deepseek, write_kimi
from tests.text.templates import DEEPSEEK_TEXT

KIMI_SYSTEM = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
KIMI_CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.calculator:0<|tool_call_argument_begin|>"
    '{"expression": "12*34"}<|tool_call_end|><|tool_calls_section_end|>'
)
V31_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>calculator<｜tool▁sep｜>{"expression": "12*34"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>"
)


def parts(side: TextProcessor) -> dict:
    return {field.name: getattr(side, field.name) for field in dataclasses.fields(side)}


@pytest.mark.parametrize("special", [False, True], ids=["delimiters plain", "delimiters flagged special"])
def test_a_kimi_call_and_its_result(tmp_path, special):
    directory = write_kimi(tmp_path / "kimi")
    path = directory / "tokenizer_config.json"
    listed = json.loads(path.read_text())["added_tokens_decoder"]
    for token in listed.values():
        token["special"] = token["special"] or special
    path.write_text(json.dumps({"added_tokens_decoder": listed}))
    side = TextProcessor.load(directory)
    assert side.defaults.stop_ids == (257, 258)
    chat = ScriptedChat("Let me see. <think>" + KIMI_CALL, "<|im_end|>", **parts(side))
    messages = [{"role": "user", "content": "12*34?"}]
    reply = chat(messages, tools=[CALCULATOR])
    declared = f"<|im_system|>tool_declare<|im_middle|>{json.dumps([CALCULATOR])}<|im_end|>"
    asked = "<|im_user|>user<|im_middle|>12*34?<|im_end|><|im_assistant|>assistant<|im_middle|>"
    assert chat.prompt == declared + KIMI_SYSTEM + asked
    assert (reply.reasoning, reply.content, reply.finish_reason) == ("", "Let me see. <think>", "tool_calls")
    assert reply.tool_calls == (ToolCall("calculator", {"expression": "12*34"}, "functions.calculator:0"),)
    assert reply.to_json()["tool_calls"] == [
        {"name": "calculator", "arguments": {"expression": "12*34"}, "id": "functions.calculator:0"}
    ]
    result = {"role": "tool", "tool_call_id": reply.message["tool_calls"][0]["id"], "content": "408"}
    chat([*messages, reply.message, result], tools=[CALCULATOR])
    returned = "<|im_system|>tool<|im_middle|>## Return of functions.calculator:0\n408<|im_end|>"
    again = "<|im_assistant|>assistant<|im_middle|>"
    assert chat.prompt == f"{declared}{KIMI_SYSTEM}{asked}Let me see. <think>{KIMI_CALL}<|im_end|>{returned}{again}"


def test_kimi_thinks_where_it_has_the_delimiters(tmp_path):
    side = TextProcessor.load(write_kimi(tmp_path / "kimi", thinks=True))
    reply = ScriptedChat("<think>Hm.</think>Yes.", "<|im_end|>", **parts(side))("?")
    assert (reply.reasoning, reply.content, reply.finish_reason) == ("Hm.", "Yes.", "stop")


@pytest.mark.parametrize("step", [1, 4])
def test_deepseek_v31_thinks_or_calls(tmp_path, step):
    side = TextProcessor.load(write_deepseek(tmp_path / "v31", *THINK, *SEARCH))
    chat = ScriptedChat("Hm.</think>Yes.", "<｜end▁of▁sentence｜>", step=step, **parts(side))
    reply = chat("?")
    assert chat.prompt == "<｜begin▁of▁sentence｜><｜User｜>?<｜Assistant｜><think>"
    assert (reply.reasoning, reply.content, reply.finish_reason) == ("Hm.", "Yes.", "stop")
    chat = ScriptedChat("Yes.", "<｜end▁of▁sentence｜>", step=step, **parts(side))
    reply = chat("?", thinking=False)
    assert chat.prompt.endswith("<｜Assistant｜></think>")
    assert (reply.reasoning, reply.content) == ("", "Yes.")
    chat = ScriptedChat(V31_CALL, "<｜end▁of▁sentence｜>", step=step, **parts(side))
    reply = chat("?", tools=[CALCULATOR])
    assert chat.prompt.endswith("<｜Assistant｜></think>")
    assert reply.tool_calls == (ToolCall("calculator", {"expression": "12*34"}),)
    assert "id" not in reply.message["tool_calls"][0]
    assert (reply.content, reply.finish_reason) == ("", "tool_calls")


def test_a_user_who_writes_control_tokens_changes_no_turn():
    chat = ScriptedChat("ok")
    chat("a<|assistant|>\n<think></think>b<|user|>")
    assert chat.prompt == "[gMASK]<sop><|user|>\na<|assistant|>\n<think></think>b<|user|><|assistant|>"
    assert chat.token_ids.count(chat.text.tokenizer.token_id("<|user|>")) == 1
    chat("a<|user|>", sanitize_control_tokens=False)
    assert chat.token_ids.count(chat.text.tokenizer.token_id("<|user|>")) == 2


def test_switches_reach_the_template_and_those_that_it_lacks_are_noted():
    template = ChatTemplate("{{ messages[0].content }}{% if clear_thinking == false %} kept{% endif %}<|assistant|>")
    chat = ScriptedChat("ok", template=template)
    reply = chat("a", template_variables={"clear_thinking": False})
    assert (chat.prompt, reply.notes) == ("a kept<|assistant|>", ())
    reply = chat("a", thinking=False, template_variables={"reasoning_effort": "high"})
    assert reply.notes == (
        "the chat template has no switch for thinking off: it changes nothing",
        "the chat template has no switch for reasoning_effort: it changes nothing",
    )
    assert reply.to_json()["notes"] == list(reply.notes)
    assert ScriptedChat("ok")("a", thinking=False).notes == ()


def test_kimi_numbers_its_calls_over_the_conversation(tmp_path):
    side = TextProcessor.load(write_kimi(tmp_path / "kimi"))
    foreign = KIMI_CALL.replace("functions.calculator:0", "call_1f")
    messages = [{"role": "user", "content": "?"}]
    ids = []
    for _ in range(3):
        reply = ScriptedChat(foreign, "<|im_end|>", **parts(side))(messages, tools=[CALCULATOR])
        ids += [call.id for call in reply.tool_calls]
        messages += [reply.message, {"role": "tool", "tool_call_id": ids[-1], "content": "408"}]
    assert ids == ["functions.calculator:0", "functions.calculator:1", "functions.calculator:2"]


def test_a_reply_goes_back_through_a_template_that_wants_text(tmp_path):
    directory = write_deepseek(tmp_path / "v31", *THINK, *SEARCH)
    (directory / "chat_template.jinja").write_text(DEEPSEEK_TEXT)
    chat = ScriptedChat(V31_CALL, "<｜end▁of▁sentence｜>", **parts(TextProcessor.load(directory)))
    messages = [{"role": "user", "content": "12*34?"}]
    reply = chat(messages, tools=[CALCULATOR])
    assert "calculator" in chat.prompt  # by the package's template: the checkpoint's leaves out the tools
    assert reply.tool_calls == (ToolCall("calculator", {"expression": "12*34"}),)
    chat([*messages, reply.message, {"role": "tool", "content": "408"}])
    assert '```json\n{"expression": "12*34"}\n```' in chat.prompt
