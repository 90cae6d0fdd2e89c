"""Replies of chat models to the same prompts: to be read, and to be counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.figures.replies import Replies
from benchmarks.measure.questions import prompts_fingerprint, read_everyday_prompts
from mistill.chat.bot import ChatBot
from mistill.progress import Tracker, track


def collect_samples(
    models: Mapping[str, Path], prompts: Sequence[str], max_new_tokens: int, threads: int
) -> dict[str, dict[str, str]]:
    """Let every chat model answer the same prompts, with greedy decoding.

    Args:
        models: Name to the folder of a chat model.
        prompts: The user's first message of each conversation.
        max_new_tokens: Most tokens of a reply.
        threads: Threads to compute with.

    Returns:
        Prompt to the reply of each model, by name; a reply that was cut off ends with an ellipsis.
    """
    samples: dict[str, dict[str, str]] = {prompt: {} for prompt in prompts}
    with track("asking", len(models) * len(prompts), "replies") as progress:
        for name, folder in models.items():
            replies = _replies(folder, prompts, max_new_tokens, threads, progress)
            for prompt, (reply, ended) in zip(prompts, replies, strict=True):
                samples[prompt][name] = reply if ended else f"{reply} \u2026"
    return samples


def collect_replies(
    models: Mapping[str, Path], max_new_tokens: int, threads: int
) -> dict[str, Replies]:
    """Let chat models reply to the everyday prompts that ship with mistill, with greedy decoding.

    Args:
        models: Name to the folder of a chat model.
        max_new_tokens: Most tokens of a reply.
        threads: Threads to compute with.

    Returns:
        The replies of each model, by name.
    """
    prompts = read_everyday_prompts()
    collected = {}
    with track("replying", len(models) * len(prompts), "replies") as progress:
        for name, folder in models.items():
            replies = list(_replies(folder, prompts, max_new_tokens, threads, progress))
            collected[name] = Replies(
                fingerprint=prompts_fingerprint(prompts, max_new_tokens),
                texts=tuple(text for text, _ in replies),
                ended=tuple(ended for _, ended in replies),
            )
    return collected


def _replies(
    folder: Path, prompts: Sequence[str], max_new_tokens: int, threads: int, progress: Tracker
) -> Iterator[tuple[str, bool]]:
    """Greedy replies of one model to prompts, each alone, and whether it ended them."""
    bot = ChatBot(folder, threads=threads, temperature=0, max_new_tokens=max_new_tokens)
    for prompt in prompts:
        reply = "".join(bot.reply(prompt)).strip()
        yield reply, bot.last_ending != "max_new_tokens"
        bot.reset()
        progress.advance()
