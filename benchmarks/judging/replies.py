"""Greedy replies of a model folder to many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from mistill.engine.onnx_model import OnnxModel
from mistill.engine.opening import open_model
from mistill.engine.scheduler import write_all
from mistill.errors import TextError
from mistill.folders.folder import open_folder
from mistill.preferences.reading import PromptRow
from mistill.progress import Tracker
from mistill.text.answers import prompt_ids, refuse_unwritten
from mistill.text.vocabulary import load_vocabulary


def rendered_prompts(
    folder: Path, prompts: Sequence[PromptRow], new_tokens: int
) -> list[list[int]]:
    """Prompts as a model reads them, refused before its weights are.

    Args:
        folder: A model folder with a chat template.
        prompts: The prompts.
        new_tokens: Most tokens of a reply.

    Returns:
        Token ids.

    Raises:
        TextError: If the template does not write one, or it leaves no room for a reply.
        VocabularyError: If there is no chat template.
    """
    vocabulary = load_vocabulary(folder)
    room = open_folder(folder).context_length - new_tokens
    texts = []
    for row in prompts:
        try:
            refuse_unwritten(row.prompt, vocabulary)
            ids = prompt_ids(row.prompt, vocabulary)
        except TextError as error:
            raise TextError(f"{row.origin}: {error}") from error
        if len(ids) > room:
            raise TextError(
                f"{row.origin} has {len(ids)} tokens, and the context of {folder.name} holds "
                f"{max(room, 0)} beside {new_tokens} new_tokens; leave it out or lower new_tokens"
            )
        texts.append(ids)
    return texts


def write_replies(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    threads: int,
    progress: Tracker,
) -> list[str]:
    """Let a model reply with its likeliest tokens; an ONNX folder writes many replies at once.

    Args:
        folder: A model folder of any form.
        prompts: From ``rendered_prompts``.
        new_tokens: Most tokens of a reply.
        threads: Threads to compute with.
        progress: Advances by one a reply.

    Returns:
        The replies, without white space around them.
    """
    vocabulary = load_vocabulary(folder)
    model = open_model(folder, threads=threads)
    ends = vocabulary.end_ids
    if isinstance(model, OnnxModel):
        written = write_all(
            model,
            prompts,
            max_new_tokens=new_tokens,
            end_ids=ends,
            finished=lambda: progress.advance(),
        )
    else:
        written = []
        for prompt in prompts:
            reply: list[int] = []
            for token in islice(model.stream(prompt), new_tokens):
                reply.append(token)
                if token in ends:
                    break
            written.append(reply)
            progress.advance()
    return [
        vocabulary.decode([token for token in reply if not vocabulary.is_special(token)]).strip()
        for reply in written
    ]
