"""What the models say: replies to the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mistill.chat.bot import ChatBot
from mistill.progress import track

Samples = dict[str, dict[str, str]]


def collect_samples(
    models: Mapping[str, Path], prompts: Sequence[str], max_new_tokens: int, threads: int
) -> Samples:
    """Ask every model the same, and take the most probable word each time.

    Args:
        models: Name to the folder of a chat model.
        prompts: What a user says first.
        max_new_tokens: Most tokens of a reply.
        threads: Threads to compute with.

    Returns:
        Prompt to the reply of each model, by name; a reply that was cut off ends with an ellipsis.
    """
    replies: Samples = {prompt: {} for prompt in prompts}
    with track("asking", len(models) * len(prompts), "replies") as progress:
        for name, folder in models.items():
            bot = ChatBot(folder, threads=threads, temperature=0, max_new_tokens=max_new_tokens)
            for prompt in prompts:
                reply = "".join(bot.reply(prompt)).strip()
                cut = bot.last_ending == "max_new_tokens"
                replies[prompt][name] = f"{reply} \u2026" if cut else reply
                bot.reset()
                progress.advance()
    return replies
