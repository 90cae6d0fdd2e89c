"""Reinforcement against a check of JSON: how many replies are valid before and after.

    python -m benchmarks.suite.json_replies MODEL

The prompts are made here: a person and an age, to be written as a JSON object with the keys name
and age and nothing else. ``tune.reinforce`` learns from some of them, and replies to others are
sampled at temperature 1 from the model before and after, and written with the likeliest tokens. A
reply that is cut off is not valid. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tune
from benchmarks.figures.machine import describe_machine
from mistill.judging.checks import fits_schema
from mistill.measures.shares import simple_interval
from mistill.pytorch.loading import load_pytorch
from mistill.pytorch.writing import write_replies
from mistill.sources.source import resolve_model
from mistill.text.answers import prompt_ids
from mistill.text.conversation import Conversation
from mistill.text.vocabulary import load_vocabulary

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NAMES = (
    *("Ana", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira"),
    *("Liam", "Mona", "Nils", "Olga", "Paul", "Quinn", "Rosa", "Sven", "Tara", "Uma", "Viktor"),
)


def prompts_of(count: int, seed: int) -> list[str]:
    """Prompts, no two alike.

    Args:
        count: How many.
        seed: Decides which.

    Returns:
        Texts.
    """
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(NAMES) * 80, generator=generator)[:count].tolist()
    return [
        f"{NAMES[place % len(NAMES)]} is {10 + place // len(NAMES)} years old. Write this as a "
        "JSON object with the keys name and age, and nothing else."
        for place in places
    ]


def replies_of(
    folder: Path, prompts: Sequence[str], most: int, *, sampled: bool, seed: int = 0
) -> list[str | None]:
    """Replies of a model.

    Args:
        folder: A float folder.
        prompts: What is asked.
        most: Most tokens of a reply.
        sampled: Whether they are drawn at temperature 1, or the likeliest.
        seed: Decides what is drawn.

    Returns:
        Their texts; None for a reply that was cut off.
    """
    vocabulary = load_vocabulary(folder)
    model: Any = load_pytorch(folder)
    all_ids = [
        prompt_ids(Conversation(({"role": "user", "content": prompt},)), vocabulary)
        for prompt in prompts
    ]
    ends = vocabulary.end_ids
    torch.manual_seed(seed)
    return [
        vocabulary.decode(reply[:-1]) if reply[-1] in ends else None
        for reply in write_replies(model, all_ids, ends, most, sampled=sampled)
    ]


def shares(folder: Path, prompts: Sequence[str], most: int) -> dict[str, Any]:
    """Which share of a model's replies is valid.

    Args:
        folder: A float folder.
        prompts: What is asked.
        most: Most tokens of a reply.

    Returns:
        Shares of ``sampled`` replies and of the ``likeliest`` ones with Wilson's 95% intervals,
        the share that was cut off, and a few replies.
    """
    figures: dict[str, Any] = {}
    for name in ("sampled", "likeliest"):
        replies = replies_of(folder, prompts, most, sampled=name == "sampled")
        valid = sum(reply is not None and fits_schema(SCHEMA, reply) for reply in replies)
        figures[name] = {
            "valid": valid / len(replies),
            "interval": simple_interval(valid, len(replies)),
            "cut_off": replies.count(None) / len(replies),
            "examples": replies[:3],
        }
    return figures


def main() -> None:
    """Tune, measure, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, help="where the tuned model is kept")
    parser.add_argument("--prompts", type=int, default=160, help="prompts to learn from")
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--method", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts = prompts_of(args.prompts + args.held_out, args.seed)
    learned, held_out = prompts[: args.prompts], prompts[args.prompts :]
    folder = resolve_model(args.model)
    document: dict[str, Any] = {
        "benchmark": "json_replies",
        "model": args.model,
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": vars(describe_machine(args.threads)),
        "before": shares(folder, held_out, args.max_new_tokens),
    }
    print("before", json.dumps(document["before"]), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "prompts.txt").write_text("\n".join(learned), "utf-8")
        (place / "held-out.txt").write_text("\n".join(held_out[:16]), "utf-8")
        started = time.perf_counter()
        tuned = tune.reinforce(
            folder,
            args.out or place / "tuned",
            prompts=place / "prompts.txt",
            held_out=place / "held-out.txt",
            check="json",
            schema=json.dumps(SCHEMA),
            method=args.method,
            steps=args.steps,
            samples=args.samples,
            batch_size=args.batch_size,
            micro_batch_size=args.micro_batch_size,
            learning_rate=args.learning_rate,
            lora_rank=args.lora_rank,
            evaluate_every=args.steps,
            max_new_tokens=args.max_new_tokens,
            max_length=256,
            keep="last",
            seed=args.seed,
        )
        document["seconds"] = round(time.perf_counter() - started)
        document["after"] = shares(tuned, held_out, args.max_new_tokens)
        report = json.loads((tuned / "tuning_report.json").read_text("utf-8"))
        document["report"] = report
        lines = (tuned / "metrics.jsonl").read_text("utf-8").splitlines()
        steps = [entry for entry in map(json.loads, lines) if "reward" in entry]
        document["reward_by_step"] = [round(entry["reward"], 4) for entry in steps]
        document["kl_by_step"] = [round(entry["kl_from_start"], 4) for entry in steps]
    print(json.dumps(document))


if __name__ == "__main__":
    main()
