"""What the files beside a tokenizer say: chat templates, special tokens, what begins a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistill.errors import VocabularyError
from mistill.folders.json_text import small_file
from mistill.folders.schemas import optional_json
from mistill.text.tokenizer_file import Processor

# What some classes of transformers name where a folder does not.
_END_OF_TEXT = "<|endoftext|>"
_CLASS_TOKENS = {
    "CodeLlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END_OF_TEXT),
}
# Where a folder keeps templates beside chat_template.jinja, each named like its file.
_TEMPLATES = "additional_chat_templates"
TEMPLATE_FILE = "chat_template.jinja"


def read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name, as transformers finds them.

    Files take the place of what tokenizer_config.json holds. The usual template is ``default``;
    where there is one called ``tool_use``, it renders the conversations that have tools.

    Args:
        folder: The folder.
        settings: Content of its tokenizer_config.json.

    Returns:
        Names and templates; empty where the folder has none.

    Raises:
        VocabularyError: If a template is not text.
    """
    files = {file.stem: file for file in sorted((folder / _TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files["default"] = folder / TEMPLATE_FILE
    if files:
        return {name: _read_template(file) for name, file in files.items()}
    templates = settings.get("chat_template")
    if isinstance(templates, str):
        return {"default": templates}
    if isinstance(templates, list):
        pairs = [
            (entry.get("name"), entry.get("template"))
            for entry in templates
            if isinstance(entry, Mapping)
        ]
        return {
            name: template
            for name, template in pairs
            if isinstance(name, str) and isinstance(template, str)
        }
    return {}


def read_template(folder: Path) -> str | None:
    """The usual chat template of a folder; None where it has none."""
    settings = optional_json(folder / "tokenizer_config.json")
    return read_templates(folder, settings).get("default")


def _read_template(file: Path) -> str:
    try:
        return small_file(file).decode()
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{file} is not UTF-8 text: {error.reason}") from error


def read_special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have a name, as transformers hands them to a chat template.

    Besides the usual names these are all that end in ``_token`` in tokenizer_config.json, and
    those that ``extra_special_tokens`` or ``model_specific_special_tokens`` names.

    Args:
        folder: The folder.
        settings: Content of its tokenizer_config.json.

    Returns:
        Names, such as bos_token, and what the tokens spell.
    """
    values: dict[str, Any] = dict(_CLASS_TOKENS.get(_tokenizer_class(settings), {}))
    # The older file counts more, unless the newer one lists all added tokens.
    older = optional_json(folder / "special_tokens_map.json")
    files = (settings,) if "added_tokens_decoder" in settings else (settings, older)
    for entries in files:
        values |= {name: value for name, value in entries.items() if name.endswith("_token")}
        for group in ("extra_special_tokens", "model_specific_special_tokens"):
            tokens = entries.get(group)
            values |= tokens if isinstance(tokens, Mapping) else {}
    spelled = {name: _spelled(value) for name, value in values.items()}
    return {name: text for name, text in spelled.items() if text is not None}


def _tokenizer_class(settings: Mapping[str, Any]) -> str:
    return str(settings.get("tokenizer_class")).removesuffix("Fast")


def _spelled(value: Any) -> str | None:
    if isinstance(value, Mapping):  # an AddedToken
        value = value.get("content")
    return value if isinstance(value, str) else None


def adds_bos(settings: Mapping[str, Any], processor: Processor | None, bos_token: str) -> bool:
    """Whether the tokenizer puts its first token before plain text."""
    return _adds(settings.get("add_bos_token"), processor, bos_token, first=True)


def adds_eos(settings: Mapping[str, Any], processor: Processor | None, eos_token: str) -> bool:
    """Whether the tokenizer puts its last token after plain text."""
    return _adds(settings.get("add_eos_token"), processor, eos_token, first=False)


def _adds(setting: Any, processor: Processor | None, token: str, *, first: bool) -> bool:
    if isinstance(setting, bool):
        return setting
    return processor is not None and processor.puts(token, first=first)
