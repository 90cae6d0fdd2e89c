"""Is anything called a difference where there is none?

    python -m benchmarks.suite.same_twice MODEL --texts TEXT --times 20

A model and a copy of its folder take turns in one comparison, as often as asked, and
``benchmarks.diff`` says what differs between the two: every verdict of "better" or "worse" is a
false alarm. With ``--apart`` each is measured in a run of its own, one after the other, as a model
is before and after a change; then whatever the machine did in between counts too. At a confidence
of 0.95, no more than one of 20 comparisons should call anything. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import benchmarks
from benchmarks.figures.comparison import Comparison
from benchmarks.figures.machine import describe_machine
from mistill.cost_model.processors import usable_threads

MOST_ALARMS = 0.05
_NAME = "model"


def copied(model: Path, target: Path) -> Path:
    """The same folder under another name; files are linked where that can be done.

    Args:
        model: A folder.
        target: The folder to make.

    Returns:
        The target.
    """

    def link(source: str, to: str) -> None:
        try:
            os.link(source, to)
        except OSError:
            shutil.copy2(source, to)

    shutil.copytree(model, target, copy_function=link)
    return target


def alone(found: Comparison, place: int = 0) -> Comparison:
    """A report of one model of a comparison, under the name that both of a pair have.

    Args:
        found: The comparison.
        place: Which of its models.

    Returns:
        The report; the model is held against nothing.
    """
    model = replace(found.models[place], name=_NAME, fidelity=None)
    return replace(found, models=(model,), reference=_NAME, reference_fingerprint="")


def measure(
    model: Path, texts: str, times: int, apart: bool, settings: benchmarks.BenchSettings
) -> dict[str, Any]:
    """Compare a model with itself, over and over.

    Args:
        model: A folder.
        texts: Text to score.
        times: How often.
        apart: Whether each of a pair is measured in a run of its own.
        settings: How much is measured.

    Returns:
        What was called a difference.
    """
    alarms: list[list[str]] = []
    widths: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        twin = copied(model.resolve(), Path(folder) / "twin")
        for number in range(times):
            if apart:
                runs = [
                    benchmarks.compare([model], texts=texts, settings=settings) for _ in range(2)
                ]
                pair = alone(runs[0]), alone(runs[1])
            else:
                # The one that comes first changes places, as nothing should depend on it.
                order = [model, twin] if number % 2 else [twin, model]
                both = benchmarks.compare(order, texts=texts, settings=settings)
                pair = alone(both, 0), alone(both, 1)
            found = benchmarks.diff(*pair)
            called = [
                change.column.key
                for change in found.changes
                if change.verdict in ("better", "worse")
            ]
            alarms.append(called)
            for change in found.changes:
                if change.interval is not None:
                    low, high = change.interval
                    widths.setdefault(change.column.key, []).append((high - low) / 2)
            print(f"{number + 1}: {', '.join(called) or 'nothing'}", file=sys.stderr, flush=True)
    wrong = sum(map(bool, alarms))
    threads = settings.threads or usable_threads()
    return {
        "benchmark": "same_twice",
        "model": model.name,
        "threads": threads,
        "times": times,
        "apart": apart,
        "rounds": settings.rounds,
        "comparisons_with_an_alarm": wrong,
        "alarms": dict(Counter(key for called in alarms for key in called)),
        "half_widths": {key: sorted(found)[len(found) // 2] for key, found in widths.items()},
        "met": wrong <= MOST_ALARMS * times,
        "machine": asdict(describe_machine(threads)),
    }


def main() -> None:
    """Parse the command line and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", default="@demo-held-out")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--scored-tokens", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    settings = benchmarks.BenchSettings(
        rounds=args.rounds,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        scored_tokens=args.scored_tokens,
        threads=args.threads,
        transformers_generate=False,
    )
    print(json.dumps(measure(args.model, args.texts, args.times, args.apart, settings)))


if __name__ == "__main__":
    main()
