"""How much of what pruning lost a student recovers, and what its start was worth.

    python -m benchmarks.suite.recovery TEACHER --texts TRAIN.txt --held-out TEST.txt

Cuts a student out of the teacher, distils it with the live teacher, and says what it was before
and after. With ``--random-tokens`` a student of the same sizes with random weights learns too, for
as many tokens, and the document says after how few tokens the cut one was as good as that one was
in the end. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import distill
from mistill.folders.lineage import read_lineage


def history(folder: Path) -> list[dict[str, Any]]:
    """Every judgement on the way, with the tokens that had been read by then."""
    found, tokens = [], 0
    for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        tokens = entry.get("tokens", tokens)
        if "held_out" in entry:
            found.append({"tokens": tokens, **entry["held_out"]})
    return found


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Cut, train and judge.

    Args:
        args: The command line.
        folder: For the students.

    Returns:
        The JSON document.
    """
    common: dict[str, Any] = {
        "teacher": args.teacher,
        "texts": args.texts,
        "held_out": args.held_out,
        "block_length": args.block_length,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "held_out_tokens": args.held_out_tokens,
        "checkpoint_every": 0,
    }
    student = distill.new_student(
        args.teacher, folder / "student", texts=args.texts, layers=args.layers, heal=False
    )
    trained = distill.train(
        student,
        folder / "trained",
        tokens=args.tokens,
        evaluate_every=args.evaluate_every,
        **common,
    )
    entry = read_lineage(trained)[-1]
    report = {
        "teacher": args.teacher,
        "layers": args.layers,
        "tokens": entry["tokens"],
        "seconds": entry["seconds"],
        "settings": entry["settings"],
        "before": entry["before"],
        "after": entry["after"],
        "history": history(trained),
    }
    if args.random_tokens:
        fresh = distill.new_student(student, folder / "fresh", fresh=True)
        learnt = distill.train(
            fresh, folder / "learnt", tokens=args.random_tokens, evaluate_every=0, **common
        )
        end = read_lineage(learnt)[-1]
        goal = end["after"]["kl"]
        reached = [point["tokens"] for point in report["history"] if point["kl"] <= goal]
        report["random_start"] = {
            "tokens": end["tokens"],
            "before": end["before"],
            "after": end["after"],
            "cut_student_was_as_good_after_tokens": reached[0] if reached else None,
        }
    return report


def main() -> None:
    """Measure, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--texts", default="@demo-train")
    parser.add_argument("--held-out", default="@demo-held-out")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--tokens", type=int, default=61_440)
    parser.add_argument("--random-tokens", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=0)
    parser.add_argument("--held-out-tokens", type=int, default=8_192)
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(args, Path(folder))))


if __name__ == "__main__":
    main()
