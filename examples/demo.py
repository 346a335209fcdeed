"""What glm_jax does, in a minute on a CPU: convert, load, think, answer, call a tool, and how fast it is.

    make demo        or, with glm_jax installed, python examples/demo.py [DIRECTORY OF A HUGGING FACE CHECKPOINT]

The bundled model is small and has the architecture of GLM-4.5. It has learnt three things: running sums of digits,
where a ball is after cups were swapped, and when to ask a calculator.
"""

from __future__ import annotations

import operator
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

import glm_jax
from glm_jax.inference import Sampling
from glm_jax.serving import ChatEvent, Finished, Generation, Reply, collect
from glm_jax.sharding import describe
from glm_jax.text import ReasoningDelta, ToolCall

BUNDLED = Path(__file__).with_name("demo_model")
CUPS = "A ball is under cup 2 of 5. Swap 3-5 5-1 3-5 3-2 1-2 3-4. Where is it?"  # 2 2 2 2 3 3 4
PRODUCT = "What is 4821*377?"
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
NEW_TOKENS = 128
DIM, PLAIN = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("", "")


def main(checkpoint: Path = BUNDLED) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        headline("Convert from Hugging Face to Orbax")
        report = glm_jax.convert(checkpoint, Path(scratch, "orbax"))
        print(f"{report.tensors} tensors, {report.nbytes / 1e6:.1f} MB in {report.seconds:.1f} s")

        headline("Load onto a mesh")
        chat = glm_jax.Chat(Path(scratch, "orbax"))
        counts = glm_jax.count_parameters(chat.model.config)
        print(f"{counts.total:,} parameters, {counts.active:,} of them active for a token")
        print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {describe(chat.model.mesh)}")

    headline(f"Think, then answer: {CUPS}")
    show(chat.stream(CUPS, max_new_tokens=NEW_TOKENS, temperature=0))
    headline(f"Answer at once: {CUPS}")
    show(chat.stream(CUPS, thinking=False, max_new_tokens=NEW_TOKENS, temperature=0))
    print("(cup 4 is right)")

    headline(f"Call a tool: {PRODUCT}")
    messages = [{"role": "user", "content": PRODUCT}]
    settings = {"tools": [CALCULATOR], "max_new_tokens": NEW_TOKENS, "temperature": 0}
    reply = show(chat.stream(messages, **settings))
    if reply.finish_reason == "tool_calls":
        results = [{"role": "tool", "content": calculate(call)} for call in reply.tool_calls]
        print("calculator:", *(result["content"] for result in results))
        show(chat.stream([*messages, reply.message, *results], **settings))

    headline("Speed of one sequence, compiled before")
    prompt = [token % chat.model.config.vocab_size for token in range(192)]
    for _ in range(2):  # the first time compiles
        generation = Generation(chat.model, prompt, Sampling(max_new_tokens=NEW_TOKENS))
        list(generation)
    usage = generation.usage
    print(f"prefill {usage.prefill_tokens_per_second:,.0f} tokens/s over {usage.prompt_tokens} tokens")
    print(f"decode  {usage.decode_tokens_per_second:,.0f} tokens/s over {usage.completion_tokens} tokens")


def headline(text: str) -> None:
    print(f"\n== {text}")


def show(events: Iterator[ChatEvent]) -> Reply:
    """Print an answer as it comes, the thoughts dim; returns it whole."""

    def printed() -> Iterator[ChatEvent]:
        last: type = Finished
        for event in events:
            print("\n" * (last not in (type(event), Finished)), end="")
            if isinstance(event, ToolCall):
                print(f"{event.name}({event.arguments})", end="")
            elif isinstance(event, ReasoningDelta):
                print(f"{DIM}{event.text}{PLAIN}", end="", flush=True)
            elif not isinstance(event, Finished):
                print(event.text, end="", flush=True)
            last = type(event)
            yield event

    return collect(printed())


def calculate(call: ToolCall) -> str:
    """What the calculator says to an expression like 12*34."""
    expression = re.fullmatch(r"(\d+)([*+-])(\d+)", str(call.arguments.get("expression")))
    if expression is None:
        return "error: not of the form 12*34"
    operators = {"*": operator.mul, "+": operator.add, "-": operator.sub}
    return str(operators[expression[2]](int(expression[1]), int(expression[3])))


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except glm_jax.Error as error:
        sys.exit(f"demo: {error}")
