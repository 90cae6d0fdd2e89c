"""Which model answers in time on a laptop with 8 GB and two cores.

    python -m benchmarks.suite.laptop --folder /somewhere/with/room
    python -m benchmarks.suite.laptop --rows 1.2b 0.8b 0.4b      # in two minutes and 3 GB of disk

A teacher of Mistral 7B's shapes runs in transformers, in 16 bits and in NF4 (bitsandbytes); beside
it run 4-bit ONNX chatbots of 7, 1.2, 0.8 and 0.4 billion weights, the smaller ones with the layers
and widths of pruned students. Each is a process of its own, on two processors, that is ended above
8 GB of memory; ``benchmarks.suite.memory_limit`` says how. ``16-bit-unlimited`` is the teacher in
16 bits on a machine where it fits. Each answers prompts of 60 tokens with 60 tokens, after one that
warms it up: time is counted from the prompt to the first token, and to the last.

The weights are random numbers: time and memory depend on shapes alone. Sources are written to disk
in bfloat16 (14.5 GB for the teacher) and deleted as soon as they have been read, so that the
folder needs 24 GB. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from benchmarks.figures.machine import describe_machine
from benchmarks.measure.loading import drop_from_page_cache
from benchmarks.suite.memory_limit import Ended, Way, find_way, run_limited
from benchmarks.suite.random_mistral import child_environment, make_folder

PROMPT_TOKENS = 60
NEW_TOKENS = 60
PROCESSORS = 2

_READY = '{"event": "loaded"'

_Form = Literal["16-bit", "nf4", "onnx"]
_Write = Callable[[list[int], int, Callable[[], None]], None]


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        form: What runs it: transformers in 16 bits or NF4, or a 4-bit ONNX chatbot.
        layers: Decoder layers.
        width: Hidden size.
        limited: Whether its memory is limited.
    """

    form: _Form
    layers: int
    width: int
    limited: bool = True


ROWS = {
    "16-bit": Row("16-bit", 32, 4096),
    "16-bit-unlimited": Row("16-bit", 32, 4096, limited=False),
    "nf4": Row("nf4", 32, 4096),
    "7b": Row("onnx", 32, 4096),
    "1.2b": Row("onnx", 20, 2048),
    "0.8b": Row("onnx", 12, 2048),
    "0.4b": Row("onnx", 10, 1536),
}


def answer_here(form: _Form, folder: Path, prompt: int, new_tokens: int, replies: int) -> None:
    """Open a model in this process, answer prompts, and print each moment as a line of JSON.

    Args:
        form: What runs it.
        folder: The model.
        prompt: Tokens of each prompt.
        new_tokens: Tokens of each reply.
        replies: Prompts after the first, which warms up.
    """
    begun = time.perf_counter()
    write = _onnx_writer(folder) if form == "onnx" else _transformers_writer(folder)
    _print_event(event="loaded", seconds=time.perf_counter() - begun)  # as _READY begins
    for reply in range(replies + 1):
        # Every prompt begins otherwise, so that nothing of it is in the cache.
        ids = [(7 * reply + 11 * place) % 200 + 5 for place in range(prompt)]
        asked = time.perf_counter()

        def on_token(reply: int = reply, asked: float = asked) -> None:
            _print_event(event="token", reply=reply, seconds=time.perf_counter() - asked)

        write(ids, new_tokens, on_token)
        _print_event(event="memory", bytes=_peak_bytes())


def measure_row(
    row: Row, folder: Path, way: Way, limit_bytes: int, limit_seconds: float, replies: int
) -> dict[str, Any]:
    """Answer with one model within the limits.

    Args:
        row: Which model.
        folder: The model.
        way: How memory is limited.
        limit_bytes: Memory that it may hold.
        limit_seconds: Time that it may take, loading included.
        replies: Prompts after the first.

    Returns:
        What was found.

    Raises:
        RuntimeError: If the process failed by itself.
    """
    words = [sys.executable, "-m", __spec__.name, "--child", row.form, str(folder)]
    numbers = map(str, (PROMPT_TOKENS, NEW_TOKENS, replies))
    if way == "systemd" and row.limited:
        # A page that is cached counts for the control group that read it first, which is not the
        # model's.
        drop_from_page_cache(folder)
    ended = run_limited(
        [*words, *numbers],
        way if row.limited else "none",
        limit_bytes,
        limit_seconds,
        child_environment(PROCESSORS),
        ready=_READY,
    )
    if ended.ending == "failed":
        raise RuntimeError(f"{row.form} in {folder.name} failed: {ended.errors}")
    weights = [*folder.glob("*.safetensors"), *folder.glob("model.onnx*")]
    return {
        **asdict(row),
        "weight_bytes": sum(file.stat().st_size for file in weights),
        **figures(ended, NEW_TOKENS),
    }


def figures(ended: Ended, new_tokens: int) -> dict[str, Any]:
    """What the lines of a process say.

    Args:
        ended: How it ended, and what it printed.
        new_tokens: Tokens of a whole reply.

    Returns:
        Seconds of loading, and those to the first and to the last token of each whole reply after
        the first. Of a process that did not get so far, those of the reply that it had begun.
    """
    events = [json.loads(line) for line in ended.lines if line.startswith("{")]
    loaded = [event["seconds"] for event in events if event["event"] == "loaded"]
    replies: dict[int, list[float]] = {}
    for event in events:
        if event["event"] == "token":
            replies.setdefault(event["reply"], []).append(event["seconds"])
    counted = [times for reply, times in replies.items() if reply] or [*replies.values()]
    whole = [times for times in counted if len(times) == new_tokens]
    peaks = [event["bytes"] for event in events if event["event"] == "memory"]
    return {
        "ending": ended.ending,
        "load_seconds": loaded[0] if loaded else None,
        "first_token_seconds": [times[0] for times in counted],
        "reply_seconds": [times[-1] for times in whole],
        "unfinished": None if whole or not counted else [len(counted[0]), counted[0][-1]],
        "peak_memory_bytes": max([ended.peak_bytes, *peaks]),
    }


def measure(
    folder: Path,
    rows: Sequence[str],
    limit_bytes: int,
    limit_seconds: float,
    replies: int,
    shapes: dict[str, Row] = ROWS,
) -> dict[str, Any]:
    """Make the models one after another, and answer with each.

    Args:
        folder: Where there is room.
        rows: Names of rows.
        limit_bytes: Memory that a model may hold.
        limit_seconds: Time that a model may take.
        replies: Prompts to each after the first.
        shapes: Rows by name.

    Returns:
        What was found.
    """
    way = find_way(limit_bytes)
    report: dict[str, Any] = {}
    parameters: dict[tuple[int, int], int] = {}
    # Models of one shape follow one another, and share a source.
    for shape in dict.fromkeys((shapes[name].layers, shapes[name].width) for name in rows):
        named = [name for name in rows if (shapes[name].layers, shapes[name].width) == shape]
        for name, model in _models(folder, {name: shapes[name] for name in named}, parameters):
            row = shapes[name]
            _log_line(f"{name}: answering")
            report[name] = measure_row(row, model, way, limit_bytes, limit_seconds, replies)
            report[name]["parameters"] = parameters[shape]
            _log_line(f"{name}: {json.dumps(report[name])[:400]}")
    return {
        "benchmark": "laptop",
        "threads": PROCESSORS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "replies": replies,
        "limit_bytes": limit_bytes,
        "limited_by": way,
        "limit_seconds": limit_seconds,
        "rows": {name: report[name] for name in rows},
        "machine": asdict(describe_machine(PROCESSORS)),
    }


def _models(
    folder: Path, rows: dict[str, Row], parameters: dict[tuple[int, int], int]
) -> Iterator[tuple[str, Path]]:
    """Folders of some rows of one shape, which are made and deleted as the caller goes on."""
    import export
    import quantize

    first = next(iter(rows.values()))
    source, small = folder / "source", folder / "small"
    _log_line(f"writing {first.layers} layers of width {first.width}")
    parameters[first.layers, first.width] = make_folder(source, first.layers, first.width)
    order: tuple[_Form, ...] = ("16-bit", "nf4", "onnx")
    named = sorted(rows, key=lambda name: order.index(rows[name].form))
    for name in named:
        form = rows[name].form
        if form == "nf4":
            _log_line(f"{name}: quantizing")
            quantize.to_nf4(source, small)
        elif form == "onnx":
            _log_line(f"{name}: exporting")
            export.to_onnx(source, small, precision="int4", parity_positions=0)
        if name == named[-1]:
            # A source that nobody reads any more leaves its room, on the disk and in memory.
            if form == "16-bit":
                yield name, source
            shutil.rmtree(source)
        elif form == "16-bit":
            yield name, source
        if form != "16-bit":
            yield name, small
            shutil.rmtree(small)


def _onnx_writer(folder: Path) -> _Write:
    from mistill.engine.onnx_model import OnnxModel

    model = OnnxModel(folder, threads=PROCESSORS)

    def write(ids: list[int], new_tokens: int, on_token: Callable[[], None]) -> None:
        stream = model.stream(ids)
        for _ in range(new_tokens):
            next(stream)
            on_token()

    return write


def _transformers_writer(folder: Path) -> _Write:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(PROCESSORS)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def write(ids: list[int], new_tokens: int, on_token: Callable[[], None]) -> None:
        model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=_Streamer(on_token),
        )

    return write


class _Streamer:
    """What ``generate`` hands its tokens to; the first call holds the prompt."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, _: object) -> None:
        if self._prompt_seen:
            self._on_token()
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is kept back."""


def _peak_bytes() -> int:
    from benchmarks.figures.footprint import own_memory

    return own_memory().peak_bytes


def _print_event(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _log_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--folder", type=Path, help="where to write; a temporary folder if left out"
    )
    parser.add_argument("--memory-gb", type=float, default=8.0, help="memory of the laptop")
    parser.add_argument(
        "--most-seconds", type=float, default=150.0, help="time of a row, loading included"
    )
    parser.add_argument("--replies", type=int, default=3, help="to each after one that warms up")
    parser.add_argument(
        "--quick", action="store_true", help="two layers of width 512 for every row: a rehearsal"
    )
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        form, folder, *numbers = args.child
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:PROCESSORS])
        answer_here(form, Path(folder), *map(int, numbers))
        return
    if args.replies < 1 or args.memory_gb <= 0 or args.most_seconds <= 0:
        parser.error("--replies, --memory-gb and --most-seconds must be above 0")
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    shapes = ROWS
    if args.quick:
        shapes = {name: Row(row.form, 2, 512, row.limited) for name, row in ROWS.items()}
    with TemporaryDirectory(dir=args.folder) as folder:
        report = measure(
            Path(folder),
            args.rows,
            int(args.memory_gb * 1e9),
            args.most_seconds,
            args.replies,
            shapes,
        )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
