"""Instructions written for texts: data from text that nobody asked for.

A model that is tuned on reversed conversations writes the instruction to which a text is the answer
(instruction backtranslation, Li et al., 2023, https://arxiv.org/abs/2308.06259). What it wrote is
graded by a model that answers instructions: how much likelier the text becomes behind it. Grading
matters more than numbers: the authors found that more data without it does not help.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mistill.errors import TextError
from mistill.folders.publishing import creating_file
from mistill.preferences.tokens import answer_tokens
from mistill.text.conversation import Conversation, content_of
from mistill.text.row_content import content_of_row
from mistill.text.rows import Texts, find_file, first_row, read_lines, sources_of, suffix_of
from mistill.text.vocabulary import load_vocabulary

REVERSED_PROMPT = "Write the instruction to which this text is the answer.\n\n{text}"
"""What a model is asked that writes instructions, where it is tuned and where it writes."""

_NO_INSTRUCTION = "Write a text."


def reverse_conversations(texts: Texts, target: str | Path, *, overwrite: bool = False) -> Path:
    """Swap the sides of conversations: the answer asks, and the instruction is the answer.

    A model that is tuned on them writes instructions for texts
    (``generate_conversations(..., reverse=True)``).

    Args:
        texts: Conversations; of each the last question and its answer are taken.
        target: The .jsonl file to write.
        overwrite: Whether an existing file is replaced.

    Returns:
        The target.

    Raises:
        TextError: If there are none, or one has no question before its answer.
    """
    path = Path(target).expanduser().absolute()
    rows = list(_reversed(texts))
    if not rows:
        raise TextError(f"there are no conversations in {', '.join(sources_of(texts))}")
    with creating_file(path, overwrite, sources_of(texts)) as partial:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        partial.write_text(lines, "utf-8")
    return path


def _reversed(texts: Texts) -> Iterable[dict[str, Any]]:
    for source in sources_of(texts):
        for row in first_row(source):
            if row.problem is not None:
                raise row.problem
            talk = content_of_row(row).says
            turns = talk.joined().messages if isinstance(talk, Conversation) else ()
            if len(turns) < 2 or [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
                raise TextError(f"{row.origin} has no question of a user before an answer")
            question, answer = (content_of(turn).strip() for turn in turns[-2:])
            if not question or not answer:
                raise TextError(f"{row.origin} has an empty turn")
            yield {
                "messages": [
                    {"role": "user", "content": REVERSED_PROMPT.format(text=answer)},
                    {"role": "assistant", "content": question},
                ]
            }


def read_texts(texts: Texts) -> list[str]:
    """Texts for which instructions are written.

    Args:
        texts: A .txt file with a text on each line, or rows with ``text`` or a conversation, of
            which the last answer is taken.

    Returns:
        The texts, in their order.

    Raises:
        TextError: If there are none, or one is empty.
    """
    contents: list[str] = []
    for source in sources_of(texts):
        path = find_file(source)
        if path is not None and suffix_of(path) == ".txt":
            contents += [line.strip() for line in read_lines(path) if line.strip()]
            continue
        for row in first_row(source):
            if row.problem is not None:
                raise row.problem
            says = content_of_row(row).says
            text = says if isinstance(says, str) else content_of(says.joined().messages[-1])
            if not text.strip():
                raise TextError(f"{row.origin} has an empty text")
            contents.append(text.strip())
    if not contents:
        raise TextError(f"there are no texts in {', '.join(sources_of(texts))}")
    return contents


def gains(forward: Path, instructions: Sequence[str], texts: Sequence[str]) -> list[float]:
    """How much likelier each text becomes behind its instruction, in nats a token.

    Args:
        forward: A model that answers instructions.
        instructions: What was written; an empty one gains nothing.
        texts: As many texts.

    Returns:
        Mean log p of a token of the text behind the instruction, less the same behind one that
        says nothing of it.
    """
    import torch

    from mistill.judging.likelihood import answer_log_probabilities
    from mistill.pytorch.loading import load_pytorch

    vocabulary = load_vocabulary(forward)
    model: Any = load_pytorch(forward, torch.float32)
    if torch.cuda.is_available():
        model.to("cuda")

    def tokens(instruction: str, text: str) -> Any:
        prompt = Conversation(({"role": "user", "content": instruction or _NO_INSTRUCTION},))
        turn = {"role": "assistant", "content": text}
        return answer_tokens(prompt, turn, vocabulary, f"the text {text!r:.40}")

    instructed = [tokens(*both) for both in zip(instructions, texts, strict=True)]
    bare = [tokens(_NO_INSTRUCTION, text) for text in texts]
    behind = answer_log_probabilities(model, instructed)
    alone = answer_log_probabilities(model, bare)
    return [
        float(one / first.length - other / second.length)
        for one, first, other, second in zip(behind, instructed, alone, bare, strict=True)
    ]
