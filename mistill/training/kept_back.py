"""Which documents a student is not trained on, so that a later step has text it has not seen.

Whether a document is kept back follows from its own tokens and from nothing else: not from the
other documents, their order, or the day that a chat template writes. So a later step finds the
same documents in the same text, without a list of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import numpy as np

from mistill.text.blocks import Document


def is_kept_back(document: Document, share: float) -> bool:
    """Whether a document belongs to the share that is kept back.

    Args:
        document: The document.
        share: Share of all documents that are kept back, 0 to 1.

    Returns:
        True where the first 32 bits of the SHA-256 of the tokens to be predicted, divided by 2 to
        the 32, are below the share.
    """
    if share == 0:
        return False
    tokens = np.ascontiguousarray(document.ids[document.mask], dtype="<i8").tobytes()
    place = int.from_bytes(hashlib.sha256(tokens).digest()[:4], "big") / 2**32
    return place < share


def without_kept_back(documents: Iterable[Document], share: float) -> list[Document]:
    """The documents to train on.

    Args:
        documents: All documents.
        share: Share of them that is kept back, 0 to 1.

    Returns:
        Those that are not kept back, in their order, with their numbers among all; all where none
        would be left.
    """
    numbered = [replace(each, number=number) for number, each in enumerate(documents)]
    return [each for each in numbered if not is_kept_back(each, share)] or numbered


def share_not_seen(text: str, lineage: Sequence[Mapping[str, Any]]) -> float:
    """The share of a text that a model was not distilled on.

    A text is known by its file name, which is what a lineage holds of it.

    Args:
        text: Name of the text.
        lineage: The steps that led to the model.

    Returns:
        1 where no distillation read the text; else the share that all of them kept back, by
        ``is_kept_back``.
    """
    share = 1.0
    for step in lineage:
        names = step.get("texts")
        if step.get("step") != "distill" or not isinstance(names, list):
            continue
        if PurePath(text).name in (PurePath(name).name for name in names if isinstance(name, str)):
            settings = step.get("settings")
            value = settings.get("kept_back_share") if isinstance(settings, Mapping) else None
            share = min(share, value if isinstance(value, int | float) and value >= 0 else 0.0)
    return share
