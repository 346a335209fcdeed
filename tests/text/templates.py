"""Chat templates in the manner of published ones, written for these tests, and conversations for them."""

from __future__ import annotations

from typing import Any

# DeepSeek-V3 and R1: no word of tools, content and arguments joined as text, the two cases of content told by `none`.
DEEPSEEK_TEXT = """{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] }}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ '<｜User｜>' + message['content'] }}{%- endif -%}
{%- if message['role'] == 'assistant' and 'tool_calls' in message -%}
{%- for tool in message['tool_calls'] -%}
{%- if message['content'] is none -%}{{ '<｜Assistant｜>' }}
{%- else -%}{{ '<｜Assistant｜>' + message['content'] }}{%- endif -%}
{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' }}
{{- '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜><｜tool▁calls▁end｜>' }}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' and 'tool_calls' not in message -%}
{%- set content = message['content'] -%}{%- if '</think>' in content -%}
{%- set content = content.split('</think>')[-1] -%}{%- endif -%}{{ '<｜Assistant｜>' + content }}
{%- endif -%}
{%- if message['role'] == 'tool' -%}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- endif -%}"""

# Kimi's, with the ids as they come.
KIMI_IDS = """{%- for message in messages -%}
<|im_user|>{{ message.role }}<|im_middle|>
{%- if message.role == 'tool' %}## Return of {{ message.tool_call_id }}
{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>{{ call.function.arguments | tojson }}<|tool_call_end|>
{%- endfor -%}<|im_end|>
{%- endfor -%}"""

# Parts of training: what the assistant writes.
GENERATION = """{%- for message in messages -%}
<|{{ message.role }}|>
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content }}{% if message.end %}<|endoftext|>{% endif %}{% endgeneration %}
{%- else -%}{{ message.content }}{%- endif -%}
{%- endfor -%}"""


def function_call(arguments: Any, call_id: str | None = None, name: str = "g") -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if call_id is None else {"id": call_id, **made}


def asked_and_called(content: Any, arguments: Any, result: Any = "15°C") -> list[dict[str, Any]]:
    """A question, a call, its result."""
    return [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": content, "tool_calls": [function_call(arguments, "a")]},
        {"role": "tool", "tool_call_id": "a", "content": result},
    ]
