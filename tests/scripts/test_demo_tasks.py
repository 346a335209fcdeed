"""The demo's lessons: exact, reproducible, short, and masked to what the model must write."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from glm_jax.text import ChatTemplate, GenerationDefaults, load_tokenizer
from scripts import demo_tasks, demo_tokenizer
from scripts.demo_tasks import DIRECT, MODES, TASKS, THINKING, Sample
from tests.conventions.tree import ROOT


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    demo_tokenizer.build(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(demo):
    return load_tokenizer(demo)


@pytest.fixture(scope="module")
def template(demo):
    return ChatTemplate.load(demo)


@pytest.fixture(scope="module")
def many() -> list[Sample]:
    return list(itertools.islice(demo_tasks.samples(11), 600))


def written(sample: Sample, turn: int) -> dict:
    return sample.messages[sample.turns[turn]]


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of every stretch of true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def test_the_same_seed_gives_the_same_samples(many):
    assert list(itertools.islice(demo_tasks.samples(11), 600)) == many
    assert list(itertools.islice(demo_tasks.samples(12), 600)) != many
    assert {(sample.task, sample.mode) for sample in many} == set(itertools.product(TASKS, MODES))
    assert {sample.task for sample in itertools.islice(demo_tasks.samples(1, shares={"cups": 1}), 20)} == {"cups"}


def test_the_answers_are_right(many):
    for sample in many:
        question = next(m["content"] for m in reversed(sample.messages) if m["role"] == "user")
        if sample.task == "sum":
            terms = re.search(r"[\d+-]+", question)[0]
            assert eval(terms) == int(sample.answer)
            assert len(re.findall(r"\d", terms)) == sample.size
        elif sample.task == "cups":
            cup = re.search(r"cup (\d)", question)[1]
            swaps = re.findall(r"(\d)-(\d)", question)
            for a, b in swaps:
                cup = {a: b, b: a}.get(cup, cup)
            assert cup == sample.answer and len(swaps) == sample.size
        elif sample.task == "tool":
            a, operator, b = re.search(r"(\d+)\s*(\*|x|times|\+|-)\s*(\d+)", question).groups()
            expression = written(sample, 0)["tool_calls"][0]["function"]["arguments"]["expression"]
            assert expression == a + operator.replace("x", "*").replace("times", "*") + b
            assert eval(expression) == int(sample.answer) >= 0
        assert sample.answer in written(sample, -1)["content"]


def test_the_thoughts_take_one_step_at_a_time(many):
    for sample in many:
        thoughts = written(sample, 0).get("reasoning_content")
        assert (thoughts is not None) == (sample.mode == THINKING)
        if sample.mode == THINKING and sample.task == "sum":
            steps = [step.split("=") for step in thoughts.split("\n")]
            assert len(steps) == sample.size - 1
            assert all(eval(left) == int(right) for left, right in steps)
            assert steps[-1][1] == sample.answer
        if sample.mode == THINKING and sample.task == "cups":
            assert len(thoughts.split("\n")) == sample.size + 1
            assert thoughts.endswith(sample.answer)


def test_samples_fit(many, tokenizer, template):
    sizes = {"tool": 5, "cups": 8, "sum": 8}
    longest = [
        demo_tasks.make(task, mode, random.Random(i), size=size)
        for task, size in sizes.items()
        for mode in MODES
        for i in range(40)
    ]
    lengths = [len(demo_tasks.encode(sample, tokenizer, template)[0]) for sample in [*many, *longest]]
    assert max(lengths) <= demo_tasks.MAX_TOKENS
    assert np.mean(lengths[: len(many)]) < 110


def test_the_ids_are_those_of_the_whole_conversation(many, tokenizer, template):
    for sample in many[:200]:
        ids, mask = demo_tasks.encode(sample, tokenizer, template)
        assert ids.dtype == np.int32 and mask.dtype == np.bool_ and ids.shape == mask.shape
        text = template.render(
            sample.messages,
            tools=sample.tools,
            enable_thinking=sample.mode == THINKING,
            add_generation_prompt=False,
        )
        assert ids.tolist() == tokenizer.encode(text + "<|user|>")


def test_the_mask_is_what_the_model_writes_after_the_prompt(many, tokenizer, template, demo):
    stops = GenerationDefaults.load(demo).stop_ids
    for sample in many[:200]:
        ids, mask = demo_tasks.encode(sample, tokenizer, template)
        stretches = runs(mask)
        assert len(stretches) == len(sample.turns)
        for turn, (start, end) in enumerate(stretches):
            assert ids[:start].tolist() == demo_tasks.prompt(sample, tokenizer, template, turn=turn)
            assert ids[end - 1] in stops and not set(ids[start : end - 1].tolist()) & set(stops)
            assert demo_tasks.verify(sample, tokenizer.decode(ids[start : end - 1].tolist()), turn=turn)
            assert demo_tasks.verify(sample, tokenizer.decode(ids[start:end].tolist()), turn=turn)


def test_what_is_learnt_in_full(tokenizer, template):
    def trained_text(sample: Sample) -> list[str]:
        ids, mask = demo_tasks.encode(sample, tokenizer, template)
        return [tokenizer.decode(ids[start:end].tolist()) for start, end in runs(mask)]

    (text,) = trained_text(demo_tasks.make("sum", THINKING, random.Random(0), size=3))
    assert re.fullmatch(r"\n<think>\d+[+-]\d=\d+\n\d+[+-]\d=\d+</think>\n\d+<\|user\|>", text)
    (text,) = trained_text(demo_tasks.make("cups", DIRECT, random.Random(0)))
    assert re.fullmatch(r"\n\d<\|user\|>", text)
    call, answer = trained_text(demo_tasks.make("tool", DIRECT, random.Random(0)))
    assert call.startswith("\n<tool_call>calculator\n") and call.endswith("</tool_call><|observation|>")
    assert re.fullmatch(r"\nThe result is \d+\.<\|user\|>", answer)


@pytest.mark.parametrize(
    ("task", "turn", "text"),
    [
        ("sum", 0, ""),
        ("sum", 0, "\n{answer}1"),
        ("sum", 0, "\n<think>{answer}"),
        ("sum", 0, "\n<tool_call>calculator\n</tool_call>"),
        ("cups", 0, "\n0"),
        ("tool", 0, "\n{answer}"),
        ("tool", 0, "\n<tool_call>calculator\n<arg_key>expression</arg_key>\n<arg_value>1+1</arg_value>\n</tool_call>"),
        ("tool", 1, "\nThe result is {answer}0."),
        ("no_tool", 0, "\n<tool_call>calculator\n</tool_call>\n{answer}"),
        ("chat", 0, "\nno"),
    ],
)
def test_wrong_answers_are_wrong(task, turn, text):
    sample = demo_tasks.make(task, DIRECT, random.Random(5))
    assert not demo_tasks.verify(sample, text.format(answer=sample.answer), turn=turn)


def test_a_right_answer_may_come_with_any_thoughts():
    sample = demo_tasks.make("cups", THINKING, random.Random(5))
    assert demo_tasks.verify(sample, f"\n<think>hm</think>\n{sample.answer}<|user|>\nmore")
    sample = dataclasses.replace(sample, mode=DIRECT)
    assert demo_tasks.verify(sample, f"\n{sample.answer}")


def test_earlier_turns_are_not_learnt(many):
    longer = [sample for sample in many if sum(m["role"] == "user" for m in sample.messages) > 1]
    assert longer
    for sample in longer:
        assert len(sample.turns) == 1 and sample.turns[0] == len(sample.messages) - 1


def test_the_tokenizer_is_the_same_in_every_process(demo, tmp_path):
    command = [sys.executable, "-m", "scripts.demo_tokenizer", str(tmp_path / "demo")]
    subprocess.run(
        command, cwd=ROOT, check=True, env={"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3", "PYTHONPATH": "."}
    )
    names = sorted(path.name for path in demo.iterdir())
    assert names == ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "demo" / name).read_bytes() == (demo / name).read_bytes()


def test_the_bundled_files_are_those_that_the_script_writes(demo):
    for path in demo.iterdir():
        assert (ROOT / "examples" / "demo_model" / path.name).read_bytes() == path.read_bytes(), "build it again"
