"""The rows of a file of conversations, of pairs, or of texts with their instructions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.choosing import best_and_worst
from distill.settings import GenerateSettings
from mistill.folders.publishing import write_atomically
from mistill.preferences.reading import PromptRow
from mistill.text.answers import thoughts_opening
from mistill.text.conversation import Conversation, prompt_share
from mistill.text.vocabulary import Vocabulary

_log = logging.getLogger("distill.conversations")


def beside_the_reply(talk: Conversation, reply: str | None) -> dict[str, Any]:
    """A row of a file: the turns, the reply, and what stands beside them.

    Args:
        talk: Turns up to the reply.
        reply: The reply; None for the turns alone.

    Returns:
        The row.
    """
    last = [] if reply is None else [{"role": "assistant", "content": reply}]
    row: dict[str, Any] = {"messages": [*talk.messages, *last]}
    beside = {
        "tools": talk.tools,
        "documents": talk.documents,
        "chat_template_kwargs": talk.variables,
    }
    return row | {name: value for name, value in beside.items() if value}


def chosen_lines(
    rows: Sequence[PromptRow],
    texts: Sequence[str],
    good: Sequence[bool],
    scores: Sequence[float],
    vocabulary: Vocabulary,
    settings: GenerateSettings,
) -> list[dict[str, Any]]:
    """The best reply to each prompt, or its best and its worst as a pair.

    Args:
        rows: Prompts.
        texts: Replies, those to one prompt beside one another.
        good: Which of them may be chosen.
        scores: Of the replies; higher is better.
        vocabulary: Of the teacher.
        settings: How many replies a prompt has, and whether pairs are asked for.

    Returns:
        Rows, at most one for each prompt.
    """
    lines: list[dict[str, Any]] = []
    ties = 0
    for row, both in zip(rows, best_and_worst(scores, good, settings.best_of), strict=True):
        if both is None:
            continue
        best, worst = both
        opening = thoughts_opening(row.prompt, vocabulary)
        if not settings.pairs:
            lines.append(
                beside_the_reply(row.prompt, opening + texts[best]) | {"score": scores[best]}
            )
        elif texts[best] != texts[worst]:
            beside = beside_the_reply(row.prompt, None)
            pair = {"prompt": beside.pop("messages"), **beside}
            for name, place in (("chosen", best), ("rejected", worst)):
                pair |= {name: opening + texts[place], f"score_{name}": scores[place]}
            lines.append(pair)
        else:
            ties += 1
    if ties:
        _log.info("%d of %d prompts give no pair: all their replies tie", ties, len(rows))
    return lines


def instruction_lines(
    rows: Sequence[PromptRow],
    texts: Sequence[str],
    good: Sequence[bool],
    graded: Sequence[float] | None,
    settings: GenerateSettings,
) -> list[dict[str, Any]]:
    """Texts behind the instructions that were written for them, the best graded ones.

    Args:
        rows: What asked for an instruction, with the text in the column ``text``.
        texts: Instructions, those for one text beside one another.
        good: Which of them may be chosen.
        graded: What each gains; None where nothing graded them.
        settings: How many instructions a text has, and which share is kept.

    Returns:
        Rows, at most one for each text.
    """
    scores = [0.0] * len(texts) if graded is None else list(graded)
    lines: list[dict[str, Any]] = []
    for row, both in zip(rows, best_and_worst(scores, good, settings.best_of), strict=True):
        if both is None:
            continue
        turns = [
            {"role": "user", "content": texts[both[0]]},
            {"role": "assistant", "content": row.columns["text"]},
        ]
        lines.append({"messages": turns} | ({} if graded is None else {"score": scores[both[0]]}))
    count = max(1, round(settings.keep_share * len(lines)))
    if count < len(lines):
        bound = sorted((line["score"] for line in lines), reverse=True)[count - 1]
        lines = [line for line in lines if line["score"] >= bound]
    return lines


def publish_lines(
    conversations: Sequence[Mapping[str, Any]],
    target: Path,
    held_out: Path | None,
    held_out_share: float,
) -> None:
    """Write the files, each whole or not at all.

    Args:
        conversations: Rows with ``messages``, or with ``prompt``.
        target: The file of those to learn from.
        held_out: The file of the others; None for one file of all.
        held_out_share: Share of the prompts that are held out.
    """
    rest = list(conversations)
    if held_out is not None:
        shares = [prompt_share(row.get("messages") or row["prompt"]) for row in rest]
        share = [row for row, place in zip(rest, shares, strict=True) if place < held_out_share]
        rest = [row for row, place in zip(rest, shares, strict=True) if place >= held_out_share]
        held_out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(held_out, _json_lines(share))
    write_atomically(target, _json_lines(rest))


def _json_lines(conversations: Sequence[Mapping[str, Any]]) -> str:
    lines = (json.dumps(row, ensure_ascii=False) for row in conversations)
    return "".join(line + "\n" for line in lines)
