"""What do cached targets cost on disk, and how much do draws vary?

Caches one text in both codes, counts every byte of the folders, times reading, and compares the
variance of systematic with independent draws over the teacher's own distributions. Run from a
checkout, with a float teacher folder:

    python -m benchmarks.suite.target_bytes TEACHER --texts @demo-train --tokens 8192

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

import distill
import mistill
from distill.targets.codec import id_bits
from distill.teacher.teacher import LiveTeacher
from mistill.folders.folder import open_folder
from mistill.folders.lineage import fingerprint, installed_versions
from mistill.folders.location import location_of
from mistill.folders.targets_folder import describe_targets
from mistill.loss.batches import make_batch
from mistill.loss.losses import chunks
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import TokenBlocks, pack
from mistill.text.documents import read_documents
from mistill.text.rows import SHIPPED
from mistill.text.vocabulary import Vocabulary, load_vocabulary

_READINGS = 7


def some_text(texts: str, vocabulary: Vocabulary, tokens: int, folder: Path) -> Path:
    """The first rows of a .jsonl file that hold a number of tokens, or the start of a .txt file."""
    file = folder / "some.jsonl"
    if texts.endswith(".txt"):
        (start, *_) = read_documents(texts, vocabulary, limit=tokens)
        file.write_text(json.dumps({"text": vocabulary.decode(start.ids.tolist())}) + "\n")
        return file
    source = Path(mistill.__file__).parent / "data" / SHIPPED[texts] if texts in SHIPPED else texts
    rows = []
    for row in Path(source).read_text("utf-8").splitlines(keepends=True):
        rows.append(row)
        file.write_text("".join(rows), "utf-8")
        if sum(len(document.ids) for document in read_documents(file, vocabulary)) >= tokens:
            break
    return file


def tokens_per_second(folder: Path, vocabulary: Vocabulary, blocks: TokenBlocks) -> list[float]:
    """How fast blocks are read, checked and decoded, two at a time, by one thread."""
    teacher = distill.open_targets(folder, vocabulary, texts=[("texts", blocks)])
    found = []
    for _ in range(_READINGS):
        begun = time.perf_counter()
        for place in range(0, len(blocks), 2):
            part = blocks[place : place + 2]
            teacher.targets(part, make_batch(part, torch.device("cpu")))
        found.append(blocks.tokens / (time.perf_counter() - begun))
    teacher.close()
    return found


def cached(
    codec: Literal["plain", "coded"],
    draws: int,
    arguments: argparse.Namespace,
    texts: Path,
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Cache a text and count."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "targets"
        begun = time.perf_counter()
        distill.cache_targets(arguments.teacher, target, texts=texts, codec=codec, draws=draws)
        seconds = time.perf_counter() - begun
        info = describe_targets(location_of(target))
        blocks = pack(read_documents(texts, vocabulary), 512)
        rates = tokens_per_second(target, vocabulary, blocks)
    different = info.stored_tokens / info.positions
    spared = different * (id_bits(info.vocabulary_size) - 15) / 8
    return {
        "codec": codec,
        "draws": draws,
        "positions": info.positions,
        "pieces": info.pieces,
        "different_tokens": different,
        "mean_entropy": info.mean_entropy,
        "bytes_per_position": info.bytes_per_position,
        # Only the plain code spends all bits of an id.
        "with_15_bit_ids": info.bytes_per_position - spared if codec == "plain" else None,
        "seconds_to_make": seconds,
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_samples": rates,
    }


def variances(teacher: Path, blocks: TokenBlocks, draws: int) -> dict[str, float]:
    """Expected squared error of the drawn distribution, summed over tokens, per position.

    A token of probability p is drawn floor(N p) or ceil(N p) times by systematic resampling,
    with variance f (1 - f) for the fraction f of N p, and N p (1 - p) by independent draws.
    """
    model = LiveTeacher(load_pytorch(teacher))
    cpu = torch.device("cpu")
    even = apart = 0.0
    positions = 0
    with torch.inference_mode():
        for place in range(len(blocks)):
            part = blocks[place : place + 1]
            dense = model.targets(part, make_batch(part, cpu))
            size = dense.vocabulary_size
            for rows, (a, b) in chunks(len(dense), size, torch.float32, cpu, 64, 2):
                p = dense.log_probabilities(rows, 1.0, out=a, scratch=b).exp().double()
                f = (draws * p) % 1
                even += float((f * (1 - f)).sum()) / draws**2
                apart += float((p * (1 - p)).sum()) / draws
            positions += len(dense)
    return {"systematic": even / positions, "multinomial": apart / positions, "ratio": even / apart}


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--texts", default="@demo-train")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--draws", type=int, nargs="*", default=[50])
    parser.add_argument("--variance-tokens", type=int, default=1024)
    arguments = parser.parse_args(words)
    open_folder(arguments.teacher)
    vocabulary = load_vocabulary(arguments.teacher)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        texts = some_text(arguments.texts, vocabulary, arguments.tokens, Path(folder))
        for draws in arguments.draws:
            for codec in ("plain", "coded"):
                results.append(cached(codec, draws, arguments, texts, vocabulary))
                shown = results[-1]
                words_shown = f"{codec} {draws} draws: {shown['bytes_per_position']:.2f} bytes"
                print(words_shown, file=sys.stderr)
    few = pack(read_documents(arguments.texts, vocabulary, limit=arguments.variance_tokens), 512)
    document = {
        "benchmark": "target_bytes",
        "teacher": fingerprint(arguments.teacher)[:16],
        "texts": arguments.texts,
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
        "results": results,
        "squared_error": {
            draws: variances(arguments.teacher, few, draws) for draws in arguments.draws
        },
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
