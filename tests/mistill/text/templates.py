"""Small chat templates in the manner of model families, with the tokens of tests/tiny.py.

Each differs where the families do: how a turn begins and ends, where the system prompt and tools
stand, what becomes of thoughts and calls, and which roles are written at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistill.errors import MistillError
from mistill.text.blocks import Document
from mistill.text.documents import read_documents
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from tests.mistill import made
from tests.tiny import tiny_tokenizer

# Llama 3: a header and two line breaks, contents trimmed, a call in place of the content, a date.
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, messages = messages[0]['content'] | trim, messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|im_start|>system\\n\\nToday: ' + date_string + '\\n\\n' }}
{%- for tool in tools or [] %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
{{- system + '<|im_end|>' }}
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|im_start|>assistant\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- (call.arguments | tojson) + '}<|im_end|>' }}
    {%- elif m.role in ('tool', 'ipython') %}
        {{- '<|im_start|>ipython\\n\\n' + (m.content | tojson) + '<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n\\n' + m.content | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"""
# Qwen 3: thoughts of the last answer alone, taken out of the content and written anew.
QWEN_3 = """\
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
    {%- set thoughts, content = '', m.content or '' %}
    {%- if m.reasoning_content is string %}{% set thoughts = m.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set thoughts = content.split('</think>')[0].split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.last %}
        {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content.lstrip('\\n') }}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}
{%- endif %}"""
# Gemma: the assistant is called model, contents are trimmed, a system prompt is refused.
GEMMA = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- m.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"""
# Phi 3 and Zephyr: only the roles that they know are written, others are left out in silence.
PHI_3 = """\
{%- for m in messages %}
{%- if m.role == 'system' and m.content %}{{ '<|system|>\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'user' %}{{ '<|user|>\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
# Distilled DeepSeek-R1: an answer is cut at </think>, and the prompt opens the thoughts.
CUTS_THOUGHTS = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
OPENS_THOUGHTS = CUTS_THOUGHTS.replace(
    "{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
)
# Contents are texts or lists of parts.
PARTS = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.content is string %}{{ m.content }}
{%- else %}{% for part in m.content %}{{ '[' + part.text | trim + ']' }}{% endfor %}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Alpaca: nothing ends an answer.
ENDLESS = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


def vocabulary_of(folder: Path, template: str) -> Vocabulary:
    return load_vocabulary(made.put_template(tiny_tokenizer(folder), template))


def learned(document: Document, vocabulary: Vocabulary) -> list[str]:
    """What the mask marks, a text for each run of marked tokens."""
    runs: list[list[int]] = [[]]
    for token, marked in zip(document.ids.tolist(), document.mask.tolist(), strict=True):
        if marked:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [vocabulary.decode(run) for run in runs if run]


def texts_of(file: Path, vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.decode(one.ids.tolist()) for one in read_documents(file, vocabulary)]


def theirs(folder: Path, messages: Sequence[Any], **options: Any) -> str:
    """The text that transformers renders."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    assert isinstance(text, str)
    return text


def refusal(file: Path, vocabulary: Vocabulary) -> str:
    """The message that refuses a text."""
    try:
        list(read_documents(file, vocabulary))
    except MistillError as error:
        return str(error)
    return "nothing was refused"
