"""Chat: the prompt that the model sees, and what becomes of the tokens that it writes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

import glm_jax
from glm_jax import Transformer
from glm_jax.checkpoint.orbax_source import ASSETS
from glm_jax.inference import Sampling
from glm_jax.serving import Chat, Finished, Generation, TextProcessor, Usage, collect, text_directory
from glm_jax.text import (
    ChatTemplate,
    ContentDelta,
    GenerationDefaults,
    MalformedToolCall,
    ReasoningDelta,
    ToolCall,
    load_tokenizer,
)
from scripts.demo_tasks import CALCULATOR
from tests.cli.checkpoints import CONFIG, write_checkpoint
from tests.conventions.tree import ROOT

TEXT = TextProcessor.load(ROOT / "examples" / "demo_model")
CALL = "<tool_call>calculator\n<arg_key>expression</arg_key>\n<arg_value>12*34</arg_value>\n</tool_call>"
THOUGHTS = "\n<think>Use the calculator.</think>\n"


class Scripted:
    """A generation that writes a given text, ended by a stop token or cut off, `step` tokens at a time."""

    def __init__(self, tokens: list[int], *, stopped: bool, step: int):
        self.tokens: list[int] = []
        self.stopped = False
        self._stopped = stopped
        self._batches = [tokens[at : at + step] for at in range(0, len(tokens), step)]

    def __iter__(self):
        for number, batch in enumerate(self._batches, 1):
            self.tokens += batch
            self.stopped = self._stopped and number == len(self._batches)
            yield batch

    @property
    def usage(self) -> Usage:
        return Usage(7, len(self.tokens), 0.5, 2.0)


class ScriptedChat(Chat):
    """A chat whose model has no weights and writes `text`, then the token `end` (None: it is cut off)."""

    def __init__(self, text: str, end: str | None = "<|user|>", *, step: int = 3, **changes):
        super().__init__(Transformer(CONFIG), dataclasses.replace(TEXT, **changes))
        self.script, self.end, self.step = text, end, step
        self.prompt, self.token_ids = "", []
        self.sampling = Sampling(max_new_tokens=1)

    def _generate(self, prompt, sampling):
        self.token_ids = prompt
        self.prompt, self.sampling = self.text.tokenizer.decode(prompt), sampling
        tokens = self.text.tokenizer.encode(self.script + (self.end or ""))
        return Scripted(tokens, stopped=self.end is not None, step=self.step)


def test_thinking_prompt_and_reply():
    chat = ScriptedChat(THOUGHTS + "It is 408.")
    reply = chat("What is 12*34?")
    assert chat.prompt == "[gMASK]<sop><|user|>\nWhat is 12*34?<|assistant|>"
    assert (reply.reasoning, reply.content, reply.tool_calls) == ("Use the calculator.", "It is 408.", ())
    assert reply.finish_reason == "stop"
    assert reply.message == {"role": "assistant", "content": "It is 408.", "reasoning_content": "Use the calculator."}


def test_without_thinking_the_answer_begins_at_once():
    chat = ScriptedChat("\n408 > 5 </think> <b>")
    reply = chat("12*34", thinking=False)
    assert chat.prompt == "[gMASK]<sop><|user|>\n12*34/nothink<|assistant|>\n<think></think>"
    assert (reply.reasoning, reply.content) == ("", "408 > 5 </think> <b>")
    assert reply.message == {"role": "assistant", "content": reply.content}


def test_a_template_that_opens_the_thoughts_itself():
    template = ChatTemplate("{{ messages[-1].content }}<|assistant|>\n<think>\n")
    reply = ScriptedChat("still thinking</think>done", template=template)("a")
    assert (reply.reasoning, reply.content) == ("still thinking", "done")


def test_tags_that_a_user_writes_open_no_thoughts():
    assert ScriptedChat("An answer.")("what does <think> mean?").content == "An answer."


def test_tool_call_and_its_result():
    chat = ScriptedChat(THOUGHTS + CALL, "<|observation|>")
    messages = [{"role": "user", "content": "12*34"}]
    reply = chat(messages, tools=[CALCULATOR])
    assert "# Tools" in chat.prompt and '"name": "calculator"' in chat.prompt
    assert reply.tool_calls == (ToolCall("calculator", {"expression": "12*34"}),)
    assert (reply.content, reply.finish_reason) == ("", "tool_calls")
    assert reply.to_json()["tool_calls"] == [{"name": "calculator", "arguments": {"expression": "12*34"}}]
    # The reply goes back into the conversation as the model wrote it.
    chat([*messages, reply.message, {"role": "tool", "content": "408"}], tools=[CALCULATOR])
    written = "<|assistant|>\n<think>Use the calculator.</think>\n" + CALL
    assert chat.prompt.endswith(written + "<|observation|>\n<tool_response>\n408\n</tool_response><|assistant|>")


@pytest.mark.parametrize("cut", range(1, len(CALL), 7))
def test_a_call_that_is_cut_off_is_no_call(cut):
    reply = ScriptedChat(THOUGHTS + CALL[:cut], None)("12*34", tools=[CALCULATOR])
    assert (reply.tool_calls, reply.finish_reason) == ((), "length")
    assert reply.content == CALL[:cut]


def test_a_call_cut_off_after_a_complete_one_ends_by_length_too():
    reply = ScriptedChat(THOUGHTS + CALL + "\n" + CALL[:30], None)("12*34", tools=[CALCULATOR])
    assert (len(reply.tool_calls), reply.finish_reason) == (1, "length")
    assert reply.content.strip() == CALL[:30]


def test_a_malformed_call_is_text_and_no_reason():
    text = "<tool_call>\n<arg_key>expression</arg_key></tool_call>"
    reply = ScriptedChat(THOUGHTS + text)("12*34", tools=[CALCULATOR])
    assert (reply.tool_calls, reply.content, reply.finish_reason) == ((), text, "stop")


def test_without_tools_nothing_is_a_call():
    reply = ScriptedChat(THOUGHTS + CALL)("12*34")
    assert (reply.tool_calls, reply.content, reply.finish_reason) == ((), CALL, "stop")


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("step", [1, 2, 5, 1000])
def test_events_do_not_depend_on_how_many_tokens_come_at_once(step, thinking):
    opening = THOUGHTS if thinking else "\n"
    text = opening + "Grüße 東京 🙂 <b>\n" + CALL + "\nand done"
    chat = ScriptedChat(text, "<|observation|>", step=step)
    events = list(chat.stream("a", tools=[CALCULATOR], thinking=thinking))
    assert isinstance(events[-1], Finished) and not any(isinstance(event, Finished) for event in events[:-1])
    reply = collect(iter(events))
    assert reply.content == "Grüße 東京 🙂 <b>" + "\n\nand done"
    assert reply.reasoning == ("Use the calculator." if thinking else "")
    assert reply.tool_calls == (ToolCall("calculator", {"expression": "12*34"}),)
    assert {type(event) for event in events} <= {ReasoningDelta, ContentDelta, ToolCall, MalformedToolCall, Finished}


def test_usage():
    usage = ScriptedChat("abc", step=1)("a").usage
    assert usage.completion_tokens == len(TEXT.tokenizer.encode("abc<|user|>"))
    assert (usage.prompt_tokens, usage.total_tokens) == (7, 7 + usage.completion_tokens)
    assert usage.prefill_tokens_per_second == 14
    assert usage.decode_tokens_per_second == (usage.completion_tokens - 1) / 2
    assert Usage(7, 1, 0.5, 0.0).decode_tokens_per_second is None


def test_sampling_is_what_the_caller_says_then_what_the_checkpoint_says():
    defaults = GenerationDefaults(stop_ids=(3,), temperature=0.6, top_p=0.95)
    chat = ScriptedChat("a", defaults=defaults)
    chat("a", max_new_tokens=5)
    assert chat.sampling == Sampling(max_new_tokens=5, temperature=0.6, top_p=0.95, stop=(3,))
    chat("a", temperature=0.0, top_k=4, top_p=0.5, seed=9)
    room = CONFIG.max_positions - len(chat.text.tokenizer.encode(chat.prompt))
    assert chat.sampling == Sampling(max_new_tokens=room, temperature=0.0, top_k=4, top_p=0.5, seed=9, stop=(3,))


@pytest.mark.parametrize(
    ("messages", "settings", "error", "complaint"),
    [
        ([{"content": "a"}], {}, glm_jax.TextError, 'messages\\[0\\] has no "role"'),
        ("a", {"tools": "calculator"}, glm_jax.TextError, "tools must be a list"),
        ("a", {"max_new_tokens": 0}, glm_jax.InputError, "max_new_tokens must be an integer of at least 1"),
        ("a", {"temperature": -1}, glm_jax.InputError, "temperature must be"),
    ],
)
def test_bad_requests_are_refused_before_the_first_event(messages, settings, error, complaint):
    with pytest.raises(error, match=complaint):
        ScriptedChat("a").stream(messages, **settings)


def test_a_conversation_longer_than_the_positions(tmp_path):
    chat = glm_jax.Chat(write_checkpoint(tmp_path / "hf"), mesh=glm_jax.make_mesh())
    with pytest.raises(glm_jax.InputError, match="exceed the model's 512 positions"):
        chat.stream("1 2 " * 300)


def test_parts_that_are_missing_or_do_not_belong_together(tmp_path):
    with pytest.raises(glm_jax.TextError, match="has 512 ids, the model 100: they do not belong"):
        Chat(Transformer(dataclasses.replace(CONFIG, vocab_size=100)), TEXT)
    with pytest.raises(glm_jax.CheckpointError, match="is not a directory"):
        glm_jax.Chat(tmp_path / "nothing")
    hf = write_checkpoint(tmp_path / "hf")
    for name, complaint in {
        "generation_config.json": "names no stop tokens",
        "chat_template.jinja": "has no chat template",
        "tokenizer.json": "has no tokenizer",
    }.items():
        (hf / name).unlink()
        with pytest.raises(glm_jax.TextError, match=complaint):
            glm_jax.Chat(hf)


def test_a_checkpoint_of_either_kind_answers_as_generate_does(tmp_path, one_device):
    hf = write_checkpoint(tmp_path / "hf")
    glm_jax.convert(hf, tmp_path / "orbax")
    model = glm_jax.load(hf, mesh=one_device)
    tokenizer = load_tokenizer(hf)
    prompt = tokenizer.encode("[gMASK]<sop><|user|>\nhi/nothink<|assistant|>\n<think></think>")
    (new,) = glm_jax.generate(model, [prompt], max_new_tokens=20)
    text = tokenizer.decode(new, skip_special=True).strip()
    assert text_directory(tmp_path / "orbax") == tmp_path / "orbax" / ASSETS
    for directory in (hf, tmp_path / "orbax"):
        reply = glm_jax.Chat(directory, mesh=one_device)("hi", thinking=False, max_new_tokens=20)
        assert (reply.content, reply.finish_reason) == (text, "length")
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 20)


def test_a_generation_stops_at_a_stop_token(tmp_path, one_device):
    model = glm_jax.load(write_checkpoint(tmp_path / "hf"), mesh=one_device)
    (new,) = glm_jax.generate(model, [[5, 6, 7]], max_new_tokens=20)
    generation = Generation(model, [5, 6, 7], Sampling(max_new_tokens=20, stop=(new[2],)))
    tokens = [token for batch in generation for token in batch]
    assert tokens == generation.tokens == new[: new.index(new[2]) + 1]
    assert generation.stopped and generation.usage.completion_tokens == len(tokens)
    assert generation.usage.prefill_seconds > 0


def test_settings_that_are_not_honoured_are_told_once(tmp_path):
    path = shutil.copytree(ROOT / "examples" / "demo_model", tmp_path / "model") / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.1}))
    chat = glm_jax.Chat(path.parent, layers="0:1")
    first, second = (chat("a", max_new_tokens=1).notes for _ in range(2))
    assert len(first) == 1 and "repetition_penalty 1.1" in first[0]
    assert second == ()
