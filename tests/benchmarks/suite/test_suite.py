"""The programs that measure mistill against rivals: they run, and count what they should."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distill
from benchmarks.suite import quantized_kl
from benchmarks.suite.tables import FORMS
from benchmarks.suite.turns import paired_ratio, summary, take_turns
from tests.tiny import SENTENCES

ROOT = Path(__file__).parents[3]


def run(name: str, *options: str) -> Any:
    """Run a program as the command line does, in this process: to start one takes seconds."""
    program = importlib.import_module(f"benchmarks.suite.{name}")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [name, *options])
        program.main()
    found = json.loads(said.getvalue().splitlines()[-1])
    # What a program prints fits the form of its table.
    assert name not in FORMS or FORMS[name](found)
    return found


def test_turns_are_interleaved_and_counted_without_the_warm_up() -> None:
    code = (
        "from benchmarks.suite.turns import serve; import time\n"
        "kept = []\n"
        "def work():\n"
        "    kept.append(bytearray(64 << 20)) if len(kept) == {grow} else kept.append(None)\n"
        "    return {{'at': time.monotonic()}}\n"
        "serve(work)"
    )
    commands = {
        name: [sys.executable, "-c", code.format(grow=grow)] for name, grow in (("a", 2), ("b", 9))
    }
    samples = take_turns(commands, rounds=3, warm_up=1)
    times = [turn["at"] for pair in zip(samples["a"], samples["b"], strict=True) for turn in pair]
    assert len(times) == 6
    assert times == sorted(times)
    # Only the turn that allocates has a peak, and what it keeps does not count again.
    peaks = [turn["peak_mib"] for turn in samples["a"]]
    assert peaks[1] == pytest.approx(64, abs=4)
    assert peaks[0] < 4
    assert peaks[2] < 4


def test_a_child_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match="broken ended with 3"):
        take_turns({"broken": [sys.executable, "-c", "raise SystemExit(3)"]}, rounds=1)


def test_ratios_are_of_the_same_turn() -> None:
    ours, theirs = [{"s": 1.0}, {"s": 4.0}, {"s": 2.0}], [{"s": 2.0}, {"s": 2.0}, {"s": 2.0}]
    assert paired_ratio(ours, theirs, "s") == {"median": 1.0, "lowest": 0.5, "highest": 2.0}
    assert summary(ours, "s") == {"median": 2.0, "lowest": 1.0, "highest": 4.0}


def test_the_loss_head_is_compared_with_full_logits() -> None:
    found = run("loss_head", "--shape", "small", "--rounds", "1", "--threads", "1")
    for kept in ("kept 1", "kept 0.5"):
        ours, full = found[kept]["ours"], found[kept]["full logits"]
        assert ours["loss"] == pytest.approx(full["loss"], rel=1e-6)
        assert full["ours_seconds_ratio"]["median"] > 0
    assert found["exactness"]["loss_relative_error"] < 1e-6
    assert found["exactness"]["head_gradient_cosine"] > 0.99999
    assert 0 <= found["exactness"]["loss_of_a_model_with_itself"] < 1e-6


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A student with half of the teacher's layers."""
    folder = tmp_path_factory.mktemp("suite") / "cut"
    return distill.new_student(teacher, folder, layers=1, choose="even")


def test_live_and_cached_steps_take_turns(teacher: Path, cut: Path, chats: Path) -> None:
    found = run(
        "training_step", str(teacher), str(cut), "--texts", str(chats), "--rounds", "2",
        "--blocks", "1", "--block-length", "64", "--threads", "1",
    )  # fmt: skip
    live, mkl, cached = (found["methods"][name]["losses"] for name in ("live", "mkl", "cached"))
    assert live == pytest.approx(mkl, rel=1e-5)
    assert found["live_over_mkl"]["median"] > 0
    # Fifty draws of the teacher give nearly its own loss on the same blocks.
    assert cached == pytest.approx(live, rel=0.2)
    assert found["cached_over_live"]["median"] > 0
    assert 0 <= found["waited_for_cached_targets"]["median"] < 1
    # Few bits, and the same text and teacher.
    scales = found["methods"]["scales"]["losses"]
    assert scales == pytest.approx(live, rel=0.3)
    assert scales[1] != live[1]
    assert found["scales_over_cached"]["median"] > 0
    assert found["scales_peak_over_cached"]["median"] > 0


def test_products_are_as_exact_by_either_library() -> None:
    found = run("products", "--rounds", "1")
    for ways in found["shapes"].values():
        for way in ways.values():
            assert way["relative_error"] < 1e-6
            assert way["billions_a_second"]["median"] > 0


@pytest.mark.slow
def test_tuning_over_floats_and_over_four_bits_takes_turns(model: Path, chats: Path) -> None:
    found = run(
        "tuning_step", str(model), "--texts", str(chats), "--rounds", "2", "--block-length", "128",
        "--threads", "1", "--methods", "lora", "qlora", "trl_lora",
    )  # fmt: skip
    losses = {name: method["losses"] for name, method in found["methods"].items()}
    assert losses["lora"] == pytest.approx(losses["trl_lora"], rel=0.02)
    assert found["qlora_over_trl_lora"]["processor_seconds"]["median"] > 0


@pytest.mark.slow
def test_json_replies_are_counted_before_and_after(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    found = run(
        "json_replies", str(model), "--out", str(out), "--steps", "2", "--prompts", "8",
        "--held-out", "4", "--samples", "2", "--batch-size", "4", "--micro-batch-size", "2",
        "--max-new-tokens", "4", "--threads", "1",
    )  # fmt: skip
    assert (out / "model.safetensors").is_file()
    assert len(found["reward_by_step"]) == found["report"]["steps"] == 2
    for when in ("before", "after"):
        for kind in ("sampled", "likeliest"):
            figures = found[when][kind]
            # A tiny model with random weights writes no JSON.
            assert figures["valid"] == 0.0
            assert figures["interval"][0] == 0.0
            assert 0 <= figures["cut_off"] <= 1


@pytest.mark.slow
def test_students_of_the_tuned_teacher_and_of_the_one_that_came_are_judged_alike(
    teacher: Path, tmp_path: Path
) -> None:
    words = [
        "align_then_distil", str(teacher), "--keep", "0", "2", "--tuning-tokens", "4000",
        "--tokens", "2000", "--held-out", "10", "--tuning-rate", "1e-2", "--rate", "3e-4",
        "--threads", "1", "--out", str(tmp_path / "kept"),
    ]  # fmt: skip
    found = run(*words)
    (first,) = found["runs"]
    models = first["models"]
    tuned, came = models["teacher tuned"], models["teacher as it came"]
    assert tuned["cross_entropy"] < came["cross_entropy"] - 0.5
    student, other = (
        models[f"student of the {name}"]["cross_entropy"]
        for name in ("tuned teacher", "teacher as it came")
    )
    gap = first["tuned_student_less"]["student of the teacher as it came"]
    assert gap["change"] == pytest.approx(student - other)
    assert gap["change"] < 0
    # What is kept is not made again, and is judged as it was.
    assert run(*words)["runs"] == [first]


@pytest.mark.slow
def test_a_layer_of_tuning_is_measured_by_what_a_second_one_adds() -> None:
    found = run(
        "big_tuning_layer", "--tokens", "64", "--width", "512", "--rank", "4", "--threads", "1"
    )
    one, two = (found["layers"]["remembered"][layers] for layers in ("1", "2"))
    added = two["resident_bytes"] - one["resident_bytes"]
    whole = found["extrapolated_to_32_layers"]["remembered"]
    assert whole["resident_bytes"] == pytest.approx(one["resident_bytes"] + 31 * added)


def test_cached_and_live_students_are_judged_alike(teacher: Path, cut: Path, chats: Path) -> None:
    found = run(
        "cached_quality", str(teacher), str(cut), "--texts", str(chats), "--held-out", str(chats),
        "--tokens", "600", "--seeds", "3", "--block-length", "64", "--held-out-tokens", "256",
        "--methods", "live", "systematic", "top-5", "--threads", "1",
    )  # fmt: skip
    assert found["kl_over_live"]["live"] == [1.0]
    assert found["kl_over_live"]["systematic"][0] == pytest.approx(1, abs=0.1)
    assert found["runs"]["systematic"][0]["agreement"] is not None  # judged by the whole teacher
    assert found["mean_kl"]["live"] < found["before"]["kl"]
    assert found["bytes_a_position"]["systematic"] > 10


def test_recovery_says_what_a_start_was_worth(teacher: Path, chats: Path) -> None:
    found = run(
        "recovery", str(teacher), "--texts", str(chats), "--held-out", str(chats), "--layers", "1",
        "--tokens", "600", "--random-tokens", "300", "--evaluate-every", "1", "--block-length",
        "64", "--held-out-tokens", "256", "--threads", "1",
    )  # fmt: skip
    assert found["after"]["kl"] < found["before"]["kl"]
    assert found["history"][0]["tokens"] == 0
    assert found["history"][-1]["kl"] >= found["after"]["kl"]
    assert found["random_start"]["after"]["kl"] < found["random_start"]["before"]["kl"]


def test_the_program_for_a_gpu_runs_without_one_when_it_is_told_to() -> None:
    found = run(
        "gpu_scale", "--device", "cpu", "--tiny", "--rounds", "1", "--block-length", "16",
        "--most-blocks", "2",
    )  # fmt: skip
    assert set(found["loss_heads"]) == {"ours", "full logits"}
    for kind in ("bfloat16", "nf4", "targets"):
        assert found["training"][kind]["largest_micro_batch"] == 2
        assert found["training"][kind]["2 blocks"]["tokens_per_second"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_program_for_a_gpu_asks_for_one() -> None:
    command = [sys.executable, "-m", "benchmarks.suite.gpu_scale"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "there is no CUDA device" in done.stderr


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prose") / "prose.txt"
    file.write_text("\n\n".join(SENTENCES * 20), "utf-8")
    return file


def test_what_quantizing_costs_is_measured_for_every_seed(
    model: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        str(model),
        *("--texts", str(prose), "--held-out", str(prose), "--tokens", "600"),
        *("--ways", "rounding-64", "gptq-64", "--seeds", "0", "1"),
        *("--samples", "4", "--block-length", "32", "--threads", "1", "--keep", str(tmp_path)),
    ]
    real = quantized_kl._in_a_child

    def in_a_child(python: str, work: str, home: Path, threads: int) -> dict[str, float]:
        """One of three in a process of its own, which takes seconds to start, and two in this."""
        if json.loads(work)[0] == "to_rounding":
            return real(python, work, home, threads)
        monkeypatch.setattr(sys, "argv", ["-c", work])
        exec(quantized_kl._CHILD, {})
        return {"seconds": 2.0, "peak_mib": 2.0}

    monkeypatch.setattr(quantized_kl, "_in_a_child", in_a_child)
    report = json.loads(json.dumps(quantized_kl.run(quantized_kl.arguments(words), tmp_path)))
    assert FORMS["quantized_kl"](report)
    # Once more: nothing is made again but what is gone.
    lost = tmp_path / "gptq-64-0"
    lost.rename(tmp_path / "spare")
    again: list[tuple[str, int]] = []

    def make(_: object, name: str, seed: int, home: Path) -> dict[str, Any]:
        again.append((name, seed))
        (home / "spare").rename(lost)
        return {"seed": seed, "seconds": 1.0, "peak_mib": 1.0}

    monkeypatch.setattr(quantized_kl, "quantize", make)
    second = quantized_kl.run(quantized_kl.arguments(words), tmp_path)
    assert again == [("gptq-64", 0)]
    runs, runs_again = report["ways"]["gptq-64"]["runs"], second["ways"]["gptq-64"]["runs"]
    assert runs_again[1] == runs[1]
    assert runs_again[0]["kl"] == pytest.approx(runs[0]["kl"])
    assert runs_again[0]["seconds"] == 1
    rounding, gptq = report["ways"]["rounding-64"], report["ways"]["gptq-64"]
    assert len(rounding["runs"]) == 1
    assert [one["seed"] for one in gptq["runs"]] == [0, 1]
    assert gptq["runs"][0]["kl"] != gptq["runs"][1]["kl"]
    assert gptq["kl_least"] <= gptq["kl"] <= gptq["kl_greatest"] < rounding["kl"]
    assert report["recovered"]["gptq-64"][1] == pytest.approx(
        1 - gptq["runs"][1]["kl"] / rounding["kl"]
    )
    assert gptq["weight_bytes"] == rounding["weight_bytes"]
    assert 100 < rounding["peak_mib"] < 2000
    assert rounding["seconds"] > 0
    assert report["held_out_tokens"] >= 550


def test_both_nf4_codecs_are_timed_on_the_same_weight() -> None:
    report = run("nf4_codec", "--size", "256", "--rounds", "2", "--threads", "1")
    ours, theirs = (report["seconds"][name]["median"] for name in ("mistill", "bitsandbytes"))
    assert min(ours, theirs) > 0
    # bitsandbytes names the same tensors, and describes them in a few bytes more or less.
    assert report["bytes"]["mistill"] == pytest.approx(report["bytes"]["bitsandbytes"], abs=200)
    assert report["over_bitsandbytes"]["lowest"] <= report["over_bitsandbytes"]["highest"]


@pytest.mark.slow
def test_onnxruntime_quantizers_are_read_from_the_codes_they_leave(
    model: Path, prose: Path
) -> None:
    report = run(
        "onnxruntime_quantizers",
        str(model),
        *("--texts", str(prose), "--held-out", str(prose), "--tokens", "600", "--threads", "1"),
        *("--samples", "4", "--block-length", "32", "--group-size", "32"),
    )
    kl = {name: way["kl"] for name, way in report["ways"].items()}
    assert len(kl) == 9
    # Misread codes would be a model of noise.
    assert max(kl.values()) < 4 * kl["rounding, symmetric"]
    assert kl["onnxruntime gptq, asymmetric"] < kl["rounding, symmetric"]
    assert report["over_onnxruntime_gptq"]["gptq, symmetric"] == pytest.approx(
        kl["mistill gptq, symmetric"] / kl["onnxruntime gptq, symmetric"]
    )


def test_tokens_that_llama_cpp_counts_are_those_of_each_second_half(tmp_path: Path) -> None:
    from benchmarks.suite.against_q4_k_m import counted_tokens

    ids = np.arange(16, dtype="<i4")
    file = tmp_path / "logits"
    file.write_bytes(b"_logits_" + np.array([8, 384, 2], "<i4").tobytes() + ids.tobytes())
    blocks = counted_tokens(file)
    assert blocks.ids.tolist() == [list(range(8)), list(range(8, 16))]
    # llama-perplexity reads the logits at 4, 5 and 6 of a chunk of 8.
    assert np.flatnonzero(blocks.kept[0]).tolist() == [4, 5, 6]
    (tmp_path / "other").write_bytes(b"_nothing")
    with pytest.raises(SystemExit, match="does not begin as"):
        counted_tokens(tmp_path / "other")


@pytest.mark.slow
def test_silent_mistakes_of_tuning_are_told_apart() -> None:
    found = run("tuning_traps")
    status = {(one["trap"], one["way"]): one["status"] for one in found["answers"]}
    traps = {trap for trap, _ in status}
    assert len(traps) == 9
    assert {status[trap, "mistill"] for trap in traps} == {"pass"}
    page = (ROOT / "docs" / "tuning.md").read_text("utf-8")
    # What processors differ in is not compared: only some have what the last question is about.
    for trap in traps - {"an evaluation changes no later gradient (NF4)"}:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {trap} |")]
        shown = [cell.split(":")[0].strip(" *") for cell in row.split("|")[2:5]]
        assert shown == [status[trap, way] for way in ("mistill", "trl", "guides")], trap
