"""What guessing ahead wins where it can, and loses where it cannot.

    python -m benchmarks.suite.speculation CHATBOT --draft SMALLER

The same greedy replies are written plainly and with guesses, taking turns: one that repeats a text
of its prompt, one that tells something new, and that one with guesses that are always wrong. A
chatbot in 8-bit integers guesses only with ``--inexact``; how far its text stays the same is told
for each. Only the tokens after the first are timed. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.figures.latency import SETTLE_SECONDS
from benchmarks.figures.machine import describe_machine
from benchmarks.suite.turns import paired_ratio, summary
from mistill.engine.drafts import Draft, DraftModel, DraftToken, PromptLookup
from mistill.engine.key_value_cache import common_prefix
from mistill.engine.language_model import LanguageModel
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.sampling import SamplingSettings
from mistill.engine.speculation import SpeculativeModel
from mistill.text.vocabulary import load_vocabulary

_TEXT = (
    "The mistral is a strong, cold wind that blows from the north through the valley of the Rhone. "
    "It can last for a week, and it clears the sky. Houses in the valley turn their backs to it: "
    "their northern walls have few windows, and rows of cypresses stand between the fields. "
    "Painters came for the light that it leaves behind, and sailors learned to fear it."
)
_QUESTIONS = {
    "repeats": f"Repeat this text word for word:\n{_TEXT}",
    "tells": "Tell me a story about a dragon who learns to cook.",
}


class AlwaysWrong:
    """Guesses that cost as much as good ones and never help."""

    def __init__(self, reply: Sequence[int]) -> None:
        """Choose what to guess.

        Args:
            reply: What will be written; one token that is not in it is guessed.
        """
        self._token = min(set(range(len(reply) + 1)) - set(reply))

    def begin(self, ids: Sequence[int]) -> None:
        """Take up another text; makes no difference."""

    def seconds_behind(self, ids: Sequence[int]) -> float:
        """Nothing."""
        return 0.0

    def propose(
        self, ids: Sequence[int], count: int, sampling: SamplingSettings | None
    ) -> list[DraftToken]:
        """The same token, over and over."""
        return [DraftToken(self._token, None)] * count


def write(model: LanguageModel, prompt: Sequence[int], tokens: int) -> tuple[list[int], float]:
    """Write a reply.

    Args:
        model: What writes.
        prompt: What it answers.
        tokens: How many, whatever they are.

    Returns:
        The tokens, and the seconds that those after the first took.
    """
    time.sleep(SETTLE_SECONDS)
    stream = model.stream(prompt)
    reply = [next(stream)]
    started = time.perf_counter()
    reply += islice(stream, tokens - 1)
    return reply, time.perf_counter() - started


def measure(
    folder: Path,
    draft: Path | None,
    *,
    exact: bool,
    tokens: int,
    threads: int | None,
    rounds: int,
) -> dict[str, Any]:
    """Write every reply in every way, taking turns.

    Args:
        folder: An ONNX folder.
        draft: The ONNX folder of a smaller model with the same tokens.
        exact: Whether a chatbot whose rounding depends on guesses must not guess.
        tokens: Of a reply.
        threads: Threads to compute with.
        rounds: How often each.

    Returns:
        What was found.
    """
    model = OnnxModel(folder, threads=threads)
    vocabulary = load_vocabulary(folder)
    drafts: dict[str, tuple[OnnxModel, Draft]] = {"lookup": (model, PromptLookup())}
    if draft is not None:
        # What is compared with is the model as it runs without a draft.
        other = OnnxModel(folder, threads=threads, alone=False)
        drafts["model"] = other, DraftModel.open(draft, other)
    found: dict[str, Any] = {}
    rounding = 0.0
    for question, text in _QUESTIONS.items():
        prompt = vocabulary.encode(
            vocabulary.render([{"role": "user", "content": text}], add_generation_prompt=True)
        )
        wrong = AlwaysWrong(write(model, prompt, tokens)[0])
        for name, (guessed_for, source) in {**drafts, "wrong": (model, wrong)}.items():
            plain: list[dict[str, float]] = []
            guessed: list[dict[str, float]] = []
            guesses = {"tried": 0, "right": 0}
            for turn in range(1 + rounds):
                # As a chatbot is that was just opened: nothing is known of costs and hits.
                guessing = SpeculativeModel(guessed_for, source, exact=exact)
                rounding = guessing.rounding
                order: list[LanguageModel] = [model, guessing]
                replies = {}
                for which in order if turn % 2 else reversed(order):
                    reply, seconds = write(which, prompt, tokens)
                    replies[which is guessing] = reply
                    if turn:
                        (guessed if which is guessing else plain).append({"seconds": seconds})
                guesses["tried"] += guessing.pace.tried
                guesses["right"] += guessing.pace.right
            found[f"{question}, {name}"] = {
                "speed_up": paired_ratio(plain, guessed, "seconds"),
                "plain_seconds": summary(plain, "seconds"),
                "same_tokens": common_prefix(replies[False], replies[True]),
                "tokens": tokens,
                **guesses,
                "samples": {"plain": plain, "guessed": guessed},
            }
    return {
        "benchmark": "speculation",
        "machine": asdict(describe_machine(model.threads)),
        "folder": folder.name,
        "draft": None if draft is None else draft.name,
        "exact": exact,
        "rounding": rounding,
        "replies": found,
    }


def main() -> None:
    """Measure as the command line says, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chatbot", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--inexact", action="store_true")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    found = measure(
        args.chatbot,
        args.draft,
        exact=not args.inexact,
        tokens=args.tokens,
        threads=args.threads,
        rounds=args.rounds,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
