"""Which folders mistill made: the only ones that it ever replaces.

A folder is recognised by a file that a step leaves in it, and by holding nothing that no step
writes. What a user put into it makes it the user's.
"""

from __future__ import annotations

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path

# At least one of these is in every folder that a step makes.
_SIGNS = ("lineage.json", "manifest.json", "plan.json", "report.json", "sweep.json")

# The files that steps write: weights, what belongs to a model, reports, targets, other runtimes.
_FILES = (
    *_SIGNS,
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf"),
    *("model.onnx", "model.onnx.data", "model*.onnx", "model*.onnx_data*"),
    *("config.json", "generation_config.json", "genai_config.json", "quantize_config.json"),
    *("adapter_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("fidelity.json", "metrics.jsonl", "mixed.json", "merge_report.json", "quantize_report.*"),
    "tuning_report.json",
    *("report.md", "report.html", "figure.png", "figure.svg"),
    *("shard-*", ".shard-*"),
)
# Folders inside a folder of ours whose content is ours, whatever it is.
_FOLDERS = ("onnx", "tensorboard")
# The folder of an adapter beside the model that it was merged into, and what is in it.
_ADAPTER, _ADAPTER_FILES = "adapter", ("adapter_config.json", "adapter_model.safetensors")


_OF_OTHERS = "no step of mistill wrote"

CARD_FILE = "README.md"
"""A model card, which is ours as long as nobody has changed it."""

_SIGNATURE = "<!-- Written by mistill; without its last line the text has the SHA-256 "


def signed_card(text: str) -> str:
    """A model card that can be told from one that somebody has changed.

    Args:
        text: What it says.

    Returns:
        The same with a last line that holds its checksum.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}{_SIGNATURE}{digest} -->\n"


def is_own_card(file: Path) -> bool:
    """Whether a model card is as a step wrote it.

    Args:
        file: A README.md.

    Returns:
        False where somebody has changed it.
    """
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return text == signed_card(text.rpartition(_SIGNATURE)[0])


def why_not_ours(folder: Path, *, any_card: bool = False) -> str | None:
    """Why a folder is not one that mistill made, and may not be replaced.

    Args:
        folder: An existing folder.
        any_card: Whether a model card that somebody has changed is let pass.

    Returns:
        The rest of a sentence about the folder, such as "holds diary.txt, which ..."; None for a
        folder that mistill made.
    """
    if not any((folder / name).is_file() for name in _SIGNS):
        return f"was not made by mistill: it has none of {', '.join(_SIGNS)}"
    for item in sorted(folder.iterdir()):
        if any_card and item.name == CARD_FILE and item.is_file() and not item.is_symlink():
            continue
        if item.is_symlink() or not _is_ours(item):
            by = "is not as mistill wrote it" if item.name == CARD_FILE else _OF_OTHERS
            return f"holds {item.name}, which {by}"
    return None


def _is_ours(item: Path) -> bool:
    if item.is_dir() and item.name == _ADAPTER:
        return all(file.name in _ADAPTER_FILES for file in item.iterdir())
    if item.is_dir():
        # A sweep is a folder of folders.
        return item.name in _FOLDERS or why_not_ours(item) is None
    if item.name == CARD_FILE:
        return is_own_card(item)
    return any(fnmatchcase(item.name, pattern) for pattern in _FILES)
