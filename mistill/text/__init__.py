"""Text and conversations to blocks of tokens; the vocabulary and the chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistill.lazy import lazy_exports

if TYPE_CHECKING:
    from mistill.text.answers import conversation_documents as conversation_documents
    from mistill.text.blocks import Document as Document
    from mistill.text.blocks import TokenBlocks as TokenBlocks
    from mistill.text.blocks import pack as pack
    from mistill.text.documents import read_documents as read_documents
    from mistill.text.documents import read_prompts as read_prompts
    from mistill.text.documents import read_stream as read_stream
    from mistill.text.rows import Texts as Texts
    from mistill.text.rows import check_texts as check_texts

_HOMES = {
    "Document": "mistill.text.blocks",
    "Texts": "mistill.text.rows",
    "TokenBlocks": "mistill.text.blocks",
    "check_texts": "mistill.text.rows",
    "conversation_documents": "mistill.text.answers",
    "pack": "mistill.text.blocks",
    "read_documents": "mistill.text.documents",
    "read_prompts": "mistill.text.documents",
    "read_stream": "mistill.text.documents",
}

__all__ = [
    "Document",
    "Texts",
    "TokenBlocks",
    "check_texts",
    "conversation_documents",
    "pack",
    "read_documents",
    "read_prompts",
    "read_stream",
]
__getattr__ = lazy_exports(__name__, _HOMES)
