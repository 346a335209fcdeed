"""The chat template: golden strings, equality with transformers, messages put in order, errors."""

from __future__ import annotations

import copy
import json

import pytest

from glm_jax.errors import TextError
from glm_jax.text import ChatTemplate, normalize_messages
from tests.text.conversations import CONVERSATIONS, NO_ARGUMENTS, USER, WEATHER, call, tool_loop

TOOLS_BEFORE = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_AFTER = (
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
    "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>"
)
CALLS_AND_RESULTS = (
    "<think>think</think>\nCalling.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n"
    "<arg_key>n</arg_key>\n<arg_value>3</arg_value>\n<arg_key>flag</arg_key>\n<arg_value>true</arg_value>\n"
    '<arg_key>o</arg_key>\n<arg_value>{"a": [1]}</arg_value>\n</tool_call>\n<tool_call>noargs\n</tool_call>'
    "<|observation|>\n<tool_response>\nT1\n</tool_response>\n<tool_response>\nT2\n</tool_response>"
)


@pytest.fixture(scope="module")
def template(demo) -> ChatTemplate:
    return ChatTemplate.load(demo)


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([USER], {}, "<|user|>\nhi<|assistant|>"),
        ([USER], {"enable_thinking": True}, "<|user|>\nhi<|assistant|>"),
        ([USER], {"enable_thinking": False}, "<|user|>\nhi/nothink<|assistant|>\n<think></think>"),
        ([USER], {"add_generation_prompt": False}, "<|user|>\nhi"),
        (CONVERSATIONS["system"], {}, "<|system|>\nS<|user|>\nhi<|assistant|>"),
        (
            CONVERSATIONS["thoughts in content"],
            {"add_generation_prompt": False},
            "<|user|>\nq1<|assistant|>\n<think></think>\na1<|user|>\nq2<|assistant|>\n<think>r2</think>\na2",
        ),
        (tool_loop(), {}, f"<|user|>\nhi<|assistant|>\n{CALLS_AND_RESULTS}<|assistant|>"),
        ([], {"add_generation_prompt": False}, ""),
        (
            CONVERSATIONS["thoughts in the last content"],
            {"add_generation_prompt": False},
            "<|user|>\nhi<|assistant|>\n<think>r</think>\nend",
        ),
        (
            CONVERSATIONS["nothink already"],
            {"enable_thinking": False},
            "<|user|>\nq/nothink<|assistant|>\n<think></think>\na<|user|>\nhi/nothink<|assistant|>\n<think></think>",
        ),
        (
            CONVERSATIONS["parts"],
            {"add_generation_prompt": False},
            "<|system|>\nAB<|user|>\nCD<|assistant|>\n<think></think>\nE",
        ),
        (
            CONVERSATIONS["tool list"],
            {},
            "<|user|>\nhi<|observation|>\n<tool_response>\nO1\n</tool_response>\n<tool_response>\nplain\n</tool_response>"
            "\n<tool_response>\n7\n</tool_response><|assistant|>",
        ),
        (
            CONVERSATIONS["flat calls"],
            {},
            "<|user|>\nhi<|assistant|>\n<think></think>\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>null</arg_value>"
            "\n</tool_call><|assistant|>",
        ),
    ],
)
def test_golden_strings(template, messages, options, expected):
    assert template.render(messages, **options) == "[gMASK]<sop>" + expected


def test_tools_stand_in_a_system_block_of_their_own_before_the_system_message(template):
    rendered = template.render(CONVERSATIONS["system"], tools=[WEATHER, NO_ARGUMENTS])
    lines = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in (WEATHER, NO_ARGUMENTS))
    assert rendered == f"[gMASK]<sop>{TOOLS_BEFORE}{lines}{TOOLS_AFTER}<|system|>\nS<|user|>\nhi<|assistant|>"


def test_thoughts_are_kept_after_the_last_user_message_and_dropped_before_it(template):
    assert "<think>think</think>" in template.render(CONVERSATIONS["tool loop, answered"])
    assert "<think>after</think>" in template.render(CONVERSATIONS["tool loop, answered"])
    assert "<think>think</think>" not in template.render(CONVERSATIONS["tool loop, then a user"])


@pytest.fixture(scope="module")
def reference(demo):
    """The same directory, loaded by transformers."""
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    return transformers.AutoTokenizer.from_pretrained(demo)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("tools", [None, [], [WEATHER, NO_ARGUMENTS]], ids=["none", "empty", "two"])
def test_equal_to_transformers(template, reference, name, thinking, tools):
    messages = CONVERSATIONS[name]
    options = {} if thinking is None else {"enable_thinking": thinking}
    for generate in (True, False):
        ours = template.render(messages, tools=tools, enable_thinking=thinking, add_generation_prompt=generate)
        theirs = reference.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generate, tokenize=False, **options
        )
        assert ours == theirs


# Constructs of published templates, in templates of our own, to compare the environment with transformers'.
CONSTRUCTS = """{%- for m in messages %}
    {%- if m.role == 'tool' %}{% continue %}{% endif %}
    {{ bos_token }}{{ m['role'] }}: {{ m.content | tojson }} {{ m.content | trim | upper }}
    {% if loop.index0 == 3 %}{% break %}{% endif %}
{% endfor %}
{% set ns = namespace(n=0) %}{% for t in tools or [] %}{% set ns.n = ns.n + 1 %}
{{ t | tojson(indent=2) }}{{ t | tojson(sort_keys=true, separators=(',', ':')) }}{{ t | tojson(ensure_ascii=True) }}
{% endfor %}
{{ ns.n }} {{ add_generation_prompt }} {{ flavour | default('plain') }} {{ documents is defined }} {{ eos_token[::-1] }}
{{ "%s-%d" | format("a", 3) }} {{ messages[0].content.split('i')[-1] }} {{ messages[0].get('x', 'none') }}"""


def test_the_environment_equals_that_of_transformers(demo, reference, tmp_path):
    config = json.loads((demo / "tokenizer_config.json").read_text()) | {"bos_token": {"content": "<sop>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CONSTRUCTS}))
    ours = ChatTemplate.load(tmp_path).render(CONVERSATIONS["markup and scripts"], tools=[WEATHER], flavour="x<y")
    theirs = reference.apply_chat_template(
        CONVERSATIONS["markup and scripts"],
        tools=[WEATHER],
        chat_template=CONSTRUCTS,
        tokenize=False,
        add_generation_prompt=True,
        bos_token="<sop>",
        flavour="x<y",
    )
    assert ours == theirs


def test_messages_are_put_in_order_without_changing_the_callers():
    messages = [
        {"role": "system", "content": None},
        {"role": "user"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "r",
            "tool_calls": [call("f", '{"a": "b"}'), call("g", "")],
        },
        {"role": "assistant", "content": "x", "tool_calls": [], "reasoning_content": None},
    ]
    before = copy.deepcopy(messages)
    ordered = normalize_messages(messages)
    assert messages == before
    assert [message["content"] for message in ordered] == ["", "", None, "x"]
    assert [c["function"]["arguments"] for c in ordered[2]["tool_calls"]] == [{"a": "b"}, {}]
    assert ordered[2]["reasoning_content"] == "r"
    assert ordered[3] == {"role": "assistant", "content": "x"}
    assert normalize_messages(ordered) == ordered


def test_content_none_prints_nothing_and_can_be_tested_for(template):
    assert "None" not in template.render(CONVERSATIONS["none"])
    source = "{% for m in messages %}[{{ m.content }}{{ 'none' if m.content is none }}]{% endfor %}"
    assert ChatTemplate(source).render(CONVERSATIONS["none"]) == "[hi][none]"


def test_rendering_leaves_the_callers_messages_alone(template):
    messages = tool_loop()
    messages[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "x"}'
    before = copy.deepcopy(messages)
    assert "<arg_value>x</arg_value>" in template.render(messages, tools=[WEATHER])
    assert messages == before


def test_variables_reach_the_template_and_cannot_replace_the_messages():
    source = "{{ messages | length }}{{ flavour }}"
    assert ChatTemplate(source).render([USER], flavour="x", **{"messages": []}) == "1x"


def test_a_list_of_named_templates(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=[WEATHER]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file {{ tools | length }}")
    assert ChatTemplate.load(tmp_path).render([USER], tools=[WEATHER]) == "file 1"
    with pytest.raises(TextError, match=r'no template named "default" \(it has: other\)'):
        ChatTemplate({"other": "x"}).render([USER])


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("hi", "messages must be a list"),
        ({"role": "user", "content": "hi"}, "messages must be a list"),
        (None, "not None"),
        (["hi"], r"messages\[0\] must be a dict"),
        ([USER, {"content": "x"}], r'messages\[1\] has no "role"'),
        ([USER, {"role": "assistant", "tool_calls": "f"}], r"messages\[1\].tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [3]}], r"tool_calls\[0\] must be a dict"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], r'tool_calls\[0\].function has no "name"'),
        ([{"role": "assistant", "tool_calls": [call("f", '{"a": ')]}], "arguments is not a JSON object"),
        ([{"role": "assistant", "tool_calls": [call("f", "[1]")]}], "must be a JSON object, not a list"),
        ([{"role": "assistant", "tool_calls": [call("f", 5)]}], "must be a JSON object, not a int"),
        ([{"role": "assistant", "tool_calls": [call("f", {"a": {1}})]}], "arguments has a value that is not JSON"),
        ([{"role": "wizard", "content": "x"}], "refuses these messages: no role is named 'wizard'"),
    ],
)
def test_messages_of_the_wrong_form(template, messages, fault):
    with pytest.raises(TextError, match=fault) as caught:
        template.render(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tools", ["f", {"type": "function"}, ["f"], 3])
def test_tools_of_the_wrong_form(template, tools):
    with pytest.raises(TextError, match="tools"):
        template.render([USER], tools=tools)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("line\n{% if %}", "chat_template.jinja, line 2: Expected an expression"),
        ("{% for x in y %}", "chat_template.jinja, line 1"),
        ("{{ 'a", "chat_template.jinja, line 1"),
        ("a\n{{ raise_exception('no ' + messages[0].role) }}", "refuses these messages: no user"),
        ("{{ messages.append(1) }}", "does what a template may not"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does what a template may not"),
        ("a\n{{ messages[0].content + 1 }}", "line 2: fails on these messages: can only concatenate"),
        ("a\nb\n{{ absent.x }}", "line 3: fails on these messages: 'absent' is undefined"),
        ("{{ range(10000000) | list }}", "fails on these messages: Range too big"),
        ("{{ absent | tojson }}", "fails on these messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (b"\xff\xfe\xfa", "is not UTF-8"),
    ],
)
def test_broken_templates(tmp_path, source, fault):
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    with pytest.raises(TextError, match=fault) as caught:
        ChatTemplate.load(tmp_path).render([USER])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_directories(tmp_path):
    with pytest.raises(TextError, match=r"looked for chat_template.jinja and the key chat_template"):
        ChatTemplate.load(tmp_path)
    with pytest.raises(TextError, match="is not a directory"):
        ChatTemplate.load(tmp_path / "absent")
    for config in (
        '{"chat_template": 3}',
        '{"chat_template": [{"name": "x"}]}',
        '{"chat_template": []}',
        "[]",
        "",
        "{",
    ):
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(TextError, match=r"tokenizer_config.json: "):
            ChatTemplate.load(tmp_path)
