"""The tables of what distillation and quantization cost; ``benchmarks.suite.tables`` lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.suite.cells import Found, number, spread, table, value_range, with_error

_GIB = 2**30
_KL = ("kl", "kl_standard_error")


# --- distillation -------------------------------------------------------------------------------


def loss_head(report: Found) -> list[str]:
    """Time and memory of every way to compute the loss, with all positions and with some."""
    kept = {name.removeprefix("kept "): one for name, one in report.items() if "kept " in name}
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
    V, T, student, teacher = report["shape"]
    exact = report["exactness"]
    return [
        *table(heads, rows),
        "",
        f"Vocabulary {V:,}, {T:,} positions, student {student:,} wide, teacher {teacher:,}. "
        f"Against float64: relative error of the loss {exact['loss_relative_error']:.0e}, cosine "
        f"of the gradients {exact['hidden_gradient_cosine']:.12f} and "
        f"{exact['head_gradient_cosine']:.12f}, loss of a model with itself "
        f"{number(exact['loss_of_a_model_with_itself'])}.",
    ]


def training_step(report: Found) -> list[str]:
    """Tokens a second and memory of a whole training step."""
    names = {
        "live": "live teacher",
        "mkl": "live teacher, products by MKL",
        "cached": "cached targets",
        "scales": "4 bits, scales and norms, cached hidden states",
        "trl": "TRL GKDTrainer",
    }
    rows = [
        [
            names[method],
            spread(figures["tokens_per_second"]),
            number(figures["process_peak_mib"]["median"]),
            number(figures["peak_mib"]["median"]),
        ]
        for method, figures in report["methods"].items()
    ]
    lines = table(["", "tokens/s", "peak of the process, MiB", "peak above rest, MiB"], rows)
    words = [f"Cached over live: {spread(report['cached_over_live'])} times the tokens a second."]
    if "live_over_mkl" in report:
        words.append(f"Live over live with MKL: {spread(report['live_over_mkl'])} times.")
    if "scales_over_cached" in report:
        words.append(
            f"Scales over cached: {spread(report['scales_over_cached'])} times, "
            f"{number(report['scales_peak_over_cached']['median'], 2)} of the process's peak "
            "memory."
        )
    if "live_over_trl" in report:
        words.append(
            f"Live over TRL: {spread(report['live_over_trl'])} times, "
            f"{number(report['live_peak_over_trl']['median'], 2)} of the process's peak memory, "
            f"{number(report['live_step_memory_over_trl']['median'], 2)} of what the step adds."
        )
    return [*lines, "", " ".join(words)]


def products(report: Found) -> list[str]:
    """How fast float32 matrices are multiplied, and how exactly."""
    rows = [
        [shape]
        + [
            text
            for way in ways.values()
            for text in (spread(way["billions_a_second"]), f"{way['relative_error']:.1e}")
        ]
        for shape, ways in report["shapes"].items()
    ]
    heads = [
        text
        for name in next(iter(report["shapes"].values()))
        for text in (f"{name}, GFLOP/s", "relative error")
    ]
    return table(["rows x inputs x outputs", *heads], rows)


# --- quantization -------------------------------------------------------------------------------


def healing(report: Found) -> list[str]:
    """KL of a pruned student on every text, as it was cut and as it was healed."""
    texts = list(report["scored_tokens"])
    cut = report["students"][0]["held_out"]
    rows = []
    for student in report["students"]:
        tokens = student["healing_tokens"]
        row = [f"healed on {tokens:,} tokens" if tokens else "cut, not healed"]
        for text in texts:
            figures = student["held_out"][text]
            share = f", {figures['kl'] / cut[text]['kl']:.2f} of it" if tokens else ""
            row.append(with_error(figures["kl"], figures["kl_standard_error"]) + share)
        rows.append([*row, number(student["seconds"])])
    lines = table(["KL(teacher \\|\\| student)", *texts, "seconds to make"], rows)
    scored = ", ".join(f"{count:,} of {text}" for text, count in report["scored_tokens"].items())
    kept = len(report["students"][0]["kept_layers"])
    neurons = report.get("intermediate_size")
    narrower = f", with {neurons:,} neurons each" if neurons else ""
    return [
        *lines,
        "",
        f"{kept} layers kept{narrower}; healed on {', '.join(report['texts'])}, as many tokens of "
        f"each; scored tokens: {scored}.",
    ]


def training_curve(report: Found) -> list[str]:
    """KL on every text and processor time, by the tokens that a student learnt from."""
    texts = list(report["scored_tokens"])
    several: dict[tuple[str, str, int], list[Found]] = {}
    for run in report["runs"]:
        key = run.get("trainer", "mistill"), run["start"], run["tokens"]
        several.setdefault(key, []).append(run)
    rows = []
    for (trainer, start, tokens), runs in several.items():
        learnt = f"{trainer}, {tokens:,} tokens" if tokens else "not trained"
        row = [{"cut": "cut", "healed": "cut and healed"}[start], learnt]
        for text in texts:
            kls = [run["held_out"][text]["kl"] for run in runs]
            row.append(value_range(kls) if len(kls) > 1 else number(kls[0]))
        rows.append([*row, number(sum(run["processor_seconds"] for run in runs) / len(runs))])
    scored = ", ".join(f"{count:,} of {text}" for text, count in report["scored_tokens"].items())
    return [
        *table(["start", "learnt from", *texts, "processor seconds"], rows),
        "",
        f"KL(teacher \\|\\| student) of {report['layers']} layers; ranges are of seeds. Healed on "
        f"{', '.join(report['heal_texts'])}, trained on {', '.join(report['texts'])}; scored "
        f"tokens: {scored}.",
    ]


def few_bits(report: Found) -> list[str]:
    """KL of a model in few bits on every text, by how it was quantized."""
    texts = list(report["scored_tokens"])
    rows = [
        [
            way["way"],
            ", ".join(way["texts"]),
            *(with_error(*(way["held_out"][text][key] for key in _KL)) for text in texts),
            number(way["processor_seconds"]),
        ]
        for way in report["ways"]
    ]
    scored = ", ".join(f"{count:,} of {text}" for text, count in report["scored_tokens"].items())
    return [
        *table(["KL(float \\|\\| quantized)", "calibrated on", *texts, "processor seconds"], rows),
        "",
        f"{report['bits']} bits in groups of {report['group_size']}, {report['samples']} blocks of "
        f"{report['block_length']} tokens, embedding and head float; scored tokens: {scored}.",
    ]


def scale_tuning(report: Found) -> list[str]:
    """KL of a quantized model before and after tuning, on every text, over seeds."""
    texts = list(report["scored_tokens"])
    rows = []
    for bits, group in report["groups"].items():
        runs = [run for run in report["runs"] if run["bits"] == int(bits)]
        for name in ("quantized", "tuned"):
            cells = []
            for text in texts:
                before, kls = (
                    [run["held_out"][which][text]["kl"] for run in runs]
                    for which in ("quantized", name)
                )
                cells.append(value_range(kls))
                if name == "tuned":
                    shares = [1 - kl / start for kl, start in zip(kls, before, strict=True)]
                    cells[-1] += f", {value_range(shares, 2)} taken off"
            seconds = number(median([run["seconds"][name] for run in runs]))
            rows.append([f"{bits} bits, groups of {group}, {name}", *cells, seconds])
    scored = ", ".join(f"{count:,} of {text}" for text, count in report["scored_tokens"].items())
    return [
        *table(["KL(float \\|\\| quantized)", *texts, "processor seconds"], rows),
        "",
        f"Calibrated on {', '.join(report['texts'])}; {report['tuning_tokens']:,} tokens of "
        f"{', '.join(report['tuning_texts'])} tuned on, at {report['learning_rate']:g}; scored "
        f"tokens: {scored}. Ranges are of {len({run['seed'] for run in report['runs']})} seeds.",
    ]


def compressing(report: Found) -> list[str]:
    """KL of a compressed model beside that of Q4_K_M, on every text."""
    texts = list(report["scored_tokens"])
    rival = report["models"][0]

    def kl(model: Found, text: str) -> str:
        own, theirs = (one["held_out"][text]["kl"] for one in (model, rival))
        return number(own) if model is rival else f"{number(own)}, {own / theirs:.2f} of it"

    rows = [
        [
            model["name"],
            number(model["bytes"] / 1e6, 4),
            *(kl(model, text) for text in texts),
            number(model["seconds"]) if "seconds" in model else "",
        ]
        for model in report["models"]
    ]
    scored = ", ".join(f"{count:,} of {text}" for text, count in report["scored_tokens"].items())
    return [
        *table(["KL(float \\|\\| compressed)", "MB", *texts, "seconds to make"], rows),
        "",
        f"Calibrated on {', '.join(report['texts'])}; scored tokens: {scored}.",
    ]


def quantized_kl(report: Found) -> list[str]:
    """What every way of quantizing costs; time and memory where a rival's stand beside them."""
    timed = bool(report["over_gptqmodel"])
    rows = []
    for name, way in report["ways"].items():
        runs = way["runs"]
        regained = report["recovered"].get(name)
        rows.append(
            [
                name,
                with_error(way["kl"], runs[0]["kl_standard_error"]),
                value_range([run["kl"] for run in runs]) if len(runs) > 1 else "",
                value_range(regained, 2) if regained else "",
                number(way["perplexity"], 4),
                f"{way['agreement']:.3f}",
                number(way["weight_bytes"] / 1e6),
            ]
        )
        if timed:
            rows[-1] += [number(way["seconds"]), number(way["peak_mib"])]
    heads = ["", "KL", "seeds", "of rounding's KL recovered", "perplexity", "same first token"]
    heads += ["MB", *(("seconds", "peak, MiB") if timed else ())]
    lines = table(heads, rows)
    words = [
        f"KL(float \\|\\| quantized) in nats on {report['held_out_tokens']:,} held-out tokens; "
        f"calibrated on {report['calibration_tokens']:,}; perplexity of the float model "
        f"{number(report['float_perplexity'], 4)}."
    ]
    for name, ratios in report["over_gptqmodel"].items():
        words.append(
            f"{name} over gptqmodel, seed by seed: KL {value_range(ratios['kl'])}, "
            f"time {value_range(ratios['seconds'], 2)}, "
            f"peak memory {value_range(ratios['peak_mib'], 2)}."
        )
    return [*lines, "", *words]


def against_q4_k_m(report: Found) -> list[str]:
    """A mix of bits against llama.cpp's, at the same bytes."""
    theirs = report["q4_k_m"]

    def row(name: str, one: Found, ratio: float | None) -> list[str]:
        return [
            name,
            number(one["bytes"] / 1e6, 4),
            with_error(one["kl"], one["kl_standard_error"]),
            "" if ratio is None else f"{ratio:.2f}",
            number(one["perplexity"], 4),
        ]

    rows = [row("llama.cpp Q4_K_M", theirs, None)]
    for one, ratio in zip(report["mistill"], report["kl_over_q4_k_m"], strict=True):
        rows.append(row(f"mistill, seed {one['seed']}", one, ratio))
    return [
        *table(["", "MB", "KL", "over Q4_K_M", "perplexity"], rows),
        "",
        f"On {report['tokens']:,} tokens; perplexity of the float model "
        f"{number(report['float_perplexity'], 4)}. llama.cpp is measured by its own program.",
    ]


def onnxruntime_quantizers(report: Found) -> list[str]:
    """The codes of onnxruntime's quantizers against ours."""
    rows = [
        [
            name,
            with_error(way["kl"], way["kl_standard_error"]),
            number(way["perplexity"], 4),
            number(way["seconds"]),
        ]
        for name, way in report["ways"].items()
        if "kl" in way
    ]
    failed = [
        f" {name} fails: {way['failed']}."
        for name, way in report["ways"].items()
        if "kl" not in way
    ]
    over = [
        f" KL of mistill over onnxruntime's {theirs}: "
        + "; ".join(f"{name} {ratio:.2f}" for name, ratio in report[key].items())
        + "."
        for theirs, key in (
            ("GPTQ", "over_onnxruntime_gptq"),
            ("k-quant", "over_onnxruntime_k_quant"),
        )
        if report[key]
    ]
    return [
        *table(["", "KL", "perplexity", "seconds"], rows),
        "",
        f"Groups of {report['group_size']}, {report['calibration_tokens']:,} calibration and "
        f"{report['held_out_tokens']:,} held-out tokens.{''.join(over)}{''.join(failed)}",
    ]


def nf4_codec(report: Found) -> list[str]:
    """Encoding a weight in NF4."""
    rows = [
        [name, spread(seconds), f"{report['bytes'][name]:,}"]
        for name, seconds in report["seconds"].items()
    ]
    return [
        *table(["", "seconds", "bytes"], rows),
        "",
        f"A weight of {report['size']:,} rows and columns. mistill over bitsandbytes: "
        f"{spread(report['over_bitsandbytes'])} of the time.",
    ]


def big_model(report: Found) -> list[str]:
    """A model of Mistral 7B's size, quantized whole."""
    methods = [name for name, value in report.items() if isinstance(value, Mapping)]
    rows = [
        [
            {"nf4": "NF4", "rounding": "4-bit rounding"}.get(name, name),
            number(report[name]["seconds"]),
            f"{report[name]['peak_memory_bytes'] / _GIB:.2f}",
            f"{report[name]['weight_bytes'] / 1e9:.2f}",
        ]
        for name in methods
    ]
    return [
        *table(["", "seconds", "peak of the process, GiB", "GB on disk"], rows),
        "",
        f"{report['layers']} layers, {report['width']:,} wide, {report['parameters'] / 1e9:.2f} "
        f"billion weights, {report['float_bytes'] / 1e9:.1f} GB in bfloat16.",
    ]


def big_layer(report: Found) -> list[str]:
    """A layer of Mistral 7B's shapes through GPTQ."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    row = [
        settings or "default settings",
        number(report["seconds"]),
        number(report["seconds_of_layers"]),
        f"{report['peak_memory_bytes'] / _GIB:.2f}",
        f"{report['estimated_seconds_of_32_layers'] / 60:,.0f}",
    ]
    heads = ["", "seconds in all", "of the layers", "peak of the process, GiB"]
    return [
        *table([*heads, "32 layers, minutes (estimated)"], [row]),
        "",
        f"{report['layers']} layer{'' if report['layers'] == 1 else 's'}, {report['width']:,} "
        f"wide, {report['calibration_tokens']:,} calibration tokens.",
    ]


# --- tuning -------------------------------------------------------------------------------------


def json_replies(report: Found) -> list[str]:
    """Which share of replies a check of JSON calls valid, before and after reinforcement."""
    rows = []
    for words, name in (("as it came", "before"), ("after reinforcement", "after")):
        sampled, likeliest = (report[name][kind] for kind in ("sampled", "likeliest"))
        rows.append(
            [
                words,
                _share(sampled["valid"], sampled["interval"]),
                f"{sampled['cut_off']:.2f}",
                _share(likeliest["valid"], likeliest["interval"]),
            ]
        )
    lines = table(
        ["valid replies", "sampled at temperature 1", "of them cut off", "the likeliest tokens"],
        rows,
    )
    settings, run = report["settings"], report["report"]
    rewards = ", ".join(f"{reward:.2f}" for reward in report["reward_by_step"])
    other = run["other_text"]
    return [
        *lines,
        "",
        f"{settings['held_out']} held-out prompts; {run['steps']} steps of "
        f"{settings['batch_size']} replies, {settings['samples']} to a prompt, of at most "
        f"{settings['max_new_tokens']} tokens, at a learning rate of "
        f"{settings['learning_rate']:g}. Share of valid replies by step: {rewards}. KL from the "
        f"start at the last step {report['kl_by_step'][-1]:.3f} nats a token. On other text the "
        f"cross-entropy went from {other['before']['cross_entropy']:.3f} to "
        f"{other['after']['cross_entropy']:.3f} "
        f"({with_error(other['change'], other['change_standard_error'])}).",
    ]


def align_then_distil(report: Found) -> list[str]:
    """What students of a tuned teacher and of the one that came are worth on the tuned task."""
    runs = report["runs"]
    rows = []
    for name in runs[0]["models"]:
        each = [run["models"][name] for run in runs]
        rows.append(
            [
                name,
                value_range([one["cross_entropy"] for one in each]),
                "; ".join(_share(one["right"], one["right_interval"]) for one in each),
            ]
        )
    lines = table(["", "cross-entropy of the right answer", "right to the letter"], rows)
    gaps = "; ".join(
        f"lower by {with_error(-gap['change'], gap['standard_error'])} than that of the {name}"
        for run in runs
        for name, gap in run["tuned_student_less"].items()
    )
    settings = report["settings"]
    return [
        *lines,
        "",
        f"{settings['held_out']} held-out sums; students of {len(settings['keep'])} layers, "
        f"{settings['tokens']:,} tokens each. The cross-entropy of the student of the tuned "
        f"teacher is, paired: {gaps}.",
    ]


def _share(share: float, interval: Sequence[float]) -> str:
    """A share with its interval."""
    low, high = interval
    return f"{share:.2f} ({low:.2f} to {high:.2f})"
