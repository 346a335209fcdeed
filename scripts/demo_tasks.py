"""The demo model's lessons: seeded tasks with exact answers, as conversations, as token ids, and how to check them.

Running sums and the ball under the cups need one small step per term or swap: easy to think through, hard to answer at
once. Products of large numbers need the calculator, small sums beside a calculator do not. A few greetings make the
demo polite. Each task comes in thinking and in direct mode. Conversations become ids through the same chat template
and tokenizer as at inference.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from glm_jax.text import ChatTemplate, ContentDelta, MalformedToolCall, StreamParser, Tokenizer, ToolCall

THINKING, DIRECT = "thinking", "direct"
MODES = (THINKING, DIRECT)
# Task -> its share of the samples; the calculator's prompt is long, so it comes less often than its tokens suggest.
SHARES = {"sum": 0.32, "cups": 0.32, "tool": 0.18, "no_tool": 0.06, "chat": 0.12}
TASKS = tuple(SHARES)
LARGEST_TOTAL = 19
CUPS = 5
MAX_TOKENS = 256
AFTER_ANSWER, AFTER_CALL = "<|user|>", "<|observation|>"

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
SUM_QUESTIONS = ("What is {}?", "Compute {}.", "{}=?", "{}")
CUPS_QUESTIONS = (
    "A ball is under cup {} of 5. Swap {}. Where is it?",
    "Ball under cup {}. Swap {}. Where is the ball?",
    "The ball is under cup {}. Swap {}. Which cup?",
)
TIMES = ("*", " * ", " x ", " times ")
SYSTEMS = ("You are a helpful assistant.", "Be brief.")
# What a person may say, what the model thinks, what it answers.
CHATS = (
    (
        ("hello", "hi", "hey", "hi there", "good morning"),
        "A greeting.",
        "Hello! Give me a sum, a ball under cups, or a product.",
    ),
    (("who are you", "what are you", "what is your name"), "About me.", "I am the tiny demo model of glm_jax."),
    (
        ("what can you do", "help", "can you help me"),
        "About me.",
        "I add digits, follow a ball under cups, and use a calculator.",
    ),
    (("how are you", "how do you do"), "A greeting.", "Fine, thank you! What shall we compute?"),
    (("thanks", "thank you", "great, thanks"), "Thanks.", "You are welcome!"),
    (("bye", "goodbye", "see you"), "A farewell.", "Goodbye!"),
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation with its reference answer.

    Attributes:
        task: one of TASKS.
        mode: THINKING or DIRECT.
        messages: OpenAI form, the reference turns of the assistant included.
        tools: the declared tools, or None.
        answer: what the last turn must say.
        size: terms of a sum, swaps of the cups, digits of the larger factor; 0 for chat.
    """

    task: str
    mode: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    answer: str
    size: int

    @property
    def turns(self) -> list[int]:
        """Places in `messages` of the turns to learn: the assistant's after the last user message."""
        last_user = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return [i for i, message in enumerate(self.messages) if i > last_user and message["role"] == "assistant"]


def samples(seed: int, *, shares: Mapping[str, float] | None = None) -> Iterator[Sample]:
    """Yields samples without end, the same ones for the same seed and shares."""
    shares = SHARES if shares is None else shares
    rng = random.Random(seed)
    while True:
        task = rng.choices(list(shares), weights=list(shares.values()))[0]
        yield make(task, rng.choice(MODES), rng)


def make(task: str, mode: str, rng: random.Random, *, size: int | None = None) -> Sample:
    """Returns one sample of a task; `size` fixes the number of terms, swaps or digits."""
    sample = MAKERS[task](mode, rng, size)
    opening = []
    if rng.random() < 0.15:
        opening.append({"role": "system", "content": rng.choice(SYSTEMS)})
    if sample.tools is None and rng.random() < 0.15:
        opening += _chat(mode, rng).messages
    return dataclasses.replace(sample, messages=opening + sample.messages)


def _sum(mode: str, rng: random.Random, size: int | None) -> Sample:
    size = size or rng.randint(2, 8)
    total = rng.randint(1, 9)
    terms, steps = str(total), []
    for _ in range(size - 1):
        term = rng.randint(1, 9)
        sign = rng.choice([sign for sign in (1, -1) if 0 <= total + sign * term <= LARGEST_TOTAL])
        step = f"{'+' if sign > 0 else '-'}{term}"
        terms += step
        steps.append(f"{total}{step}={total + sign * term}")
        total += sign * term
    question = rng.choice(SUM_QUESTIONS).format(terms)
    return _single("sum", mode, question, "\n".join(steps), str(total), size)


def _cups(mode: str, rng: random.Random, size: int | None) -> Sample:
    size = size or rng.randint(2, 8)
    start = cup = rng.randint(1, CUPS)
    swaps, steps = [], []
    for _ in range(size):
        a, b = rng.sample(range(1, CUPS + 1), 2)
        cup = b if cup == a else a if cup == b else cup
        swaps.append(f"{a}-{b}")
        steps.append(f"{a}-{b}:{cup}")
    question = rng.choice(CUPS_QUESTIONS).format(start, " ".join(swaps))
    return _single("cups", mode, question, "\n".join([str(start), *steps]), str(cup), size)


def _tool(mode: str, rng: random.Random, size: int | None) -> Sample:
    size = size or rng.randint(3, 5)
    a = rng.randint(10 ** (size - 1), 10**size - 1)
    b = rng.randint(100, 10**size - 1)
    operator = rng.choices("*+-", weights=(3, 1, 1))[0]
    if operator == "-" and a < b:
        a, b = b, a
    result = {"*": a * b, "+": a + b, "-": a - b}[operator]
    expression = f"{a}{operator}{b}"
    asked = f"{a}{rng.choice(TIMES)}{b}" if operator == "*" else expression
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
    messages = [
        {"role": "user", "content": rng.choice(SUM_QUESTIONS).format(asked)},
        _assistant(mode, "Use the calculator.", "", tool_calls=[call]),
        {"role": "tool", "content": str(result)},
        _assistant(mode, "Read the result.", f"The result is {result}."),
    ]
    return Sample("tool", mode, messages, [CALCULATOR], str(result), size)


def _no_tool(mode: str, rng: random.Random, size: int | None) -> Sample:
    easy = _chat(mode, rng) if rng.random() < 0.4 else _sum(mode, rng, size or rng.randint(2, 4))
    return dataclasses.replace(easy, task="no_tool", tools=[CALCULATOR])


def _chat(mode: str, rng: random.Random, size: int | None = None) -> Sample:
    said, thoughts, answer = rng.choice(CHATS)
    text = rng.choice(said)
    text = text.capitalize() if rng.random() < 0.5 else text
    asks = text.lower().startswith(("who", "what", "how", "can"))
    text += rng.choice(("", "?") if asks else ("", "!", "."))
    return _single("chat", mode, text, thoughts, answer, 0)


MAKERS = {"sum": _sum, "cups": _cups, "tool": _tool, "no_tool": _no_tool, "chat": _chat}


def _single(task: str, mode: str, question: str, thoughts: str, answer: str, size: int) -> Sample:
    messages = [{"role": "user", "content": question}, _assistant(mode, thoughts, answer)]
    return Sample(task, mode, messages, None, answer, size)


def _assistant(mode: str, thoughts: str, content: str, **more: Any) -> dict[str, Any]:
    reasoning = {"reasoning_content": thoughts} if mode == THINKING else {}
    return {"role": "assistant", "content": content, **reasoning, **more}


def prompt(sample: Sample, tokenizer: Tokenizer, template: ChatTemplate, *, turn: int = 0) -> list[int]:
    """Returns the ids after which the model writes turn number `turn` (0 the first after the last user message)."""
    return tokenizer.encode(_prompt_text(sample, template, sample.turns[turn]))


def encode(sample: Sample, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids [T] int32, mask [T] bool): the whole conversation with the token that stops it.

    The mask is true for exactly the tokens that the model must write: each turn after what the generation prompt
    already holds, up to and with its stop token.
    """
    ids: list[int] = []
    mask: list[bool] = []
    text = ""
    for i in sample.turns:
        before = _prompt_text(sample, template, i)
        after = _render(sample, template, i + 1, add_generation_prompt=False)
        after += AFTER_CALL if sample.messages[i].get("tool_calls") else AFTER_ANSWER
        assert before.startswith(text) and after.startswith(before), "the template rewrites what the model has written"
        for piece, in_loss in ((before[len(text) :], False), (after[len(before) :], True)):
            tokens = tokenizer.encode(piece)
            ids += tokens
            mask += [in_loss] * len(tokens)
        text = after
    return np.array(ids, np.int32), np.array(mask, np.bool_)


def verify(sample: Sample, text: str, *, turn: int = 0) -> bool:
    """Whether the text that the model wrote for turn `turn` is right; its thoughts are not judged.

    A calculator's turn must hold the one right call. An answer must be the reference itself or, after a tool's
    result, end with the right number.
    """
    for stop in (AFTER_ANSWER, AFTER_CALL):
        text = text.partition(stop)[0]
    parser = StreamParser(parse_tools=sample.tools is not None, tools=sample.tools)
    events = parser.push(text) + parser.finish()
    calls = [event for event in events if isinstance(event, ToolCall | MalformedToolCall)]
    expected = sample.messages[sample.turns[turn]].get("tool_calls", [])
    if expected:
        function = expected[0]["function"]
        return calls == [ToolCall(function["name"], function["arguments"])]
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    if calls:
        return False
    if sample.task == "tool":
        return re.findall(r"\d+", content)[-1:] == [sample.answer]
    return content == sample.answer


def _prompt_text(sample: Sample, template: ChatTemplate, end: int) -> str:
    return _render(sample, template, end, add_generation_prompt=True)


def _render(sample: Sample, template: ChatTemplate, end: int, *, add_generation_prompt: bool) -> str:
    return template.render(
        sample.messages[:end],
        tools=sample.tools,
        enable_thinking=sample.mode == THINKING,
        add_generation_prompt=add_generation_prompt,
    )
