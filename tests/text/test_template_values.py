"""What templates disagree on: content that is absent or in parts, arguments as text or object, tools, ids, switches."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from glm_jax.errors import TextError
from glm_jax.text import ChatTemplate, normalize_messages
from tests.text.checkpoints import THINK, write_deepseek, write_kimi
from tests.text.conversations import USER, WEATHER
from tests.text.templates import DEEPSEEK_TEXT, GENERATION, KIMI_IDS, asked_and_called, function_call


@pytest.fixture(scope="module")
def glm(demo) -> ChatTemplate:
    return ChatTemplate.load(demo)


@pytest.fixture(scope="module")
def reference(demo) -> Any:
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    return transformers.AutoTokenizer.from_pretrained(demo)


# -- content -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        "15°C, cloudy",
        ["15°C, ", "cloudy"],
        [{"type": "text", "text": "15°C, cloudy"}],
        [
            {"type": "text", "text": "15°C"},
            {"type": "input_text", "text": ", cloudy"},
            None,
            {"type": "text", "text": None},
        ],
        [{"text": "15°C, cloudy"}],
    ],
)
def test_a_result_in_parts_is_its_text(glm, result):
    rendered = glm.render(asked_and_called(None, "{}", result))
    assert "<|observation|>\n<tool_response>\n15°C, cloudy\n</tool_response>" in rendered
    assert "type" not in rendered and "None" not in rendered


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "u"}}, {"type": "tool_reference"}, 5])
def test_a_result_with_another_part_is_refused_by_name(glm, part):
    with pytest.raises(TextError, match=r"messages\[2\].content\[1\] is a part of type") as caught:
        glm.render(asked_and_called(None, "{}", [{"type": "text", "text": "a"}, part]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"temperature": 15}, 5, 1.5, True])
def test_content_of_another_type_is_refused(glm, content):
    with pytest.raises(TextError, match=r"messages\[2\].content must be text or a list of parts"):
        glm.render(asked_and_called(None, "{}", content))


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
FILTERS = (
    "{{ c }}",
    "{{ '' ~ c }}",
    "{{ '' + c }}",
    "{{ c | trim }}",
    "{{ c | string }}",
    "{{ c.strip() }}",
    "{{ c ~ '' }}",
)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize("use", FILTERS)
def test_content_under_every_role_and_filter(role, use):
    source = f"{{% for m in messages %}}{{% set c = m.content %}}[{use}]{{% endfor %}}"
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for content in ("x", PARTS, None)]
    messages.append({"role": role})
    messages.append({"role": "assistant", "content": None, "tool_calls": [function_call("{}")]})
    assert ChatTemplate(source).render(messages) == "[x][ab][][][]"


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_template_that_takes_parts_alone(role):
    source = (
        "{% for m in messages %}[{% for part in m.content %}{{ part['text'] }}{{ part.type }}{% endfor %}]{% endfor %}"
    )
    messages = [{"role": role, "content": content} for content in ("x", PARTS, None)]
    assert ChatTemplate(source).render(messages) == "[xtext][abtext][]"
    kinds = "{{ c is string }}{{ c | tojson }}{{ c ~ c[0] ~ c.split('b')[0] }}{{ 'a' in c }}{{ c | length }}"
    assert ChatTemplate("{% set c = messages[1].content %}" + kinds).render(messages) == 'True"ab"abaaTrue2'


def test_content_that_is_absent_beside_calls_is_none_and_text():
    source = "{{ m.content is none }} {{ m.content is not none }} {{ m.content == none }} {{ m.content is string }}"
    template = ChatTemplate("{% set m = messages[0] %}" + source)
    called = {"role": "assistant", "tool_calls": [function_call("{}")]}
    for message in (called, {**called, "content": None}):
        assert template.render([message]) == "True False True True"
    for message in ({**called, "content": ""}, {"role": "user", "content": ""}):
        assert template.render([message]) == "False True False True"


@pytest.mark.parametrize(
    "use",
    [
        "{{ c | first }}",
        "{{ c | join(' ') }}",
        "{% for x in c %}{{ x }}{% endfor %}",
        "{% for x in c | list %}{{ '' ~ x }}{% endfor %}",
        "{% for x in c %}{{ '' + x + '' }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("content", ["ab", PARTS])
def test_the_part_that_text_is_prints_as_the_text(use, content):
    template = ChatTemplate("{% set c = messages[0].content %}" + use)
    assert template.render([{"role": "tool", "content": content}]) == "ab"


def test_a_message_printed_whole_has_its_keys_in_order(reference):
    source = "{{ messages | tojson }}"
    for keys in (("role", "content", "tool_calls"), ("tool_calls", "content", "role"), ("content", "role")):
        values = {"role": "assistant", "content": "c", "tool_calls": [function_call({"a": 1})]}
        messages = [{key: values[key] for key in keys}]
        assert ChatTemplate(source).render(messages) == reference.apply_chat_template(
            messages, chat_template=source, tokenize=False
        )


@pytest.mark.parametrize(
    "use", ["{{ c }}", "{{ '' ~ c }}", "{{ c | string }}", "{{ c | trim }}", "{{ '' + c }}", "{{ c[1] }}"]
)
def test_other_parts_are_never_printed_as_python(use):
    content = [{"type": "text", "text": "a"}, {"type": "image", "image": "i"}]
    with pytest.raises(TextError, match=r"messages\[0\].content|can only concatenate"):
        ChatTemplate("{% set c = messages[0].content %}" + use).render([{"role": "user", "content": content}])


def test_thoughts_in_parts_are_thoughts(glm):
    parts = [{"type": "thinking", "thinking": "r1", "signature": "s"}, {"type": "text", "text": "a"}]
    rendered = glm.render([USER, {"role": "assistant", "content": parts}], add_generation_prompt=False)
    assert rendered.endswith("<|assistant|>\n<think>r1</think>\na")
    named = {"role": "assistant", "content": parts, "reasoning_content": "r2"}
    assert "<think>r2</think>\na" in glm.render([USER, named])
    (called,) = normalize_messages([{"role": "assistant", "content": parts[:1], "tool_calls": [function_call("{}")]}])
    assert (called["reasoning_content"], called["content"]) == ("r1", "")


def test_messages_are_normalised_once():
    messages = [*asked_and_called(PARTS, '"{}"', PARTS), {"role": "assistant", "reasoning": PARTS, "content": None}]
    before = copy.deepcopy(messages)
    ordered = normalize_messages(messages)
    assert messages == before and normalize_messages(ordered) == ordered
    assert [message["content"] for message in ordered] == ["w?", "ab", "ab", ""]
    assert ordered[3]["reasoning_content"] == "ab"


# -- arguments ---------------------------------------------------------------------------------------------------------

TEXT = '{"city":"Tōkyō", "n": 1}'


@pytest.mark.parametrize("content", [None, "", "Looking."])
@pytest.mark.parametrize("arguments", [TEXT, json.loads(TEXT), json.dumps(TEXT)])
def test_a_template_that_wants_arguments_as_text(reference, content, arguments):
    ours = ChatTemplate(DEEPSEEK_TEXT).render(asked_and_called(content, arguments))
    written = TEXT if not isinstance(arguments, dict) else '{"city": "Tōkyō", "n": 1}'
    messages = asked_and_called(content or "", written)
    assert ours == reference.apply_chat_template(
        messages, chat_template=DEEPSEEK_TEXT, tokenize=False, add_generation_prompt=True
    )


ARGUMENTS = ("{{ a }}", "{{ '' ~ a }}", "{{ '' + a }}", "{{ a + '' }}", "{{ a | string }}", "{{ '' ~ a ~ '' }}")


@pytest.mark.parametrize("use", ARGUMENTS)
def test_arguments_printed_are_the_clients_json(use):
    template = ChatTemplate("{% set a = messages[1].tool_calls[0].function.arguments %}" + use)
    assert template.render(asked_and_called(None, TEXT)) == TEXT
    assert template.render(asked_and_called(None, {"名": [1, None]})) == '{"名": [1, null]}'
    assert template.render(asked_and_called(None, "")) == template.render(asked_and_called(None, None)) == "{}"


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ("{{ a | tojson }}", '{"city": "Tōkyō", "n": 1}'),
        ("{{ a.city }}{{ a['n'] }}", "Tōkyō1"),
        ("{% for k, v in a.items() %}{{ k }}={{ v }};{% endfor %}", "city=Tōkyō;n=1;"),
        ("{{ a is mapping }}{{ a is string }}{{ a.items() | length }}", "TrueFalse2"),
        ("{{ a.strip() }}{{ a | length }}", TEXT + str(len(TEXT))),  # only text has strip
    ],
)
def test_arguments_used_as_an_object(use, expected):
    template = ChatTemplate("{% set a = messages[1].tool_calls[0].function.arguments %}" + use)
    assert template.render(asked_and_called(None, TEXT)) == expected


def test_an_argument_named_like_an_attribute_is_an_argument():
    template = ChatTemplate("{% set a = messages[1].tool_calls[0].function.arguments %}{{ a.text }}{{ a._text }}")
    assert template.render(asked_and_called(None, {"text": "x", "_text": "y"})) == "xy"


# -- tools -------------------------------------------------------------------------------------------------------------


def test_a_template_that_leaves_out_tools(tmp_path, demo):
    directory = write_deepseek(tmp_path / "r1", *THINK)
    own = ChatTemplate.load(directory).render([USER], tools=[WEATHER])
    (directory / "chat_template.jinja").write_text(DEEPSEEK_TEXT)
    template = ChatTemplate.load(directory)
    assert not template.declares_tools
    assert template.render([USER]) == "<｜User｜>hi<｜Assistant｜>"
    assert template.render([USER], tools=[WEATHER]) == own and "get_weather" in own
    for source in (DEEPSEEK_TEXT, "{% if tools is defined %}{{ messages[0].content }}{% endif %}"):
        with pytest.raises(TextError, match="chat template: leaves out the tools"):
            ChatTemplate(source).render([USER], tools=[WEATHER])
        assert "hi" in ChatTemplate(source).render([USER], tools=[])
    assert ChatTemplate.load(demo).declares_tools


# -- Kimi's ids --------------------------------------------------------------------------------------------------------


def calls(*made: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(made)}


def result(content: str, call_id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": content, **({} if call_id is None else {"tool_call_id": call_id})}


@pytest.mark.parametrize("own", [True, False], ids=["the package's template", "the checkpoint's"])
@pytest.mark.parametrize("foreign", ["call_abc", "functions_f_0", "0", "toolu_01", "functions.other:0"])
def test_foreign_ids_in_the_history(tmp_path, own, foreign):
    directory = write_kimi(tmp_path / "kimi")
    if not own:
        (directory / "chat_template.jinja").write_text(KIMI_IDS)
    messages = [
        USER, calls(function_call("{}", foreign, "f")), result("1", foreign), USER,
        calls(
            function_call("{}", "functions.g:1", "g"),
            function_call("{}", foreign, "h"),
            function_call("{}", None, "i"),
        ),
        result("2", foreign), result("3", "functions.g:1"), result("4"),
    ]  # fmt: skip
    before = copy.deepcopy(messages)
    rendered = ChatTemplate.load(directory).render(messages)
    assert messages == before and (foreign == "0" or foreign not in rendered)
    ids = ["functions.f:0", "functions.g:1", "functions.h:2", "functions.i:3"]
    written = [part.split("<|tool_call_argument_begin|>")[0] for part in rendered.split("<|tool_call_begin|>")[1:]]
    assert written == ids
    for call_id, text in zip(ids, "1324", strict=True):
        assert f"## Return of {call_id}\n{text}<|im_end|>" in rendered


def test_new_ids_are_never_those_of_other_calls():
    messages = [USER, calls(function_call("{}", "a", "f"), function_call("{}", "functions.f:0", "f"))]
    assert KIMI_IDS.count("<|tool_call_begin|>") == 1
    rendered = ChatTemplate(KIMI_IDS).render([*messages, result("A", "a"), result("B", "functions.f:0")])
    assert "Return of functions.f:1\nA" in rendered and "Return of functions.f:0\nB" in rendered


def test_results_of_calls_that_share_an_id_come_in_order():
    twice = [
        USER,
        calls(function_call("{}", "x", "f"), function_call("{}", "x", "g")),
        result("F", "x"),
        result("G", "x"),
    ]
    rendered = ChatTemplate(KIMI_IDS).render(twice)
    assert "functions.f:0\nF" in rendered and "functions.g:1\nG" in rendered


def test_other_families_keep_their_ids():
    source = "{{ messages[1].tool_calls[0].id }} {{ messages[2].tool_call_id }}"
    assert ChatTemplate(source).render(asked_and_called(None, "{}")) == "a a"


# -- generation --------------------------------------------------------------------------------------------------------


def test_generation_blocks_pass_and_their_spans_are_kept(reference):
    messages = [USER, {"role": "assistant", "content": "one", "end": True}, USER, {"role": "assistant", "content": ""}]
    template = ChatTemplate(GENERATION)
    rendered = template.render_prepared(template.prepare(messages, None, {}))
    theirs = reference.apply_chat_template(messages, chat_template=GENERATION, tokenize=False)
    assert rendered.text == template.render(messages) == theirs
    assert [rendered.text[start:end] for start, end in rendered.generation] == ["one<|endoftext|>", ""]
    tokens = reference.apply_chat_template(
        messages, chat_template=GENERATION, return_assistant_tokens_mask=True, return_dict=True
    )
    taught = [i for i, on in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if on]
    start, end = rendered.generation[0]
    assert reference.decode(taught) == rendered.text[start:end]


# -- switches ----------------------------------------------------------------------------------------------------------


def test_switches_that_a_template_lacks_are_named(glm):
    names = ["enable_thinking", "clear_thinking", "reasoning_effort", "tools"]
    assert glm.unread(names) == ("clear_thinking", "reasoning_effort")
    assert ChatTemplate("{{ thinking }}{{ clear_thinking }}").unread(names) == ("reasoning_effort", "tools")
    assert ChatTemplate("x").unread(names) == tuple(names)


def test_switches_reach_the_template():
    source = "{{ enable_thinking }} {{ thinking }} {{ clear_thinking }} {{ reasoning_effort }}"
    rendered = ChatTemplate(source).render([USER], enable_thinking=False, clear_thinking=False, reasoning_effort="high")
    assert rendered == "False False False high"
    kept = (
        "{% for m in messages %}{% if clear_thinking is defined and not clear_thinking %}<think>"
        "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{% endfor %}"
    )
    turns = [{"role": "assistant", "content": f"a{i}", "reasoning_content": f"r{i}"} for i in (1, 2)]
    assert ChatTemplate(kept).render(turns) == "a1a2"
    assert ChatTemplate(kept).render(turns, clear_thinking=False) == "<think>r1</think>a1<think>r2</think>a2"
