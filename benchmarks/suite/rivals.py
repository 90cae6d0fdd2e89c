r"""mistill's chatbot beside engines of others, all of the same weights, in one run.

    python -m benchmarks.suite.rivals CHATBOT --source FLOAT --texts TEXT \
        --llama-cpp PLACE --llama-cpp-programs FOLDER --genai PLACE --openvino PLACE \
        --against llama.cpp:q4_0 genai:best openvino:int4

Writing at two depths, reading a prompt, loading with cold and warm files, time to the first token
and peak memory, all engines taking turns. What is said of two engines is a ratio of the same turn.
The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import BenchSettings, ModelResult, compare
from benchmarks.figures.latency import LatencyAt
from benchmarks.report.timing_columns import roofline_share
from benchmarks.suite.places import add_options, places
from benchmarks.suite.turns import paired_ratio, summary

AGAINST = ("llama.cpp:q4_0", "llama.cpp:q4_k_m", "genai:default", "genai:best")
Figures = Callable[[ModelResult], Sequence[float]]


def main() -> None:
    """Compare, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chatbots", nargs="+", help="ONNX folders")
    parser.add_argument("--source", required=True, help="the float folder that they were made of")
    parser.add_argument("--texts", required=True, help="text that prompts are taken from")
    add_options(parser, AGAINST)
    parser.add_argument("--depth", type=int, default=1024)
    parser.add_argument("--loads", type=int, default=5)
    print(json.dumps(run(parser.parse_args())))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and hold every chatbot against every rival.

    Args:
        args: The command line.

    Returns:
        The JSON document.
    """
    settings = BenchSettings(
        threads=args.threads,
        rounds=args.rounds,
        prompt_tokens=128,
        new_tokens=args.new_tokens,
        turn_seconds=600.0,
        scored_tokens=256,
        transformers_generate=False,
        prompts=(args.prompt,),
        depths=(0, args.depth),
        loads=args.loads,
        against=tuple(args.against),
    )
    found = compare(
        args.chatbots,
        texts=args.texts,
        reference=args.source,
        rivals=places(args),
        rival_source=args.source,
        settings=settings,
    )
    measures = measures_of(args.prompt, args.depth)
    ours = [model for model in found.models if model.rival is None]
    rivals = [model for model in found.models if model.rival is not None]
    return {
        "rounds": args.rounds,
        "threads": args.threads,
        "machine": found.to_dict()["machine"],
        "models": {model.name: figures(model, measures) for model in found.models},
        "ratios": {
            f"{one.name} / {other.name}": ratios(one, other, measures)
            for one in ours
            for other in rivals
        },
        "left_out": {model.name: list(model.left_out) for model in found.models if model.left_out},
    }


def measures_of(prompt: int, depth: int) -> dict[str, Figures]:
    """What is measured, each as numbers in the order of the turns.

    Args:
        prompt: Length of the prompt.
        depth: Tokens after which writing is timed.

    Returns:
        Functions by name; a rate is better when higher, the rest when lower.
    """

    def writing(tokens: int) -> Figures:
        return lambda model: [
            turn.decode_tokens_per_second for turn in _at(model.depths, tokens).latency.turns
        ]

    def loading(cold: bool) -> Figures:
        return lambda model: [load.seconds for load in model.loads if load.cold is cold]

    def answering(cold: bool) -> Figures:
        return lambda model: [
            load.seconds + load.first_token_seconds for load in model.loads if load.cold is cold
        ]

    return {
        "decode_tokens_per_second_at_0": writing(0),
        f"decode_tokens_per_second_at_{depth}": writing(depth),
        f"prompt_tokens_per_second_at_{prompt}": lambda model: [
            turn.prompt_tokens / turn.first_token_seconds
            for turn in _at(model.prompts, prompt).latency.turns
        ],
        "first_token_seconds_at_128": lambda model: [
            turn.first_token_seconds for turn in model.latency.turns
        ],
        "load_seconds_cold": loading(True),
        "load_seconds_warm": loading(False),
        "load_and_first_token_seconds_cold": answering(True),
        "load_and_first_token_seconds_warm": answering(False),
        "peak_memory_bytes": lambda model: [model.footprint.peak_memory_bytes],
    }


def figures(model: ModelResult, measures: Mapping[str, Figures]) -> dict[str, Any]:
    """What was found about one model.

    Args:
        model: The result.
        measures: What was measured.

    Returns:
        Median, lowest and highest of each measure; bytes, and what a rival is.
    """
    found: dict[str, Any] = {
        name: summary([{"value": value} for value in take(model)], "value")
        for name, take in measures.items()
        if take(model)
    }
    found["weight_bytes"] = model.footprint.weight_bytes
    found["bits_per_weight"] = model.footprint.bits_per_weight
    found["roofline_share"] = roofline_share(model)
    found["mean_kl"] = model.mean_kl
    if model.rival is not None:
        found["version"] = model.rival.version
        found["system"] = model.rival.system
        found["made"] = model.rival.made
    return found


def ratios(
    one: ModelResult, other: ModelResult, measures: Mapping[str, Figures]
) -> dict[str, dict[str, float]]:
    """One model over another, turn by turn.

    Args:
        one: The first.
        other: The second.
        measures: What was measured.

    Returns:
        Median, lowest and highest ratio of each measure.
    """
    return {
        name: paired_ratio(
            [{"value": value} for value in take(one)],
            [{"value": value} for value in take(other)],
            "value",
        )
        for name, take in measures.items()
        if take(one) and take(other)
    }


def _at(entries: Sequence[LatencyAt], tokens: int) -> LatencyAt:
    return next(entry for entry in entries if entry.tokens == tokens)


if __name__ == "__main__":
    main()
