"""Vocabularies and files of other kinds than tests/tiny.py makes, all real and all tiny."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import SENTENCES

# The templates that chat models ship, from their repositories on the Hub.
MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_V3 = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the system message, roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user, system and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
CHATML_WITH_MARKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Keeps the thoughts of the last answer only, as reasoning models do.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{{ message['content'].split('|')[-1] }}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentencepiece_model(file: Path, vocabulary_size: int = 420) -> Path:
    """Train a SentencePiece BPE with byte fallback, as Llama and Mistral have."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary_size,
        byte_fallback=True,
        character_coverage=0.99,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(model.getvalue())
    return file


def sentencepiece_folder(folder: Path, template: str | None = MISTRAL_V1, **settings: Any) -> Path:
    """A folder as a model on the Hub may be: tokenizer.model and no tokenizer.json."""
    sentencepiece_model(folder / "tokenizer.model")
    stated = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**stated, **settings}), "utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


def put_template(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


def write_gguf(
    file: Path,
    model: Path,
    *,
    kind: Mapping[str, int] | None = None,
    metadata: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write a tiny Llama folder as llama.cpp's converter would: its names, its order of rows."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import quantize
    from safetensors.numpy import load_file

    from tests.reference.llama_cpp import interleaved

    config = json.loads((model / "config.json").read_text("utf-8"))
    definition = json.loads((model / "tokenizer.json").read_text("utf-8"))
    added = {entry["id"] for entry in definition["added_tokens"]}
    vocabulary = sorted(definition["model"]["vocab"].items(), key=lambda item: item[1])
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text for text, _ in vocabulary])
    writer.add_token_types(
        [TokenType.CONTROL if token in added else TokenType.NORMAL for _, token in vocabulary]
    )
    writer.add_token_merges([" ".join(pair) for pair in definition["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(4)
    writer.add_chat_template((model / "chat_template.jinja").read_text("utf-8"))
    for name, value in (metadata or {}).items():
        _replace(writer, name, value)
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for name, weight in load_file(model / "model.safetensors").items():
        for part, count in heads.items():
            if part in name:
                weight = interleaved(weight, config[count])
        theirs = _gguf_name(name)
        if theirs in without:
            continue
        weight = np.ascontiguousarray(weight.astype(np.float32))
        if kind and theirs in kind:
            chosen = GGMLQuantizationType(kind[theirs])
            writer.add_tensor(theirs, quantize(weight, chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(theirs, weight)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _replace(writer: Any, name: str, value: Any) -> None:
    writer.kv_data[0].pop(name, None)
    add = {
        str: writer.add_string,
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
    }
    if value is not None:
        add.get(type(value), writer.add_array)(name, value)


@cache
def _gguf_name(name: str) -> str:
    from gguf import MODEL_ARCH, get_tensor_name_map

    theirs = get_tensor_name_map(MODEL_ARCH.LLAMA, 4).get_name(name.removesuffix(".weight"))
    assert theirs is not None, name
    return f"{theirs}.weight"
