"""How often a chatbot's replies go round in circles, by how they are sampled.

    python -m benchmarks.suite.reply_loops CHATBOT --judge TEACHER --prompts PROMPTS

The same prompts are answered under every way of sampling, with the same seeds. A reply loops if a
run of four words stands in it at least four times. The judge, an ONNX folder of a better model with
the same vocabulary, says what the replies are worth: nats per token that it expects, of the replies
that do not loop, because loops are what models expect most. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from mistill.engine.onnx_model import OnnxModel
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.engine.scheduler import write_all
from mistill.measures.repetition import most_repeats
from mistill.text.answers import prompt_ids
from mistill.text.conversation import Conversation
from mistill.text.vocabulary import load_vocabulary

LOOPS = 4
"""A reply loops if one of its runs of four words stands there so often."""

WAYS: dict[str, dict[str, float]] = {
    f"temperature {temperature}, repetition penalty {penalty}": {
        "temperature": temperature,
        "repetition_penalty": penalty,
    }
    for temperature in (0, 0.7)
    for penalty in (1.0, 1.05, 1.1, 1.2, 1.3)
} | {
    f"temperature {temperature}, repetition penalty {penalty}, DRY {multiplier} beyond {allowed}": {
        "temperature": temperature,
        "repetition_penalty": penalty,
        "dry_multiplier": multiplier,
        "dry_allowed_length": allowed,
    }
    for temperature in (0, 0.7)
    for penalty, multiplier, allowed in (
        *((1.0, 2.0, 2), (1.05, 0.8, 2), (1.05, 0.8, 4)),
        *((1.05, 2.0, 2), (1.05, 2.0, 3), (1.05, 2.0, 4), (1.05, 5.0, 3)),
    )
}


def measure(
    folder: Path, judge: Path, prompts: list[str], max_new_tokens: int, threads: int | None
) -> dict[str, Any]:
    """Answer prompts in every way.

    Args:
        folder: An ONNX folder that chats.
        judge: An ONNX folder with the same vocabulary.
        prompts: Questions.
        max_new_tokens: The most tokens of a reply.
        threads: Threads to compute with.

    Returns:
        Per way: the share of replies that loop, the share that end by themselves, their mean number
        of tokens, and the judge's nats per token of those that do not loop.
    """
    vocabulary = load_vocabulary(folder)
    ends = frozenset(vocabulary.end_ids)
    asked = [
        prompt_ids(Conversation(({"role": "user", "content": prompt},)), vocabulary)
        for prompt in prompts
    ]
    model, critic = OnnxModel(folder, threads=threads), OnnxModel(judge, threads=threads)
    ways = {}
    for name, way in WAYS.items():
        samplers = [
            Sampler(SamplingSettings(seed=number, **way), seen=ids)  # type: ignore[arg-type]
            for number, ids in enumerate(asked)
        ]
        replies = write_all(
            model, asked, max_new_tokens=max_new_tokens, choose=samplers, end_ids=ends
        )
        loops = [most_repeats(vocabulary.decode(reply)) >= LOOPS for reply in replies]
        sound = [number for number, loop in enumerate(loops) if not loop]
        nats = [nats_per_token(critic, asked[number], replies[number]) for number in sound]
        ways[name] = {
            "loops": float(np.mean(loops)),
            "ended": float(np.mean([reply[-1] in ends for reply in replies])),
            "tokens": float(np.mean([len(reply) for reply in replies])),
            "judge_nats": float(np.mean(nats)) if nats else None,
            "example": vocabulary.decode(replies[0])[:200],
        }
    return {"benchmark": "reply_loops", "folder": folder.name, "ways": ways}


def nats_per_token(model: OnnxModel, prompt: list[int], reply: list[int]) -> float:
    """What a model expects of a reply.

    Args:
        model: The model.
        prompt: Tokens before it.
        reply: Its tokens.

    Returns:
        Mean negative logarithm of their probabilities.
    """
    logits = model.logits(np.array([prompt + reply]))[0, len(prompt) - 1 : -1].astype(np.float64)
    highest = logits.max(1)
    total = highest + np.log(np.exp(logits - highest[:, None]).sum(1))
    return float((total - logits[np.arange(len(reply)), reply]).mean())


def main() -> None:
    """Measure as the command line says, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chatbot", type=Path)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="a text file, one a line")
    parser.add_argument("--most", type=int, default=32, help="prompts to ask")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    prompts = args.prompts.read_text("utf-8").splitlines()
    prompts = prompts[:: max(1, len(prompts) // args.most)][: args.most]
    found = measure(args.chatbot, args.judge, prompts, args.max_new_tokens, args.threads)
    for name, figures in found["ways"].items():
        print(name, {key: value for key, value in figures.items() if key != "example"})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
