"""The tables of exporting, engines and whole models; ``benchmarks.suite.tables`` lists them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.figures.column import significant
from benchmarks.report.columns import COLUMNS
from benchmarks.suite.cells import Found, number, spread, table

# The figures of a comparison that fit the width of a page, by the keys of its columns.
_TELLING = (
    *("size_mb", "bits_per_weight", "perplexity", "mean_kl_nats", "top1_agreement"),
    *("prompt_tokens_per_second", "decode_tokens_per_second", "peak_memory_mb"),
)


# --- export and engine --------------------------------------------------------------------------


def export_time(report: Found) -> list[str]:
    """Exporting a folder, by ours and by onnxruntime-genai's builder."""
    rows = [
        [
            name,
            spread(one["seconds"]),
            number(one["peak_mib"]["median"]),
            number(one["bytes"] / 1e6),
        ]
        for name, one in report["methods"].items()
    ]
    lines = table(["", "seconds", "peak of the process, MiB", "MB"], rows)
    if "time_over_genai" not in report:
        return lines
    return [
        *lines,
        "",
        f"mistill over genai's builder: {spread(report['time_over_genai'])} of the time, "
        f"{spread(report['peak_over_genai'])} of the peak memory.",
    ]


def export_parity(report: Found) -> list[str]:
    """An ONNX folder against PyTorch with the same weights."""
    row = [
        f"{report['source']}, {report['precision']}",
        f"{report['positions']:,}",
        number(report["max_difference"]),
        number(report["mean_kl"]),
        f"{report['other_top']:,}",
    ]
    heads = ["", "positions", "largest difference of a logit", "mean KL, nats"]
    return table([*heads, "other first token"], [row])


def step_time(report: Found) -> list[str]:
    """A step of one token from sources whose codes are harder to multiply."""
    rows = [
        [
            name,
            spread(milliseconds),
            spread(report["to_plain"][name]) if name in report["to_plain"] else "",
            number(report["packed_bytes_per_token"][name] / 1e6),
            spread(report["around_us"][name]),
        ]
        for name, milliseconds in report["step_ms"].items()
    ]
    return table(
        ["source", "ms a step", "over plain", "MB read a token", "microseconds outside the run"],
        rows,
    )


def later_turn(report: Found) -> list[str]:
    """The first token of a later turn."""
    ratios = {"warm": report["warm_to_cold"], "restored": report["restored_to_cold"]}
    rows = [
        [
            {
                "warm": "has held the conversation",
                "restored": "takes it up from disk",
                "cold": "reads it all",
            }[name],
            spread(_milliseconds(seconds)),
            spread(ratios[name], 2) if name in ratios else "",
        ]
        for name, seconds in report["first_token_seconds"].items()
    ]
    return [
        *table(["the chatbot", "first token, ms", "over reading it all"], rows),
        "",
        f"A prompt of {report['prompt_tokens']:,} tokens in all; {report['kept_bytes'] / 1e6:,.1f} "
        "MB kept on disk.",
    ]


def big_chatbot(report: Found) -> list[str]:
    """A chatbot of Mistral 7B's size: exporting it, and running it."""
    exported, ran = report["export"], report["run"]
    rows = [
        ["exporting, s", number(exported["seconds"])],
        ["its peak memory, GB", f"{exported['peak_memory_bytes'] / 1e9:.2f}"],
        ["GB on disk", f"{exported['weight_bytes'] / 1e9:.2f}"],
        ["opening, s", number(ran["load_seconds"])],
        [
            f"reading {ran['prompt_tokens']} tokens, tok/s",
            number(report["prompt_tokens_per_second"]),
        ],
        ["writing, tok/s", number(report["decode_tokens_per_second"])],
        ["peak memory, GB", f"{ran['peak_memory_bytes'] / 1e9:.2f}"],
        ["share of the roofline", number(report["roofline_share"], 2)],
    ]
    return [
        *table(["", ""], rows),
        "",
        f"{report['layers']} layers, {report['width']:,} wide, {report['parameters'] / 1e9:.2f} "
        "billion random weights.",
    ]


def laptop(report: Found) -> list[str]:
    """Which model answers in time within the memory of a laptop."""
    names = {
        "16-bit": "transformers, 16 bits",
        "nf4": "transformers, NF4",
        "onnx": "mistill, 4-bit ONNX",
    }
    limit = f"{report['limit_bytes'] / 1e9:g} GB"
    rows = []
    for one in report["rows"].values():
        fits = one["ending"] != "memory"
        rows.append(
            [
                f"{one['parameters'] / 1e9:.1f} B, {names[one['form']]}"
                + ("" if one["limited"] else ", no limit of memory"),
                f"{one['weight_bytes'] / 1e9:.2f}",
                ("yes" if fits else "no") if one["limited"] else "",
                f"{one['peak_memory_bytes'] / 1e9:.1f}" if fits else "",
                number(one["load_seconds"]),
                number(_median(one["first_token_seconds"])),
                _reply_seconds(one),
            ]
        )
    heads = ["model", "weights, GB", f"fits in {limit}", "peak memory, GB", "loading, s"]
    ways = {
        "systemd": "a control group of systemd",
        "watching": "a process that watched: what cannot be dropped while a model is loaded, and "
        "mapped weights too while it writes",
    }
    return [
        *table([*heads, "first token, s", f"reply of {report['new_tokens']} tokens, s"], rows),
        "",
        f"Random weights of Mistral's shapes; prompts of {report['prompt_tokens']} tokens, medians "
        f"of {report['replies']} replies after a first, on {report['threads']} processors. Memory "
        f"was limited to {limit} by {ways[report['limited_by']]}.",
    ]


def korean_tokens(report: Found) -> list[str]:
    """What a Korean syllable costs in a vocabulary, and how many a chatbot writes."""
    vocabularies = report["vocabularies"]
    rows = [
        [
            name,
            f"{one['vocabulary_size']:,}",
            f"{one['tokens_per_syllable']:.2f}",
            f"{one['share_of_syllables_in_pieces']:.0%}",
        ]
        for name, one in vocabularies.items()
    ]
    first = next(iter(vocabularies.values()))
    lines = [
        *table(["vocabulary", "tokens", "tokens a syllable", "syllables in pieces"], rows),
        "",
        f"{first['syllables']:,} syllables of {report['texts']}, {first['different_syllables']:,} "
        "different ones; all tokens count, those of spaces and marks too. A syllable in pieces has "
        "no token of its own.",
    ]
    rates = report.get("tokens_per_second")
    if not rates:
        return lines
    rows = [
        [row, number(rate)]
        + [number(rate / one["tokens_per_syllable"]) for one in vocabularies.values()]
        for row, rate in rates.items()
    ]
    heads = [f"syllables/s, {name}" for name in vocabularies]
    return [*lines, "", *table(["row of the laptop", "tokens/s", *heads], rows)]


def _reply_seconds(row: Found) -> str:
    """The median of the whole replies; else how far the first one came."""
    if row["reply_seconds"]:
        return number(_median(row["reply_seconds"]))
    if row["unfinished"]:
        tokens, seconds = row["unfinished"]
        return f"{tokens} tokens in {number(seconds)}"
    return ""


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def speculation(report: Found) -> list[str]:
    """Guessing ahead."""
    rows = [
        [
            name,
            spread(one["speed_up"]),
            f"{one['right']:,} of {one['tried']:,}",
            f"{one['same_tokens']} of {one['tokens']}",
        ]
        for name, one in report["replies"].items()
    ]
    return table(
        ["reply, guesses", "plain time over guessing", "guesses right", "same tokens"], rows
    )


def _milliseconds(seconds: Found) -> dict[str, float]:
    return {name: 1e3 * value for name, value in seconds.items()}


# --- whole models -------------------------------------------------------------------------------


def comparison(report: Found) -> list[str]:
    """A comparison of ``mistill bench``: the figures that fit a page."""
    columns = [
        column
        for column in COLUMNS
        if column.key in _TELLING
        and any(model["summary"].get(column.key) is not None for model in report["models"])
    ]
    heads = ["", *(f"{one.title}{f', {one.unit}' if one.unit else ''}" for one in columns)]
    rows = []
    for model in report["models"]:
        row = [model["name"]]
        for column in columns:
            value = model["summary"].get(column.key)
            row.append("" if value is None else column.write(value))
        rows.append(row)
    text = report["text"]
    return [
        *table(heads, rows),
        "",
        f"{text['tokens_scored']:,} tokens of {', '.join(text['sources'])} (fingerprint "
        f"{text['fingerprint'][:16]}); KL to {report['reference']}; "
        f"{report['settings']['rounds']} rounds, all models taking turns.",
    ]


def rivals(report: Found) -> list[str]:
    """Chatbots beside other engines of the same weights, and every chatbot over every engine."""
    models, pairs = report["models"], report["ratios"]
    measures = [name for name, value in next(iter(models.values())).items() if _is_spread(value)]

    def cell(model: Found, measure: str) -> str:
        return number(_scale(measure) * model[measure]["median"]) if measure in model else ""

    rows = [[_title(one), *(cell(model, one) for model in models.values())] for one in measures]
    rows.append(["MB of weights", *(number(one["weight_bytes"] / 1e6) for one in models.values())])
    rows.append(["KL to the float model", *(number(one["mean_kl"]) for one in models.values())])
    shares = [one.get("roofline_share") for one in models.values()]
    if any(share is not None for share in shares):
        rows.append(["share of the roofline", *(number(share, 2) for share in shares)])
    over = [
        [_title(one).partition(",")[0], *(_ratio(pair, one) for pair in pairs.values())]
        for one in measures
    ]
    lines = [*table(["", *models], rows), ""]
    if pairs:
        lines += [*table(["ratio, lowest and highest", *pairs], over), ""]
    engines = [f"{name}: {one['version']}" for name, one in models.items() if one.get("version")]
    return [*lines, f"{report['rounds']} rounds, all taking turns. {'; '.join(engines)}"]


def rival_tools(report: Found) -> list[str]:
    """What mistill measures of other engines, over what their own programs say."""
    measures = {
        "prompt_tokens_per_second": f"reading {report['prompt']}",
        "decode_tokens_per_second": f"writing {report['new_tokens']}",
    }
    rows = [
        [name, what, *(spread(rival[measure][who]) for who in ("ours", "its_own", "ratio"))]
        for name, rival in report["rivals"].items()
        for measure, what in measures.items()
    ]
    heads = ["", "tokens", "tok/s, by mistill", "by its own program", "ratio"]
    return [*table(heads, rows), "", f"{report['rounds']} turns of each, one after the other."]


_MEASURES = (
    (r"decode_tokens_per_second_at_(\d+)", r"writing after \1 tokens, tok/s", 1.0),
    (r"prompt_tokens_per_second_at_(\d+)", r"reading \1 tokens, tok/s", 1.0),
    (r"first_token_seconds_at_(\d+)", r"first token after \1, ms", 1e3),
    (r"load_seconds_(\w+)", r"loading with \1 files, s", 1.0),
    (r"load_and_first_token_seconds_(\w+)", r"loading with \1 files and first token, s", 1.0),
    (r"peak_memory_bytes", r"peak memory, MB", 1e-6),
)


def _title(measure: str) -> str:
    for pattern, title, _ in _MEASURES:
        if re.fullmatch(pattern, measure):
            return re.sub(pattern, title, measure)
    return measure.replace("_", " ")


def _scale(measure: str) -> float:
    return next((scale for pattern, _, scale in _MEASURES if re.fullmatch(pattern, measure)), 1.0)


def _is_spread(value: Any) -> bool:
    return isinstance(value, Mapping) and "median" in value


def _ratio(pair: Found, measure: str) -> str:
    return spread(pair[measure]) if measure in pair else ""


def quoted_perplexity(report: Found) -> list[str]:
    """Perplexities in two conventions, beside what others measure."""
    rows = []
    for name, one in report["conventions"].items():
        theirs = one.get("theirs")
        rows.append(
            [
                name,
                f"{one['tokens']:,}",
                f"{one['perplexity']:.4f}{_plus_minus(one['standard_error'])}",
                "" if theirs is None else f"{theirs['perplexity']:.4f}, {theirs['by']}",
                "" if theirs is None else f"{100 * one['difference']:+.3f} %",
                f"{one['bits_per_byte']:.4f}",
            ]
        )
    heads = ["as", "tokens scored", "mistill", "others", "difference", "bits per byte"]
    prints = {one["text_fingerprint"][:8] for one in report["conventions"].values()}
    return [
        *table(heads, rows),
        "",
        f"{report['model']} on the beginning of {report['text']} (fingerprints "
        f"{', '.join(sorted(prints))}).",
    ]


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" \u00b1 {significant(error, 2)}"


def same_twice(report: Found) -> list[str]:
    """What was called a difference where there is none."""
    rows = [
        [key, f"{report['alarms'].get(key, 0)}", f"{100 * width:.1f} %"]
        for key, width in report["half_widths"].items()
    ]
    return [
        *table(["figure", "false alarms", "half of the 95% interval, median"], rows),
        "",
        f"{report['model']} compared with itself {report['times']} times, "
        f"{'in runs of their own' if report['apart'] else 'taking turns'}, {report['rounds']} "
        f"rounds each: {report['comparisons_with_an_alarm']} of {report['times']} comparisons "
        "called anything a difference.",
    ]
