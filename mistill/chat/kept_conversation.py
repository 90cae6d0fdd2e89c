"""A conversation in a file that ``ChatBot.save`` wrote."""

from __future__ import annotations

from pathlib import Path

from mistill.errors import FolderError
from mistill.folders.json_text import parse_json

Message = dict[str, str]


def read_conversation(text: str, file: str | Path) -> tuple[list[Message], int]:
    """The history and the number of messages left out, as ``ChatBot.save`` wrote them.

    Args:
        text: What it wrote.
        file: The file, for messages.

    Returns:
        Messages, and how many of them are left out of what the model reads.

    Raises:
        FolderError: If the text is damaged.
    """
    try:
        state = parse_json(text, str(file))
        history = [{"role": one["role"], "content": one["content"]} for one in state["history"]]
        words = [word for message in history for word in message.values()]
        forgotten = state["forgotten"]
        sound = all(isinstance(word, str) for word in words) and type(forgotten) is int
    except (FolderError, KeyError, TypeError):
        sound = False
    if not sound or not 0 <= forgotten <= len(history):
        raise FolderError(f"the conversation in {file} is damaged; give another file")
    return history, forgotten
