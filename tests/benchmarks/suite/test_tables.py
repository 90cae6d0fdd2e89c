"""The tables of the documentation are what the programs printed.

The file is long because every table of the documentation is checked here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import engine_tables, everything, export_time, page, step_tables, tables
from tests.benchmarks.made import made_comparison

ROOT = Path(__file__).parents[3]


def of(median: float, lowest: float, highest: float) -> dict[str, float]:
    return {"median": median, "lowest": lowest, "highest": highest}


CODEC = {
    "size": 4096,
    "threads": 2,
    "seconds": {"mistill": of(0.25, 0.2, 0.3), "bitsandbytes": of(0.5, 0.4, 0.6)},
    "bytes": {"mistill": 9_000_000, "bitsandbytes": 9_000_100},
    "over_bitsandbytes": of(0.5, 0.45, 0.55),
}


HEALING = {
    "texts": ["@demo-train", "plain.txt"],
    "scored_tokens": {"chats.jsonl": 900, "plain.txt": 1000},
    "students": [
        {
            "healing_tokens": tokens,
            "seconds": seconds,
            "kept_layers": [0, 2, 3],
            "held_out": {
                "chats.jsonl": {"kl": chats, "kl_standard_error": 0.05, "agreement": 0.5},
                "plain.txt": {"kl": plain, "kl_standard_error": 0.04, "agreement": 0.5},
            },
        }
        for tokens, seconds, chats, plain in ((0, 1.25, 1.6, 1.2), (32_768, 70.0, 0.8, 0.9))
    ],
}


def test_healing_is_shown_beside_what_was_cut_with_its_share_of_the_kl() -> None:
    lines = step_tables.healing(HEALING)
    cut, healed = rows_of(lines)
    assert cut == ["cut, not healed", "1.60 ± 0.05", "1.20 ± 0.04", "1.25"]
    assert healed == [
        "healed on 32,768 tokens",
        "0.800 ± 0.05, 0.50 of it",
        "0.900 ± 0.04, 0.75 of it",
        "70.0",
    ]
    assert lines[-1] == (
        "3 layers kept; healed on @demo-train, plain.txt, as many tokens of each; scored tokens: "
        "900 of chats.jsonl, 1,000 of plain.txt."
    )


def test_compressing_is_shown_beside_q4_k_m_with_its_share_of_the_kl() -> None:
    held_out = [{"chats.jsonl": {"kl": kl}} for kl in (0.08, 0.06)]
    models = [
        {"name": "llama.cpp Q4_K_M", "bytes": 103_700_000, "held_out": held_out[0]},
        {"name": "mistill", "bytes": 103_600_000, "held_out": held_out[1], "seconds": 234.0},
    ]
    found = {"scored_tokens": {"chats.jsonl": 900}, "texts": ["a.txt"], "models": models}
    lines = step_tables.compressing(found)
    assert rows_of(lines) == [
        ["llama.cpp Q4_K_M", "103.7", "0.0800", ""],
        ["mistill", "103.6", "0.0600, 0.75 of it", "234"],
    ]
    assert lines[-1] == "Calibrated on a.txt; scored tokens: 900 of chats.jsonl."


def test_json_replies_are_shown_before_and_after_with_their_intervals() -> None:
    def shares(valid: float, cut_off: float) -> dict[str, Any]:
        one = {"valid": valid, "interval": [valid - 0.1, valid + 0.05], "cut_off": cut_off}
        return {"sampled": one, "likeliest": {**one, "valid": 0.9}}

    found = {
        "settings": {
            "held_out": 48,
            "batch_size": 16,
            "samples": 8,
            "max_new_tokens": 32,
            "learning_rate": 6e-4,
        },
        "before": shares(0.25, 0.4),
        "after": shares(0.95, 0.0),
        "reward_by_step": [0.25, 0.875],
        "kl_by_step": [0.0, 0.1234],
        "report": {
            "steps": 2,
            "other_text": {
                "before": {"cross_entropy": 0.9},
                "after": {"cross_entropy": 0.95},
                "change": 0.05,
                "change_standard_error": 0.004,
            },
        },
    }
    lines = step_tables.json_replies(found)
    assert rows_of(lines) == [
        ["as it came", "0.25 (0.15 to 0.30)", "0.40", "0.90 (0.15 to 0.30)"],
        ["after reinforcement", "0.95 (0.85 to 1.00)", "0.00", "0.90 (0.85 to 1.00)"],
    ]
    assert lines[-1] == (
        "48 held-out prompts; 2 steps of 16 replies, 8 to a prompt, of at most 32 tokens, at a "
        "learning rate of 0.0006. Share of valid replies by step: 0.25, 0.88. KL from the start "
        "at the last step 0.123 nats a token. On other text the cross-entropy went from 0.900 to "
        "0.950 (0.0500 ± 0.004)."
    )


def test_students_of_two_teachers_are_shown_with_their_paired_difference() -> None:
    def judged(cross_entropy: float, right: float) -> dict[str, Any]:
        return {"cross_entropy": cross_entropy, "right": right, "right_interval": [0.0, 0.5]}

    run = {
        "models": {"teacher tuned": judged(0.2, 0.5), "student of it": judged(0.4, 0.1)},
        "tuned_student_less": {"other student": {"change": -1.5, "standard_error": 0.05}},
    }
    found = {"settings": {"held_out": 30, "keep": [0, 1, 3], "tokens": 4000}, "runs": [run]}
    lines = step_tables.align_then_distil(found)
    assert rows_of(lines) == [
        ["teacher tuned", "0.200", "0.50 (0.00 to 0.50)"],
        ["student of it", "0.400", "0.10 (0.00 to 0.50)"],
    ]
    assert lines[-1] == (
        "30 held-out sums; students of 3 layers, 4,000 tokens each. The cross-entropy of the "
        "student of the tuned teacher is, paired: lower by 1.50 ± 0.05 than that of the other "
        "student."
    )


def rows_of(lines: list[str]) -> list[list[str]]:
    """The cells of a table below its head."""
    cells = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in cells[2:]]


def test_the_committed_pages_are_what_the_committed_results_give() -> None:
    assert page.outdated() == []


def test_a_table_is_written_from_its_record_and_the_prose_stays(tmp_path: Path) -> None:
    results, document = tmp_path / "results", tmp_path / "page.md"
    page.keep("nf4_codec", CODEC, "python -m benchmarks.suite.nf4_codec", results=results)
    document.write_text("Before.\n\n<!-- table nf4_codec -->\nstale\n<!-- end -->\n\nAfter.\n")
    assert len(page.outdated((document,), results)) == 1
    page.write((document,), results)
    text = document.read_text()
    assert page.outdated((document,), results) == []
    assert text.startswith("Before.\n\n<!-- table nf4_codec -->\n\n`python -m benchmarks.suite.nf4")
    assert text.endswith("<!-- end -->\n\nAfter.\n")
    assert "stale" not in text
    assert "| bitsandbytes | 0.500 (0.400 to 0.600) | 9,000,100 |" in text
    page.write((document,), results)
    assert document.read_text() == text


def test_a_changed_record_makes_its_page_outdated(tmp_path: Path) -> None:
    results, document = tmp_path / "results", tmp_path / "page.md"
    page.keep("nf4_codec-small", CODEC, "words", results=results)
    document.write_text("<!-- table nf4_codec-small -->\n<!-- end -->\n")
    page.write((document,), results)
    page.keep("nf4_codec-small", CODEC | {"size": 512}, "words", results=results)
    (complaint,) = page.outdated((document,), results)
    assert "page.md is not what the results give" in complaint


def test_a_result_that_no_page_shows_is_named(tmp_path: Path) -> None:
    page.keep("nf4_codec", CODEC, "words", results=tmp_path)
    document = tmp_path / "page.md"
    document.write_text("Nothing.\n")
    (complaint,) = page.outdated((document,), tmp_path)
    assert "no page has a table of nf4_codec" in complaint


def test_a_mark_without_a_result_and_a_result_without_a_form_are_refused(tmp_path: Path) -> None:
    text = "<!-- table other -->\n<!-- end -->\n"
    with pytest.raises(ValueError, match="a table of other is wanted"):
        page.written(text, tmp_path)
    page.keep("other", {"threads": 1}, "words", results=tmp_path)
    with pytest.raises(ValueError, match="there is no form for other"):
        page.written(text, tmp_path)


def test_a_record_names_the_machine_and_no_place_on_it(tmp_path: Path) -> None:
    found = {
        "model": "/home/somebody/models/teacher",
        "runs": [{"file": "~/data/text.txt", "ratio": "1/2"}],
        "threads": 2,
    }
    command = "python -m x /srv/models/teacher --texts ../text.txt"
    record = page.keep("nf4_codec", found, command, results=tmp_path)
    assert record == json.loads((tmp_path / "nf4_codec.json").read_text())
    assert record["found"]["model"] == "teacher"
    assert record["found"]["runs"] == [{"file": "text.txt", "ratio": "1/2"}]
    assert record["command"] == "python -m x teacher --texts ../text.txt"
    assert record["machine"]["threads"] == 2
    assert {"processor", "governor", "versions", "instructions"} <= set(record["machine"])


def test_the_machine_is_the_one_that_the_program_tells_of(tmp_path: Path) -> None:
    machine = json.loads(made_comparison().to_json())["machine"]
    record = page.keep("nf4_codec", CODEC | {"machine": machine}, "words", results=tmp_path)
    line = page.conditions(record)
    assert line.startswith("AMD EPYC 7763 (virtual), 2 processors, 2 threads; avx2; 24 GiB;")
    assert "governor not told; torch 2.13.0, onnxruntime 1.31.1" in line
    assert "machine" not in record["found"]


def test_a_comparison_is_kept_without_its_samples(tmp_path: Path) -> None:
    report = json.loads(made_comparison().to_json())
    record = page.keep("engine", report, "mistill bench", results=tmp_path)
    assert (tmp_path / "engine.json").stat().st_size < 20_000
    lines = page.table_of(record)
    rows = {row[0]: row[1:] for row in rows_of(lines)}
    heads = next(line for line in lines if line.startswith("|")).strip("|").split("|")
    assert [head.strip() for head in heads][1] == "Size, MB"
    assert rows["teacher"][0] == "538"
    writing = [head.strip() for head in heads].index("Writing, tok/s")
    assert rows["chatbot-4"][writing - 1] == "131"
    # The reference has no distance from itself.
    assert "" in rows["teacher"]
    assert "fingerprint 0f0f0f0f0f0f0f0f" in lines[-3]


def test_the_last_line_of_an_output_is_its_document() -> None:
    assert page.last_document('{"a": 1}\nnoise\n{"b": 2}\n') == {"b": 2}
    with pytest.raises(ValueError, match="should be a JSON object"):
        page.last_document("[1]")


# --- the forms ----------------------------------------------------------------------------------

QUANTIZED: dict[str, Any] = {
    "held_out_tokens": 16_687,
    "calibration_tokens": 8192,
    "float_perplexity": 23.881,
    "ways": {
        name: {
            "kl": kl,
            "perplexity": 26.52,
            "agreement": 0.809,
            "weight_bytes": 156e6,
            "seconds": 31.4,
            "peak_mib": 1234.6,
            "runs": [{"kl": one, "kl_standard_error": 0.004} for one in runs],
        }
        for name, kl, runs in (
            ("rounding-64", 0.421, [0.421]),
            ("gptq-64", 0.121, [0.117, 0.121, 0.125]),
        )
    },
    "recovered": {"gptq-64": [0.722, 0.713, 0.703]},
    "over_gptqmodel": {
        "gptq-64": {figure: [0.9, 0.95] for figure in ("kl", "seconds", "peak_mib")}
    },
}


def test_quantizing_shows_seeds_and_what_they_recover() -> None:
    lines = step_tables.quantized_kl(QUANTIZED)
    assert rows_of(lines) == [
        ["rounding-64", "0.421 ± 0.004", "", "", "26.52", "0.809", "156", "31.4", "1,235"],
        [
            *("gptq-64", "0.121 ± 0.004", "0.117 to 0.125", "0.70 to 0.72"),
            *("26.52", "0.809", "156", "31.4", "1,235"),
        ],
    ]
    assert "gptq-64 over gptqmodel, seed by seed: KL 0.900 to 0.950" in lines[-1]
    # Without a rival nobody saw to it that the times can be compared.
    untimed = step_tables.quantized_kl(QUANTIZED | {"over_gptqmodel": {}})
    assert rows_of(untimed)[0] == ["rounding-64", "0.421 ± 0.004", "", "", "26.52", "0.809", "156"]


def test_the_loss_head_shows_what_ours_takes_of_each_rival() -> None:
    ours = {"seconds": of(6.1, 6, 6.2), "peak_mib": of(319, 318, 320), "loss": 1.0}
    full = {
        "seconds": of(8.5, 8, 9),
        "peak_mib": of(1266, 1266, 1266),
        "ours_seconds_ratio": of(0.72, 0.7, 0.75),
        "ours_peak_ratio": of(0.25, 0.25, 0.25),
    }
    found = {
        "shape": [32_000, 2048, 1024, 4096],
        "kept 1": {"ours": ours, "full logits": full},
        "kept 0.5": {"ours": ours, "full logits": full},
        "exactness": {
            "loss_relative_error": 3e-8,
            "hidden_gradient_cosine": 1.0,
            "head_gradient_cosine": 1.0,
            "loss_of_a_model_with_itself": 0.0,
        },
    }
    lines = step_tables.loss_head(found)
    assert rows_of(lines) == [
        ["mistill", "6.10", "319", "", "", "6.10", "319", "", ""],
        ["full logits", *(["8.50", "1,266", "0.72 (0.70 to 0.75)", "0.25"] * 2)],
    ]
    assert "half" not in lines[0]
    assert "50 % of them: seconds" in lines[0]


def test_a_mix_of_bits_is_shown_beside_q4_k_m() -> None:
    one = {"kl": 0.05, "kl_standard_error": 0.001, "perplexity": 24.5, "bytes": 104_500_000}
    found = {
        "tokens": 32_640,
        "float_perplexity": 23.881,
        "q4_k_m": one | {"kl": 0.0625},
        "mistill": [one | {"seed": 0}, one | {"seed": 1}],
        "kl_over_q4_k_m": [0.8, 0.8],
    }
    assert rows_of(step_tables.against_q4_k_m(found)) == [
        ["llama.cpp Q4_K_M", "104.5", "0.0625 ± 0.001", "", "24.50"],
        ["mistill, seed 0", "104.5", "0.0500 ± 0.001", "0.80", "24.50"],
        ["mistill, seed 1", "104.5", "0.0500 ± 0.001", "0.80", "24.50"],
    ]


def test_onnxruntime_quantizers_are_shown_with_ratios() -> None:
    way = {"kl": 0.2, "kl_standard_error": 0.01, "perplexity": 30.0, "seconds": 70.2}
    found: dict[str, Any] = {
        "ways": {"mistill gptq, symmetric": way, "onnxruntime k-quant": way},
        "group_size": 64,
        "calibration_tokens": 2048,
        "held_out_tokens": 16_000,
        "over_onnxruntime_gptq": {"gptq, symmetric": 0.5},
        "over_onnxruntime_k_quant": {"gptq": 0.75},
    }
    lines = step_tables.onnxruntime_quantizers(found)
    assert rows_of(lines)[1] == ["onnxruntime k-quant", "0.200 ± 0.01", "30.00", "70.2"]
    assert lines[-1].endswith(
        "GPTQ: gptq, symmetric 0.50. KL of mistill over onnxruntime's k-quant: gptq 0.75."
    )
    found["ways"]["onnxruntime gptq, asymmetric"] = {"failed": "ValueError: odd"}
    failing = step_tables.onnxruntime_quantizers(found)
    alone = step_tables.onnxruntime_quantizers(found | {"over_onnxruntime_gptq": {}})
    assert "onnxruntime's GPTQ" not in alone[-1]
    assert rows_of(failing) == rows_of(lines)
    assert failing[-1] == f"{lines[-1]} onnxruntime gptq, asymmetric fails: ValueError: odd."


def test_big_models_are_shown_in_gigabytes() -> None:
    found = {
        "layers": 32,
        "width": 4096,
        "parameters": 7_241_732_096,
        "float_bytes": 14_483_464_192,
        "rounding": {"seconds": 300.0, "peak_memory_bytes": 2 << 30, "weight_bytes": 4.1e9},
        "nf4": {"seconds": 200.0, "peak_memory_bytes": 3 << 30, "weight_bytes": 4.0e9},
    }
    lines = step_tables.big_model(found)
    assert rows_of(lines)[1] == ["NF4", "200", "3.00", "4.00"]
    assert "7.24 billion weights, 14.5 GB in bfloat16" in lines[-1]
    layer = {
        "layers": 1,
        "width": 4096,
        "settings": {"method": "gptaq"},
        "seconds": 480.0,
        "seconds_of_layers": 450.0,
        "peak_memory_bytes": 3 << 29,
        "calibration_tokens": 4096,
        "estimated_seconds_of_32_layers": 14_400,
    }
    assert rows_of(step_tables.big_layer(layer)) == [["method gptaq", "480", "450", "1.50", "240"]]


def test_export_and_engine_have_forms() -> None:
    export = {
        "methods": {
            "mistill": {"seconds": of(4, 4, 4), "peak_mib": of(300, 300, 300), "bytes": 77e6}
        },
        "time_over_genai": of(0.5, 0.5, 0.5),
        "peak_over_genai": of(0.25, 0.25, 0.25),
    }
    lines = engine_tables.export_time(export)
    assert rows_of(lines) == [["mistill", "4.00 (4.00 to 4.00)", "300", "77.0"]]
    assert "0.250 (0.250 to 0.250) of the peak memory" in lines[-1]
    step = {
        "step_ms": {"plain": of(7.5, 7, 8), "nf4": of(8.25, 8, 9)},
        "to_plain": {"nf4": of(1.1, 1, 1.2)},
        "packed_bytes_per_token": {"plain": 78e6, "nf4": 120e6},
        "around_us": {"plain": of(60, 50, 70), "nf4": of(61, 51, 71)},
    }
    assert rows_of(engine_tables.step_time(step))[1] == [
        *("nf4", "8.25 (8.00 to 9.00)", "1.10 (1.00 to 1.20)", "120", "61.0 (51.0 to 71.0)"),
    ]
    large = {
        "layers": 32,
        "width": 4096,
        "parameters": 7_241_732_096,
        "export": {"seconds": 101.2, "peak_memory_bytes": 2.5e9, "weight_bytes": 4.4e9},
        "run": {"load_seconds": 9.0, "prompt_tokens": 64, "peak_memory_bytes": 5.5e9},
        "prompt_tokens_per_second": 20.0,
        "decode_tokens_per_second": 5.25,
        "roofline_share": 0.71,
    }
    lines = engine_tables.big_chatbot(large)
    assert [row[1] for row in rows_of(lines)] == [
        *("101", "2.50", "4.40", "9.00", "20.0", "5.25", "5.50", "0.71"),
    ]
    assert lines[-1].startswith("32 layers, 4,096 wide, 7.24 billion")
    tools = {
        "rounds": 9,
        "prompt": 512,
        "new_tokens": 128,
        "rivals": {
            "llama.cpp q4_0": {
                name: {"ours": of(*rates), "its_own": of(100, 99, 101), "ratio": of(1.01, 1, 1.02)}
                for name, rates in (
                    ("prompt_tokens_per_second", (1010, 1000, 1020)),
                    ("decode_tokens_per_second", (101, 100, 102)),
                )
            }
        },
    }
    assert rows_of(engine_tables.rival_tools(tools)) == [
        *(
            ["llama.cpp q4_0", *words, "100 (99.0 to 101)", "1.01 (1.00 to 1.02)"]
            for words in (
                ("reading 512", "1,010 (1,000 to 1,020)"),
                ("writing 128", "101 (100 to 102)"),
            )
        )
    ]
    turn = {
        "warm_to_cold": of(0.05, 0.04, 0.06),
        "restored_to_cold": of(0.07, 0.06, 0.08),
        "first_token_seconds": {"warm": of(0.1, 0.1, 0.1), "cold": of(2, 2, 2)},
        "prompt_tokens": 2050,
        "kept_bytes": 46e6,
    }
    assert rows_of(engine_tables.later_turn(turn)) == [
        ["has held the conversation", "100 (100 to 100)", "0.050 (0.040 to 0.060)"],
        ["reads it all", "2,000 (2,000 to 2,000)", ""],
    ]
    parity = {
        "source": "gptq",
        "precision": "auto",
        "positions": 4000,
        "max_difference": 0.0004,
        "mean_kl": 1.5e-3,
        "other_top": 12,
    }
    assert rows_of(engine_tables.export_parity(parity)) == [
        ["gptq, auto", "4,000", "0.000400", "0.00150", "12"]
    ]
    reply = {"speed_up": of(1.5, 1.4, 1.6), "right": 10, "tried": 20, "same_tokens": 5, "tokens": 5}
    assert rows_of(engine_tables.speculation({"replies": {"repeats, lookup": reply}})) == [
        ["repeats, lookup", "1.50 (1.40 to 1.60)", "10 of 20", "5 of 5"]
    ]


def test_a_training_step_is_shown_beside_trl_where_it_ran() -> None:
    figures = {name: of(100, 90, 110) for name in ("tokens_per_second", "process_peak_mib")}
    figures |= {"peak_mib": of(50, 50, 50)}
    found: dict[str, Any] = {
        "methods": {"live": figures, "cached": figures},
        "cached_over_live": of(1.5, 1.4, 1.6),
    }
    assert "TRL" not in " ".join(step_tables.training_step(found))
    ratio = of(1.42, 1.35, 1.49)
    found |= {"live_over_trl": ratio, "live_peak_over_trl": ratio}
    found |= {"live_step_memory_over_trl": ratio, "live_over_mkl": of(1.8, 1.7, 1.9)}
    found |= {"scales_over_cached": of(1.02, 1.0, 1.04), "scales_peak_over_cached": ratio}
    found["methods"] = {"live": figures, "scales": figures, "trl": figures}
    words = step_tables.training_step(found)[-1]
    assert "Live over live with MKL: 1.80 (1.70 to 1.90) times." in words
    assert "Scales over cached: 1.02 (1.00 to 1.04) times, 1.4 of the process" in words
    assert "Live over TRL: 1.42 (1.35 to 1.49) times" in words


def test_products_are_shown_by_shape_and_library() -> None:
    ways = {
        "as torch comes": {"billions_a_second": of(105, 85, 107), "relative_error": 2.5e-7},
        "fast products": {"billions_a_second": of(228, 221, 235), "relative_error": 3.9e-7},
    }
    assert rows_of(step_tables.products({"shapes": {"512 x 576 x 1536": ways}})) == [
        ["512 x 576 x 1536", "105 (85.0 to 107)", "2.5e-07", "228 (221 to 235)", "3.9e-07"]
    ]


def test_rivals_are_shown_with_ratios() -> None:
    def model(speed: float, **more: Any) -> dict[str, Any]:
        return {
            "decode_tokens_per_second_at_1024": of(speed, speed, speed),
            "first_token_seconds_at_128": of(0.25, 0.2, 0.3),
            "peak_memory_bytes": of(2e8, 2e8, 2e8),
            "weight_bytes": 77_000_000,
            "mean_kl": 0.1,
            "roofline_share": None,
            **more,
        }

    found = {
        "rounds": 9,
        "models": {
            "chatbot": model(130.0, roofline_share=0.62),
            "llama.cpp Q4_0": model(80.0, version="b6000"),
        },
        "ratios": {
            "chatbot / llama.cpp Q4_0": {
                "decode_tokens_per_second_at_1024": of(1.63, 1.5, 1.75),
                "peak_memory_bytes": of(1, 1, 1),
            }
        },
    }
    rows = rows_of(engine_tables.rivals(found))
    assert rows[0] == ["writing after 1024 tokens, tok/s", "130", "80.0"]
    assert rows[1] == ["first token after 128, ms", "250", "250"]
    assert rows[2] == ["peak memory, MB", "200", "200"]
    assert rows[5] == ["share of the roofline", "0.62", ""]
    # Two lines of heads, then the ratios.
    assert ["writing after 1024 tokens", "1.63 (1.50 to 1.75)"] in rows
    assert ["first token after 128", ""] in rows
    assert engine_tables.rivals(found)[-1] == "9 rounds, all taking turns. llama.cpp Q4_0: b6000"


def test_quoted_perplexities_are_shown_beside_those_of_others() -> None:
    one = {
        "perplexity": 20.0,
        "standard_error": 0.5,
        "bits_per_byte": 1.0234,
        "tokens": 4080,
        "text_fingerprint": "ab" * 32,
    }
    other = one | {
        "standard_error": None,
        "difference": -0.00012,
        "theirs": {"perplexity": 20.0024, "by": "transformers"},
    }
    found = {
        "model": "teacher",
        "text": "text.txt",
        "conventions": {"llama.cpp": one, "gptq": other},
    }
    assert rows_of(engine_tables.quoted_perplexity(found)) == [
        ["llama.cpp", "4,080", "20.0000 ± 0.50", "", "", "1.0234"],
        ["gptq", "4,080", "20.0000", "20.0024, transformers", "-0.012 %", "1.0234"],
    ]


# --- make bench ---------------------------------------------------------------------------------


def test_a_rival_is_given_where_its_variable_names_it(tmp_path: Path) -> None:
    program = everything.Program(
        "rivals", ("{model}",), (everything.LLAMA_CPP, everything.BUILDER, everything.GENAI)
    )
    places = {"model": "/models/teacher"}
    assert everything.called(program, places, {}) == ["benchmarks.suite.rivals", "/models/teacher"]
    named = {"MISTILL_GENAI": "/venvs/genai"}
    assert everything.called(program, places, named)[2:] == [
        *("--genai-python", "/venvs/genai/bin/python", "--genai", "/venvs/genai"),
        *("--against", "genai:default", "genai:best"),
    ]
    (tmp_path / "python").touch()
    named = {"MISTILL_GENAI": str(tmp_path / "python"), "MISTILL_LLAMA_CPP": "/llama/bin"}
    words = everything.called(program, places, named)
    assert words[words.index("--genai-python") + 1] == str(tmp_path / "python")
    assert words[-5:] == [
        *("--against", "llama.cpp:q4_0", "llama.cpp:q4_k_m", "genai:default", "genai:best")
    ]
    assert everything.shown(program, {"MISTILL_LLAMA_CPP": "/llama/bin"}) == (
        "python -m benchmarks.suite.rivals MODEL --llama-cpp PATH "
        "--against llama.cpp:q4_0 llama.cpp:q4_k_m"
    )


def test_every_program_of_make_bench_exists_and_has_a_form() -> None:
    for program in everything.PROGRAMS:
        assert (ROOT / "benchmarks" / "suite" / f"{program.name}.py").is_file()
        assert program.name in tables.FORMS


@pytest.mark.slow
def test_exports_are_timed_with_and_without_their_check(model: Path) -> None:
    found = export_time.measure(model, None, threads=1, rounds=1)
    plain, checked = (
        found["methods"]["mistill"],
        found["methods"]["mistill, checked against PyTorch"],
    )
    assert plain["bytes"] == checked["bytes"] > 100_000
    # PyTorch is in memory for the check.
    assert plain["peak_mib"]["median"] < checked["peak_mib"]["median"] - 50
    assert "time_over_genai" not in found
    assert rows_of(engine_tables.export_time(found))[0][0] == "mistill"
