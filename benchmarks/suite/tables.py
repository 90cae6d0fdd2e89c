"""The form of every program's table: its JSON document in, lines of Markdown out.

A form shows what the document holds and nothing else; what it means is for the prose around it.
``benchmarks.suite.page`` says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.columns import COLUMNS, significant

Found = Mapping[str, Any]

_MIB = 2**20
_GIB = 2**30
# The figures of a comparison that fit the width of a page, by the keys of its columns.
_TELLING = (
    *("size_mb", "bits_per_weight", "perplexity", "mean_kl_nats", "top1_agreement"),
    *("prompt_tokens_per_second", "decode_tokens_per_second", "peak_memory_mb"),
)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first column names things and whose others hold numbers.

    Args:
        heads: One for each column; the first may be empty.
        rows: Cells, as many as heads.

    Returns:
        Lines of Markdown.
    """
    lines = [_line(heads), f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in rows:
        assert len(row) == len(heads), f"{len(row)} cells under {len(heads)} heads"
        lines.append(_line(row))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def number(value: float | None, digits: int = 3) -> str:
    """A number as a table shows it.

    Args:
        value: The number; None where there is none.
        digits: Significant digits, if it is not larger than that.

    Returns:
        Text; empty where there is none.
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else significant(value, digits)


def spread(figure: Found, digits: int = 3) -> str:
    """A median with the lowest and the highest of its turns.

    Args:
        figure: ``median``, ``lowest`` and ``highest``.
        digits: Significant digits.

    Returns:
        Such as ``0.72 (0.70 to 0.75)``.
    """
    low, high = number(figure["lowest"], digits), number(figure["highest"], digits)
    return f"{number(figure['median'], digits)} ({low} to {high})"


def _with_error(value: float, error: float | None) -> str:
    return number(value) if error is None else f"{number(value)} \u00b1 {significant(error, 1)}"


def _range(values: Sequence[float], digits: int = 3) -> str:
    low, high = number(min(values), digits), number(max(values), digits)
    return low if low == high else f"{low} to {high}"


# --- distillation -------------------------------------------------------------------------------


def loss_head(found: Found) -> list[str]:
    """Time and memory of every way to compute the loss, with all positions and with some."""
    kept = {name.removeprefix("kept "): table for name, table in found.items() if "kept " in name}
    heads = [""]
    for share in kept:
        words = (
            "all positions" if share == "1" else f"{float(share):.0%} of them".replace("%", " %")
        )
        heads += [f"{words}: seconds", "peak, MiB", "mistill's time over it", "memory"]
    rows = []
    for method in next(iter(kept.values())):
        row = ["mistill" if method == "ours" else method]
        for methods in kept.values():
            one = methods[method]
            row += [number(one["seconds"]["median"]), number(one["peak_mib"]["median"])]
            ours = method == "ours"
            row += (
                ["", ""]
                if ours
                else [
                    spread(one["ours_seconds_ratio"], 2),
                    number(one["ours_peak_ratio"]["median"], 2),
                ]
            )
        rows.append(row)
    V, T, student, teacher = found["shape"]
    exact = found["exactness"]
    return [
        *table(heads, rows),
        "",
        f"Vocabulary {V:,}, {T:,} positions, student {student:,} wide, teacher {teacher:,}. "
        f"Against float64: relative error of the loss {exact['loss_relative_error']:.0e}, cosine "
        f"of the gradients {exact['hidden_gradient_cosine']:.12f} and "
        f"{exact['head_gradient_cosine']:.12f}, loss of a model with itself "
        f"{number(exact['loss_of_a_model_with_itself'])}.",
    ]


def training_step(found: Found) -> list[str]:
    """Tokens a second and memory of a whole training step."""
    rows = [
        [
            {"live": "live teacher", "cached": "cached targets", "trl": "TRL GKDTrainer"}[method],
            spread(figures["tokens_per_second"]),
            number(figures["process_peak_mib"]["median"]),
            number(figures["peak_mib"]["median"]),
        ]
        for method, figures in found["methods"].items()
    ]
    lines = table(["", "tokens/s", "peak of the process, MiB", "peak above rest, MiB"], rows)
    words = [f"Cached over live: {spread(found['cached_over_live'])} times the tokens a second."]
    if "live_over_trl" in found:
        words.append(
            f"Live over TRL: {spread(found['live_over_trl'])} times, "
            f"{number(found['live_peak_over_trl']['median'], 2)} of the process's peak memory, "
            f"{number(found['live_step_memory_over_trl']['median'], 2)} of what the step adds."
        )
    return [*lines, "", " ".join(words)]


# --- quantization -------------------------------------------------------------------------------


def quantized_kl(found: Found) -> list[str]:
    """What every way of quantizing costs."""
    rows = []
    for name, way in found["ways"].items():
        runs = way["runs"]
        regained = found["recovered"].get(name)
        rows.append(
            [
                name,
                _with_error(way["kl"], runs[0]["kl_standard_error"]),
                _range([run["kl"] for run in runs]) if len(runs) > 1 else "",
                _range(regained, 2) if regained else "",
                number(way["perplexity"], 4),
                f"{way['agreement']:.3f}",
                number(way["weight_bytes"] / 1e6),
                number(way["seconds"]),
                number(way["peak_mib"]),
            ]
        )
    heads = ["", "KL", "seeds", "of rounding's KL recovered", "perplexity", "same first token"]
    lines = table([*heads, "MB", "seconds", "peak, MiB"], rows)
    words = [
        f"KL(float \\|\\| quantized) in nats on {found['held_out_tokens']:,} held-out tokens; "
        f"calibrated on {found['calibration_tokens']:,}; perplexity of the float model "
        f"{number(found['float_perplexity'], 4)}."
    ]
    for name, ratios in found["over_gptqmodel"].items():
        words.append(
            f"{name} over gptqmodel, seed by seed: KL {_range(ratios['kl'])}, time "
            f"{_range(ratios['seconds'], 2)}, peak memory {_range(ratios['peak_mib'], 2)}."
        )
    return [*lines, "", *words]


def against_q4_k_m(found: Found) -> list[str]:
    """A mix of bits against llama.cpp's, at the same bytes."""
    theirs = found["q4_k_m"]

    def row(name: str, one: Found, ratio: float | None) -> list[str]:
        return [
            name,
            number(one["bytes"] / 1e6, 4),
            _with_error(one["kl"], one["kl_standard_error"]),
            "" if ratio is None else f"{ratio:.2f}",
            number(one["perplexity"], 4),
        ]

    rows = [row("llama.cpp Q4_K_M", theirs, None)]
    for one, ratio in zip(found["mistill"], found["kl_over_q4_k_m"], strict=True):
        rows.append(row(f"mistill, seed {one['seed']}", one, ratio))
    return [
        *table(["", "MB", "KL", "over Q4_K_M", "perplexity"], rows),
        "",
        f"On {found['tokens']:,} tokens; perplexity of the float model "
        f"{number(found['float_perplexity'], 4)}. llama.cpp is measured by its own program.",
    ]


def onnxruntime_quantizers(found: Found) -> list[str]:
    """The codes of onnxruntime's quantizers against ours."""
    rows = [
        [
            name,
            _with_error(way["kl"], way["kl_standard_error"]),
            number(way["perplexity"], 4),
            number(way["seconds"]),
        ]
        for name, way in found["ways"].items()
    ]
    ratios = [f"{name} {ratio:.2f}" for name, ratio in found["over_onnxruntime_gptq"].items()]
    k_quant = [f"{name} {ratio:.2f}" for name, ratio in found["over_onnxruntime_k_quant"].items()]
    return [
        *table(["", "KL", "perplexity", "seconds"], rows),
        "",
        f"Groups of {found['group_size']}, {found['calibration_tokens']:,} calibration and "
        f"{found['held_out_tokens']:,} held-out tokens. KL of mistill over onnxruntime's GPTQ: "
        f"{'; '.join(ratios)}. Over its k-quant: {'; '.join(k_quant)}.",
    ]


def nf4_codec(found: Found) -> list[str]:
    """Encoding a weight in NF4."""
    rows = [
        [name, spread(seconds), f"{found['bytes'][name]:,}"]
        for name, seconds in found["seconds"].items()
    ]
    return [
        *table(["", "seconds", "bytes"], rows),
        "",
        f"A weight of {found['size']:,} rows and columns. mistill over bitsandbytes: "
        f"{spread(found['over_bitsandbytes'])} of the time.",
    ]


def big_model(found: Found) -> list[str]:
    """A model of Mistral 7B's size, quantized whole."""
    methods = [name for name, value in found.items() if isinstance(value, Mapping)]
    rows = [
        [
            {"nf4": "NF4", "rounding": "4-bit rounding"}.get(name, name),
            number(found[name]["seconds"]),
            f"{found[name]['peak_memory_bytes'] / _GIB:.2f}",
            f"{found[name]['weight_bytes'] / 1e9:.2f}",
        ]
        for name in methods
    ]
    return [
        *table(["", "seconds", "peak of the process, GiB", "GB on disk"], rows),
        "",
        f"{found['layers']} layers, {found['width']:,} wide, {found['parameters'] / 1e9:.2f} "
        f"billion weights, {found['float_bytes'] / 1e9:.1f} GB in bfloat16.",
    ]


def big_layer(found: Found) -> list[str]:
    """A layer of Mistral 7B's shapes through GPTQ."""
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    row = [
        settings or "default settings",
        number(found["seconds"]),
        number(found["seconds_of_layers"]),
        f"{found['peak_memory_bytes'] / _GIB:.2f}",
        f"{found['estimated_seconds_of_32_layers'] / 60:,.0f}",
    ]
    heads = ["", "seconds in all", "of the layers", "peak of the process, GiB"]
    return [
        *table([*heads, "32 layers, minutes (estimated)"], [row]),
        "",
        f"{found['layers']} layer{'' if found['layers'] == 1 else 's'}, {found['width']:,} wide, "
        f"{found['calibration_tokens']:,} calibration tokens.",
    ]


# --- export and engine --------------------------------------------------------------------------


def export_time(found: Found) -> list[str]:
    """Exporting a folder, by ours and by onnxruntime-genai's builder."""
    rows = [
        [
            name,
            spread(one["seconds"]),
            number(one["peak_mib"]["median"]),
            number(one["bytes"] / 1e6),
        ]
        for name, one in found["methods"].items()
    ]
    lines = table(["", "seconds", "peak of the process, MiB", "MB"], rows)
    if "time_over_genai" not in found:
        return lines
    return [
        *lines,
        "",
        f"mistill over genai's builder: {spread(found['time_over_genai'])} of the time, "
        f"{spread(found['peak_over_genai'])} of the peak memory.",
    ]


def export_parity(found: Found) -> list[str]:
    """An ONNX folder against PyTorch with the same weights."""
    row = [
        f"{found['source']}, {found['precision']}",
        f"{found['positions']:,}",
        number(found["max_difference"]),
        number(found["mean_kl"]),
        f"{found['other_top']:,}",
    ]
    heads = ["", "positions", "largest difference of a logit", "mean KL, nats"]
    return table([*heads, "other first token"], [row])


def step_time(found: Found) -> list[str]:
    """A step of one token from sources whose codes are harder to multiply."""
    rows = [
        [
            name,
            spread(milliseconds),
            spread(found["to_plain"][name]) if name in found["to_plain"] else "",
            number(found["packed_bytes_per_token"][name] / 1e6),
        ]
        for name, milliseconds in found["step_ms"].items()
    ]
    return table(["source", "ms a step", "over plain", "MB read a token"], rows)


def later_turn(found: Found) -> list[str]:
    """The first token of a later turn."""
    ratios = {"warm": found["warm_to_cold"], "restored": found["restored_to_cold"]}
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
        for name, seconds in found["first_token_seconds"].items()
    ]
    return [
        *table(["the chatbot", "first token, ms", "over reading it all"], rows),
        "",
        f"A prompt of {found['prompt_tokens']:,} tokens in all; {found['kept_bytes'] / 1e6:,.1f} "
        "MB kept on disk.",
    ]


def speculation(found: Found) -> list[str]:
    """Guessing ahead."""
    rows = [
        [
            name,
            spread(one["speed_up"]),
            f"{one['right']:,} of {one['tried']:,}",
            f"{one['same_tokens']} of {one['tokens']}",
        ]
        for name, one in found["replies"].items()
    ]
    return table(
        ["reply, guesses", "plain time over guessing", "guesses right", "same tokens"], rows
    )


def _milliseconds(seconds: Found) -> dict[str, float]:
    return {name: 1e3 * value for name, value in seconds.items()}


# --- whole models -------------------------------------------------------------------------------


def comparison(found: Found) -> list[str]:
    """A comparison of ``mistill bench``: the figures that fit a page."""
    columns = [
        column
        for column in COLUMNS
        if column.key in _TELLING
        and any(model["summary"].get(column.key) is not None for model in found["models"])
    ]
    heads = ["", *(f"{one.title}{f', {one.unit}' if one.unit else ''}" for one in columns)]
    rows = []
    for model in found["models"]:
        row = [model["name"]]
        for column in columns:
            value = model["summary"].get(column.key)
            row.append("" if value is None else column.write(value))
        rows.append(row)
    text = found["text"]
    return [
        *table(heads, rows),
        "",
        f"{text['tokens_scored']:,} tokens of {', '.join(text['sources'])} (fingerprint "
        f"{text['fingerprint'][:16]}); KL to {found['reference']}; "
        f"{found['settings']['rounds']} rounds, all models taking turns.",
    ]


FORMS: dict[str, Callable[[Found], list[str]]] = {
    form.__name__: form
    for form in (
        *(loss_head, training_step),
        *(quantized_kl, against_q4_k_m, onnxruntime_quantizers, nf4_codec, big_model, big_layer),
        *(export_time, export_parity, step_time, later_turn, speculation),
        comparison,
    )
}
