"""A conversation with any folder: the chatbot, its stream of text, the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from mistill.chat.bot import ChatBot as ChatBot
    from mistill.chat.reply import Reply as Reply
    from mistill.chat.reply import Speed as Speed
    from mistill.chat.settings import ChatSettings as ChatSettings

_HOMES = {
    "ChatBot": "mistill.chat.bot",
    "ChatSettings": "mistill.chat.settings",
    "Reply": "mistill.chat.reply",
    "Speed": "mistill.chat.reply",
}

__all__ = ["ChatBot", "ChatSettings", "Reply", "Speed"]
__getattr__ = lazy_exports(__name__, _HOMES)
