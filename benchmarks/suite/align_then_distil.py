"""Does tuning the teacher before distilling pay on the tuned task, at equal tokens?

    python -m benchmarks.suite.align_then_distil MODEL

The task is made here and checked by a machine: sums in words, answered in one fixed form. The
teacher is tuned on it (LoRA). Students with the same layers are cut from the teacher as it came and
from the tuned one, and each is distilled from its own teacher on the same conversations, as many
tokens each. A third student has the teacher as it came and learns the conversations too, by
cross-entropy with half of the weight. All are judged on held-out sums: cross-entropy of the right
answer, and the share of greedy replies that are right to the letter. The last line is one JSON
document.
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

import distill
import tune
from benchmarks.figures.machine import describe_machine
from benchmarks.suite.json_replies import replies_of
from mistill.measures.kl import next_token_losses, predict
from mistill.measures.shares import simple_interval
from mistill.measures.significance import of_mean
from mistill.measures.uncertainty import Samples, mean_of
from mistill.pytorch.loading import load_pytorch
from mistill.sources.source import resolve_model
from mistill.text.blocks import pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary

WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)

TUNED = "student of the tuned teacher"

_BLOCK = 256


def sums(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions and their answers, no two alike.

    Args:
        count: How many, at most 100.
        seed: Decides their order.

    Returns:
        Pairs of texts.
    """
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [
        (
            f"What is {WORDS[place // 10]} plus {WORDS[place % 10]}?",
            f"{WORDS[place // 10]} + {WORDS[place % 10]} = {WORDS[place // 10 + place % 10]}",
        )
        for place in order
    ]


def written(rows: Sequence[tuple[str, str]], file: Path) -> Path:
    """Write conversations as JSON lines."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
        for question, answer in rows
    ]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def judged(folder: Path, rows: Sequence[tuple[str, str]], held_out: Path) -> dict[str, Any]:
    """What a model is worth on held-out sums.

    Args:
        folder: A float folder.
        rows: Questions and answers.
        held_out: The same as a file.

    Returns:
        ``cross_entropy`` of the answers in nats a token, ``right`` and its 95% interval, ``losses``
        token by token, and a few replies.
    """
    # One conversation a block, so that errors are those between conversations.
    documents = list(read_documents(held_out, load_vocabulary(folder)))
    blocks = pack(documents, max(len(one.ids) for one in documents))
    losses = next_token_losses(predict(load_pytorch(folder), blocks), blocks)
    replies = replies_of(folder, [question for question, _ in rows], 16, sampled=False)
    right = sum(
        reply is not None and reply.strip() == answer
        for reply, (_, answer) in zip(replies, rows, strict=True)
    )
    return {
        "cross_entropy": mean_of(losses),
        "right": right / len(rows),
        "right_interval": simple_interval(right, len(rows)),
        "losses": losses,
        "replies": replies[:3],
    }


def paired(old: Samples, new: Samples) -> dict[str, float]:
    """The change of a cross-entropy with its paired standard error."""
    shift = of_mean(old, new)
    assert shift is not None, "there is more than one conversation"
    return {"change": shift.change, "standard_error": shift.error}


def run(args: argparse.Namespace, place: Path, seed: int) -> dict[str, Any]:
    """Tune, cut, distil and judge.

    Args:
        args: The command line.
        place: A folder for the models; those that are there are not made again.
        seed: Of the sums, the adapters and the order of the text.

    Returns:
        Figures of all models.
    """
    rows = sums(100, seed)
    learned, held = rows[: -args.held_out], rows[-args.held_out :]
    texts = written(learned, place / "learned.jsonl")
    held_out = written(held, place / "held-out.jsonl")
    base = resolve_model(args.model)
    common: dict[str, Any] = {
        "texts": texts,
        "held_out": held_out,
        "block_length": _BLOCK,
        "batch_size": 1,
        "evaluate_every": 0,
        "checkpoint_every": 0,
        "seed": seed,
    }
    tuned = place / "tuned"
    if not tuned.is_dir():
        options: dict[str, Any] = {"replies": 0, "other_tokens": 0}
        options |= {"learning_rate": args.tuning_rate, "tokens": args.tuning_tokens}
        tune.supervised(base, tuned, **options, **common)
    models = {"teacher as it came": base, "teacher tuned": tuned}
    arms: dict[str, tuple[Path, dict[str, float]]] = {
        TUNED: (tuned, {}),
        "student of the teacher as it came": (base, {}),
        "student of the teacher as it came, and the text": (base, {"cross_entropy": 0.5}),
    }
    for name in list(arms)[: args.arms]:
        teacher, loss = arms[name]
        models[name] = target = place / name.replace(" ", "-").replace(",", "")
        if target.is_dir():
            continue
        student = target.with_name(f"{target.name}-cut")
        if not student.is_dir():
            distill.new_student(teacher, student, choose="named", keep=tuple(args.keep), heal=False)
        options = {"learning_rate": args.rate, "tokens": args.tokens, **loss}
        distill.train(student, target, teacher=teacher, **options, **common)
    figures = {name: judged(folder, held, held_out) for name, folder in models.items()}
    document: dict[str, Any] = {
        "seed": seed,
        "tuned_student_less": {
            name: paired(one["losses"], figures[TUNED]["losses"])
            for name, one in figures.items()
            if name in arms and name != TUNED
        },
    }
    for one in figures.values():
        del one["losses"]
    return {**document, "models": figures}


def main() -> None:
    """Measure, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tuning-tokens", type=int, default=6000)
    parser.add_argument("--tokens", type=int, default=4000, help="that each student learns from")
    parser.add_argument("--tuning-rate", type=float, default=1e-3)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--held-out", type=int, default=30)
    parser.add_argument(
        *("--keep",),
        type=int,
        nargs="+",
        default=[n for n in range(30) if n not in (20, 22, 24, 26)],
    )
    parser.add_argument("--arms", type=int, default=3, help="students: 2 leaves the last one out")
    parser.add_argument("--out", type=Path, help="where models are kept, for a later run to go on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            place = (args.out or Path(scratch)) / f"seed-{seed}"
            place.mkdir(parents=True, exist_ok=True)
            runs.append(run(args, place, seed))
            print(json.dumps(runs[-1]), flush=True)
    document = {
        "benchmark": "align_then_distil",
        "model": args.model,
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": vars(describe_machine(args.threads)),
        "runs": runs,
        "seconds": round(time.perf_counter() - started),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
