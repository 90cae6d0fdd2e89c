"""What is given as a model and is none on disk."""

from __future__ import annotations

from pathlib import Path

from mistill.errors import FolderError


def refuse_object(source: object) -> None:
    """Refuse what is no name of a model, such as a model in memory.

    Args:
        source: What was given as a model.

    Raises:
        FolderError: If it is neither a text nor a path.
    """
    if isinstance(source, str | Path):
        return
    kind = type(source).__name__
    if hasattr(source, "save_pretrained"):
        raise FolderError(
            f"the model is a {kind} in memory, and models are given as folders; save model and "
            "tokenizer by their save_pretrained('folder') into one folder, and give that"
        )
    raise FolderError(
        f"the model is a {kind}; give a model folder, a Hub id such as "
        "mistralai/Mistral-7B-v0.1, or a .gguf file"
    )
