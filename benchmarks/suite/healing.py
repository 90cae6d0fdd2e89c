"""What healing in closed form takes off the KL of a pruned student, before any training.

    python -m benchmarks.suite.healing TEACHER --layers 22 --texts TEXT ... --held-out TEXT ...

One student is cut and left as it is, the others are healed, each on as many tokens of every text
as asked for. Judge on several kinds of text, of which some were neither calibrated nor trained
on: a fit may buy closeness on one kind and lose it on another. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import distill
from benchmarks.figures.machine import describe_machine
from mistill.folders.lineage import read_lineage
from mistill.measures.kl import Predictions, compare, predict
from mistill.pytorch.loading import load_pytorch
from mistill.sources.source import resolve_model
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import Vocabulary, load_vocabulary


def main(words: Sequence[str] | None = None) -> None:
    """Cut, heal, measure, and print a JSON document.

    Args:
        words: The command line; None for this process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--intermediate-size", type=int)
    parser.add_argument("--choose", default="influence")
    parser.add_argument("--texts", nargs="+", required=True, help="texts to heal on")
    parser.add_argument("--held-out", nargs="+", required=True, help="texts to measure on")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16_384], help="of each text")
    parser.add_argument("--scored-tokens", type=int, default=4096, help="of each held-out text")
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(run(parser.parse_args(words))))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Make the students and measure them.

    Args:
        args: The command line.

    Returns:
        The JSON document.
    """
    torch.set_num_threads(args.threads)
    teacher = resolve_model(args.teacher)
    vocabulary = load_vocabulary(teacher)
    held_out = held_out_blocks(args.held_out, vocabulary, args.scored_tokens, args.block_length)
    references = predictions_of(teacher, held_out)
    students = []
    for tokens in [0, *args.tokens]:
        students.append(_student(args, teacher, tokens, held_out, references))
        print(json.dumps(students[-1]), file=sys.stderr)
    return {
        "teacher": Path(args.teacher).name,
        "machine": asdict(describe_machine(args.threads)),
        "threads": args.threads,
        "intermediate_size": args.intermediate_size,
        "texts": [Path(text).name for text in args.texts],
        "scored_tokens": {name: int(blocks.kept.sum()) for name, blocks in held_out.items()},
        "students": students,
    }


def _student(
    args: argparse.Namespace,
    teacher: Path,
    tokens: int,
    held_out: dict[str, TokenBlocks],
    references: dict[str, Predictions],
) -> dict[str, Any]:
    """Make one student, and its KL on every text."""
    options: dict[str, Any] = {"heal_tokens": tokens} if tokens else {"heal": False}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        student = distill.new_student(
            teacher,
            Path(folder) / "student",
            texts=args.texts,
            layers=args.layers,
            intermediate_size=args.intermediate_size,
            choose=args.choose,
            block_length=args.block_length,
            **options,
        )
        seconds = time.perf_counter() - started
        entry = read_lineage(student)[-1]
        predicted = predictions_of(student, held_out)
    return {
        "healing_tokens": entry.get("healing_tokens", 0),
        "seconds": seconds,
        "kept_layers": entry["kept_layers"],
        "held_out": figures_of(references, predicted, held_out),
    }


def held_out_blocks(
    texts: Sequence[str], vocabulary: Vocabulary, tokens: int, block_length: int
) -> dict[str, TokenBlocks]:
    """The beginning of every text, as blocks.

    Args:
        texts: Names of texts.
        vocabulary: Of the models.
        tokens: Most tokens of each.
        block_length: Positions of a block.

    Returns:
        Blocks by the names of the texts, without folders.
    """
    return {
        Path(text).name: pack(read_documents(text, vocabulary, limit=tokens), block_length)
        for text in texts
    }


def predictions_of(folder: Path, held_out: Mapping[str, TokenBlocks]) -> dict[str, Predictions]:
    """What a model predicts on every text, in PyTorch.

    Args:
        folder: A model folder.
        held_out: The texts.

    Returns:
        Predictions by the names of the texts.
    """
    model = load_pytorch(folder)
    return {name: predict(model, blocks) for name, blocks in held_out.items()}


def figures_of(
    references: Mapping[str, Predictions],
    predicted: Mapping[str, Predictions],
    held_out: Mapping[str, TokenBlocks],
) -> dict[str, dict[str, Any]]:
    """How close a model is to another one on every text.

    Args:
        references: What the other one predicts.
        predicted: What the model predicts.
        held_out: The texts.

    Returns:
        KL, its standard error and the agreement, by the names of the texts.
    """
    figures = {}
    for name, blocks in held_out.items():
        fidelity = compare({"": references[name]}, {"": predicted[name]}, blocks)[""][""]
        figures[name] = {
            "kl": fidelity.kl,
            "kl_standard_error": fidelity.kl_standard_error,
            "agreement": fidelity.agreement,
        }
    return figures


if __name__ == "__main__":
    main()
