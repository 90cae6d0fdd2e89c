"""How soon a chatbot answers when it has talked for a while, against a chatbot that reads it all.

    python -m benchmarks.suite.later_turn CHATBOT --history 2000

A conversation is made of sentences until it has the tokens asked for. The next question is then
answered three ways, taking turns: by the chatbot that has held the conversation, by one that has
read nothing, and by one that takes up what was kept on disk. Only the time to the first token
counts, the template and the tokenizer included. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.figures.machine import describe_machine
from benchmarks.suite.turns import paired_ratio, summary
from mistill.chat.bot import ChatBot
from mistill.engine.onnx_model import OnnxModel
from mistill.text.vocabulary import Vocabulary, load_vocabulary

_QUESTION = "And what would you tell a child about it?"
_SUBJECTS = ("wind", "rain", "bread", "ships", "bees", "stone", "music", "trees", "glass", "salt")


def conversation(vocabulary: Vocabulary, tokens: int) -> list[dict[str, str]]:
    """Turns until they have as many tokens as asked for.

    Args:
        vocabulary: Whose tokens count.
        tokens: How many at least.

    Returns:
        Messages, the last of them an answer.
    """
    messages: list[dict[str, str]] = []
    number = 0
    while not messages or len(vocabulary.encode(vocabulary.render(messages))) < tokens:
        subject = _SUBJECTS[number % len(_SUBJECTS)]
        messages += [
            {"role": "user", "content": f"Question {number}: what do you know about {subject}?"},
            {
                "role": "assistant",
                "content": f"People have thought about {subject} for a long time. In the year "
                f"{1000 + 37 * number} somebody wrote that {subject} is worth more than it seems, "
                "and since then many have found out more, each a little.",
            },
        ]
        number += 1
    return messages


def first_token_seconds(bot: ChatBot) -> float:
    """Ask the next question and stop after the first token.

    Args:
        bot: A chatbot with a history.

    Returns:
        What the first token took.
    """
    started = time.perf_counter()
    next(bot.reply(_QUESTION))
    return time.perf_counter() - started


def measure(folder: Path, tokens: int, threads: int | None, rounds: int) -> dict[str, Any]:
    """Answer a later turn in three ways, taking turns.

    Args:
        folder: An ONNX folder.
        tokens: Of the history.
        threads: Threads to compute with.
        rounds: How often each.

    Returns:
        What was found.
    """
    model = OnnxModel(folder, threads=threads)
    bot = ChatBot(folder, model=model, temperature=0, max_new_tokens=8, exact=False)
    history = conversation(load_vocabulary(folder), tokens)

    def forget() -> None:
        model.read([0])
        bot.history = [dict(message) for message in history]

    # The last answer is the model's own, so that the later turn finds what it wrote itself.
    forget()
    list(bot.reply("One question more: what is the weather like today?"))
    held = [dict(message) for message in bot.history]
    with TemporaryDirectory() as kept:
        file = bot.save(Path(kept) / "kept.safetensors")
        kept_bytes = file.stat().st_size

        def warm() -> float:
            bot.restore(file)
            return first_token_seconds(bot)

        def restored() -> float:
            model.read([0])
            started = time.perf_counter()
            bot.restore(file)
            next(bot.reply(_QUESTION))
            return time.perf_counter() - started

        def cold() -> float:
            forget()
            bot.history = [dict(message) for message in held]
            return first_token_seconds(bot)

        ways: dict[str, Callable[[], float]] = {"warm": warm, "restored": restored, "cold": cold}
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for turn in range(1 + rounds):
            for name, way in ways.items():
                seconds = way()
                bot.reset()
                if turn:
                    samples[name].append({"seconds": seconds})
    return {
        "benchmark": "later_turn",
        "machine": asdict(describe_machine(model.threads)),
        "folder": folder.name,
        "prompt_tokens": bot.last_speed.prompt_tokens if bot.last_speed else 0,
        "kept_bytes": kept_bytes,
        "first_token_seconds": {name: summary(turns, "seconds") for name, turns in samples.items()},
        "warm_to_cold": paired_ratio(samples["warm"], samples["cold"], "seconds"),
        "restored_to_cold": paired_ratio(samples["restored"], samples["cold"], "seconds"),
        "samples": samples,
    }


def main() -> None:
    """Measure as the command line says, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chatbot", type=Path)
    parser.add_argument("--history", type=int, default=2000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(json.dumps(measure(args.chatbot, args.history, args.threads, args.rounds)))


if __name__ == "__main__":
    main()
