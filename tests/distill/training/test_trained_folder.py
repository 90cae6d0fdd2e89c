"""Training from folder to folder: gradients, schedules, resumption, and what is refused."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
from distill.settings import TrainSettings
from distill.teacher.teacher import LiveTeacher
from distill.training import step, trainer
from distill.training import trained_folder as training
from distill.training.evaluation import Evaluation
from mistill.errors import (
    FolderError,
    MissingExtraError,
    SettingsError,
    TargetExistsError,
    TextError,
    TrainingError,
    VocabularyError,
)
from mistill.folders.lineage import read_lineage
from mistill.loss.batches import make_batch
from mistill.pytorch.loading import load_pytorch
from mistill.text.blocks import Document
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from mistill.training import checkpoints, loop
from mistill.training.loop import StepSums
from mistill.training.training_text import read_blocks, split_documents
from tests.distill.judged import judged
from tests.tiny import tiny_model

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {
    "tokens": 1500,
    "block_length": 64,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 3e-3,
    "evaluate_every": 3,
    "checkpoint_every": 2,
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def hidden_beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# --- the whole road -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, model: Path, chats: Path
) -> Path:
    target = tmp_path_factory.mktemp("trained") / "student"
    return distill.train(model, target, teacher=teacher, texts=chats, **QUICK)


def test_a_trained_student_predicts_its_teacher_better(trained: Path, chats: Path) -> None:
    facts = read_lineage(trained)[-1]
    assert facts["step"] == "distill"
    assert (facts["texts"], facts["held_out"]) == ([chats.name], [])
    assert facts["after"]["kl"] < 0.8 * facts["before"]["kl"]
    assert facts["tokens"] == pytest.approx(1500, rel=0.1)
    assert 0 < facts["kept_positions"] < facts["tokens"]
    assert facts["settings"]["learning_rate"] == 3e-3
    assert facts["seconds"] > 0


def test_what_was_measured_is_what_lies_on_disk(
    trained: Path, teacher: Path, model: Path, chats: Path
) -> None:
    from transformers import AutoModelForCausalLM

    facts = read_lineage(trained)[-1]
    _, held_out = read_blocks(chats, None, load_vocabulary(model), TrainSettings(**QUICK), 0.05)
    parts = [(held_out, make_batch(held_out, CPU))]
    student = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    found = judged(student, LiveTeacher(load_pytorch(teacher)), parts)
    assert found.kl == pytest.approx(facts["after"]["kl"], rel=1e-5)
    assert found.perplexity == pytest.approx(facts["after"]["perplexity"], rel=1e-5)
    assert found.acceptance == pytest.approx(facts["after"]["acceptance"], rel=1e-5)
    assert found.positions == facts["after"]["positions"]
    assert load_vocabulary(trained).fingerprint() == load_vocabulary(teacher).fingerprint()
    assert (trained / "generation_config.json").is_file()
    assert (trained / "chat_template.jinja").is_file()


def test_metrics_are_written_for_every_step_and_every_evaluation(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    judged = [line for line in lines if "held_out" in line]
    facts = read_lineage(trained)[-1]
    assert [line["step"] for line in steps] == list(range(1, facts["steps"] + 1))
    assert judged[0]["step"] == 0
    assert judged[0]["held_out"] == facts["before"]
    assert {line["step"] % 3 for line in judged[:-1]} == {0}
    assert judged[-1]["step"] == facts["steps"]
    assert min(line["held_out"]["kl"] for line in judged) == facts["after"]["kl"]
    assert all(line["tokens_per_second"] > 0 and line["gradient_norm"] > 0 for line in steps)
    assert steps[-1]["tokens"] == facts["tokens"]


def test_nothing_is_left_beside_the_target(trained: Path) -> None:
    assert hidden_beside(trained.parent) == []


def test_a_watch_sees_what_metrics_hold_and_may_end_a_run_that_resumes(
    model: Path, teacher: Path, chats: Path, trained: Path, tmp_path: Path
) -> None:
    class EnoughError(Exception):
        pass

    seen: list[Mapping[str, Any]] = []

    def watch(line: Mapping[str, Any]) -> None:
        if line["step"] == 4 and "loss" in line and not any(one["step"] > 4 for one in seen):
            raise EnoughError
        seen.append(line)

    asked: dict[str, Any] = {"teacher": teacher, "texts": chats, **QUICK}
    with pytest.raises(EnoughError):
        distill.train(model, tmp_path / "out", watch=watch, **asked)
    made = distill.train(model, tmp_path / "out", watch=seen.append, **asked)
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line not in seen] == []
    assert weights(made).keys() == weights(trained).keys()
    assert all(torch.equal(w, weights(trained)[name]) for name, w in weights(made).items())
    count = len(seen)
    distill.train(model, tmp_path / "other", **asked)
    assert len(seen) == count


def test_a_student_that_is_larger_than_its_teacher_is_warned_of(
    model: Path, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SettingsError, match="block_length"):
        distill.train(
            teacher, tmp_path / "out", teacher=model, texts="@demo-train", block_length=5000
        )
    assert "are they swapped?" in caplog.text
    caplog.clear()
    with pytest.raises(SettingsError, match="block_length"):
        distill.train(
            model, tmp_path / "out", teacher=teacher, texts="@demo-train", block_length=5000
        )
    assert "swapped" not in caplog.text


def test_epochs_are_as_many_tokens_as_the_text_holds_so_often(
    model: Path, teacher: Path, chats: Path, tmp_path: Path
) -> None:
    options = {name: value for name, value in QUICK.items() if name != "tokens"}
    vocabulary = load_vocabulary(model)
    blocks, _ = read_blocks(chats, None, vocabulary, TrainSettings(**QUICK), 0.05)
    made = distill.train(
        model, tmp_path / "out", teacher=teacher, texts=chats, epochs=0.5, **options
    )
    step = read_lineage(made)[-1]
    assert step["settings"]["tokens"] == round(blocks.tokens / 2)
    assert abs(step["tokens"] - blocks.tokens / 2) <= QUICK["batch_size"] * QUICK["block_length"]
    with pytest.raises(SettingsError, match="give either tokens or epochs"):
        TrainSettings(tokens=5, epochs=1)
    with pytest.raises(SettingsError, match="epochs must be above 0"):
        TrainSettings(epochs=0)


def test_training_leaves_the_random_numbers_of_the_process_alone(
    tmp_path: Path, teacher: Path, model: Path, chats: Path
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    options = {**QUICK, "tokens": 300}
    distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, **options)
    assert torch.equal(torch.rand(3), expected)


def test_bfloat16_computes_in_it_and_keeps_float32_weights(
    tmp_path: Path, teacher: Path, model: Path, chats: Path
) -> None:
    options = {**QUICK, "precision": "bfloat16", "tokens": 600}
    made = distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, **options)
    assert {tensor.dtype for tensor in weights(made).values()} == {torch.float32}
    facts = read_lineage(made)[-1]
    assert facts["after"]["kl"] < facts["before"]["kl"]


def test_a_teacher_in_four_bits_teaches_too(
    tmp_path: Path, teacher: Path, model: Path, chats: Path
) -> None:
    import quantize

    small = quantize.to_nf4(teacher, tmp_path / "nf4")
    options = {**QUICK, "tokens": 600}
    made = distill.train(model, tmp_path / "out", teacher=small, texts=chats, **options)
    facts = read_lineage(made)[-1]
    assert facts["after"]["kl"] < facts["before"]["kl"]
    assert facts["teacher"] == small.name


# --- interruption -------------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler of ours catches."""


def kill_when(
    monkeypatch: pytest.MonkeyPatch, home: Any, name: str, calls: int, after: bool
) -> None:
    """Make a function die at its n-th call, before or after it does its work."""
    original: Callable[..., Any] = getattr(home, name)
    count = 0

    def dying(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls and not after:
            raise Killed
        result = original(*args, **options)
        if count == calls:
            raise Killed
        return result

    monkeypatch.setattr(home, name, dying)


@pytest.fixture(scope="module")
def dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose training draws random numbers, which a checkpoint has to hold."""
    return tiny_model(tmp_path_factory.mktemp("dropout") / "student", seed=2, attention_dropout=0.1)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, dropout: Path, chats: Path
) -> Path:
    target = tmp_path_factory.mktemp("uninterrupted") / "student"
    return distill.train(dropout, target, teacher=teacher, texts=chats, **QUICK)


def assert_same_run(resumed: Path, whole: Path) -> None:
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    timed = ("tokens_per_second", "seconds")
    kept = []
    for folder in (resumed, whole):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept.append([{k: v for k, v in line.items() if k not in timed} for line in lines])
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("home", "name", "calls", "after"),
    [
        (trainer, "accumulate_gradients", 1, True),
        (trainer, "accumulate_gradients", 6, True),
        (loop, "save_checkpoint", 2, False),
        (checkpoints, "remove_others", 2, False),
        (trainer, "judge", 2, True),
        (trainer, "judge", 3, False),
        (training, "_finish", 1, False),
        (training, "publish", 1, False),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher: Path,
    dropout: Path,
    chats: Path,
    uninterrupted: Path,
    home: Any,
    name: str,
    calls: int,
    after: bool,
) -> None:
    target = tmp_path / "student"
    with monkeypatch.context() as patch:
        kill_when(patch, home, name, calls, after)
        with pytest.raises(Killed):
            distill.train(dropout, target, teacher=teacher, texts=chats, **QUICK)
    assert not target.exists()
    steps: list[int] = []
    original = step.accumulate_gradients

    def counting(*args: Any) -> StepSums:
        steps.append(1)
        return original(*args)

    monkeypatch.setattr(trainer, "accumulate_gradients", counting)
    distill.train(dropout, target, teacher=teacher, texts=chats, **QUICK)
    assert_same_run(target, uninterrupted)
    assert hidden_beside(tmp_path) == []
    if calls > 1 or home is training:
        assert len(steps) < read_lineage(target)[-1]["steps"], "it began again"


def test_a_checkpoint_cut_short_is_not_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher: Path,
    dropout: Path,
    chats: Path,
    uninterrupted: Path,
) -> None:
    from accelerate import Accelerator

    target = tmp_path / "student"
    with monkeypatch.context() as patch:
        kill_when(patch, Accelerator, "save_state", 2, after=True)
        with pytest.raises(Killed):
            distill.train(dropout, target, teacher=teacher, texts=chats, **QUICK)
    (work,) = (tmp_path / name for name in hidden_beside(tmp_path))
    assert sorted(path.name for path in work.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4.partial",
    ]
    (work / "checkpoint-4.partial" / "pytorch_model.bin").write_bytes(b"")
    with (work / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "lo')
    distill.train(dropout, target, teacher=teacher, texts=chats, **QUICK)
    assert_same_run(target, uninterrupted)


def test_a_killed_process_resumes_to_the_same_bits(
    tmp_path: Path, teacher: Path, dropout: Path, chats: Path, uninterrupted: Path
) -> None:
    program = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import distill
from distill.training import trainer
original, count = trainer.accumulate_gradients, 0
def dying(*args):
    global count
    count += 1
    if count == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
trainer.accumulate_gradients = dying
student, target, teacher, texts, options = sys.argv[1:]
distill.train(student, target, teacher=teacher, texts=texts, **json.loads(options))
"""
    target = tmp_path / "student"
    paths = [str(path) for path in (dropout, target, teacher, chats)]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths, json.dumps(QUICK)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    assert hidden_beside(tmp_path) == [".student.working"]
    distill.train(dropout, target, teacher=teacher, texts=chats, **QUICK)
    assert_same_run(target, uninterrupted)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(
    tmp_path: Path, teacher: Path, dropout: Path, chats: Path
) -> None:
    options = {
        **QUICK,
        "tokens": 4000,
        "checkpoint_every": 1,
        "on_policy": 0.3,
        "optimizer": "adamw_8bit",
        "gradient_checkpointing": True,
    }
    whole = tmp_path / "whole"
    distill.train(dropout, whole, teacher=teacher, texts=chats, **options)
    program = """
import json, os, signal, sys, threading
import torch
torch.set_num_threads(1)
import distill
from mistill.training import loop
student, target, teacher, texts, options, seconds = sys.argv[1:]
original = loop.load_checkpoint
def loading(*args):
    threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
    return original(*args)
loop.load_checkpoint = loading
distill.train(student, target, teacher=teacher, texts=texts, **json.loads(options))
os._exit(0)
"""
    moments = random.Random(0)
    kills = finished = 0
    while kills < 20 or not finished:
        target = tmp_path / f"student-{finished}"
        words = [dropout, target, teacher, chats, json.dumps(options), moments.uniform(0, 0.8)]
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == -signal.SIGKILL:
            kills += 1
            continue
        assert done.returncode == 0, done.stderr
        assert_same_run(target, whole)
        finished += 1


def interrupt(
    patch: pytest.MonkeyPatch, target: Path, teacher: Path, model: Path, chats: Path
) -> None:
    """Leave a run of ``QUICK`` with a checkpoint and two steps more, as a kill does."""
    with patch.context() as killing:
        kill_when(killing, trainer, "accumulate_gradients", 6, after=False)
        with pytest.raises(Killed):
            distill.train(model, target, teacher=teacher, texts=chats, **QUICK)


def first_step(target: Path) -> int:
    """The first step of the last call, by the seconds that it noted."""
    lines = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    return int(next(line["step"] for line in lines if "loss" in line))


def test_other_settings_are_refused_where_a_run_was_interrupted_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Path, model: Path, chats: Path
) -> None:
    target = tmp_path / "student"
    interrupt(monkeypatch, target, teacher, model, chats)
    work = tmp_path / ".student.working"
    before = {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.name != "lock"}
    with pytest.raises(SettingsError, match=r"seed is 1 and was 0.*remove .*\.student\.working"):
        distill.train(model, target, teacher=teacher, texts=chats, **{**QUICK, "seed": 1})
    after = {file: file.stat().st_mtime_ns for file in work.rglob("*") if file.name != "lock"}
    assert after == before


def test_a_run_with_other_settings_begins_anew_where_overwriting_is_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    teacher: Path,
    model: Path,
    chats: Path,
) -> None:
    target = tmp_path / "student"
    interrupt(monkeypatch, target, teacher, model, chats)
    options = {**QUICK, "tokens": 600, "seed": 1}
    distill.train(model, target, teacher=teacher, texts=chats, overwrite=True, **options)
    assert first_step(target) == 1
    assert "begins anew: " in caplog.text
    assert "seed is 1 and was 0, tokens is 600 and was 1500" in caplog.text


def test_settings_that_do_not_change_the_result_do_not_change_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    teacher: Path,
    model: Path,
    chats: Path,
) -> None:
    caplog.set_level("INFO")
    target = tmp_path / "student"
    interrupt(monkeypatch, target, teacher, model, chats)
    others = {
        "micro_batch_size": QUICK["batch_size"],
        "checkpoint_every": 5,
        "evaluate_every": 0,
        "loss_memory_mib": 1.0,
    }
    assert all(QUICK.get(name) != value for name, value in others.items())
    distill.train(model, target, teacher=teacher, texts=chats, **{**QUICK, **others})
    assert "resuming after step" in caplog.text


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    teacher: Path,
    model: Path,
    chats: Path,
) -> None:
    target = tmp_path / "student"
    interrupt(monkeypatch, target, teacher, model, chats)
    (checkpoint,) = (tmp_path / ".student.working").glob("checkpoint-*")
    optimizer = checkpoint / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    distill.train(model, target, teacher=teacher, texts=chats, **QUICK)
    assert "is damaged and is passed over" in caplog.text
    assert first_step(target) == 1
    assert hidden_beside(target) == []


def test_a_teacher_without_numbers_is_named_and_the_best_student_is_kept(
    tmp_path: Path, teacher: Path, model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    # A weight like this is refused when it is read; here it stands for one that overflows later.
    monkeypatch.setattr("mistill.pytorch.loading.require_finite", lambda name, tensor: None)
    broken = shutil.copytree(teacher, tmp_path / "teacher")
    vocabulary = load_vocabulary(broken)
    rare = vocabulary.encode("\u00a5")[-1]
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][rare] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    talks = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": answer}]
        for i in range(60)
        for answer in ["It costs \u00a5 5." if i == 40 else f"A number, {i}, small as the wind."]
    ]
    texts, held_out = tmp_path / "texts.jsonl", tmp_path / "held-out.jsonl"
    for file, part in ((texts, talks), (held_out, talks[:10])):
        file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in part))
    with pytest.raises(TrainingError) as raised:
        distill.train(
            model,
            tmp_path / "out",
            teacher=broken,
            texts=texts,
            held_out=held_out,
            **{**QUICK, "tokens": 4000, "evaluate_every": 1, "block_length": 64},
        )
    message = str(raised.value)
    assert "the teacher's logits are not finite" in message
    assert "document 41 of the texts" in message
    kept = Path(message.rpartition(" kept in ")[2])
    assert load_pytorch(kept).config.vocab_size == vocabulary.size
    assert load_vocabulary(kept).fingerprint() == vocabulary.fingerprint()
    assert not (tmp_path / "out").exists()


# --- the student that is kept -------------------------------------------------------------------


def test_the_best_student_of_all_evaluations_is_the_one_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Path, model: Path, chats: Path
) -> None:
    verdicts = iter([1.0, 0.5, 0.4, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9])
    seen = []

    def scripted(module: Any, *_: Any) -> Evaluation:
        weights = module.model.state_dict()
        seen.append({name: value.clone() for name, value in weights.items()})
        return Evaluation(
            kl=next(verdicts),
            kl_p99=1.0,
            perplexity=1.0,
            teacher_perplexity=None,
            agreement=None,
            acceptance=None,
            calibration_error=0.0,
            teacher_calibration_error=None,
            positions=1,
        )

    monkeypatch.setattr(trainer, "judge", scripted)
    options = {**QUICK, "tokens": 3000}
    made = distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, **options)
    facts = read_lineage(made)[-1]
    assert facts["after"]["kl"] == 0.4
    assert facts["kept_step"] == 6
    assert facts["steps"] > 6
    kept = weights(made)
    assert all(torch.equal(kept[name], seen[2][name]) for name in kept)
    assert not all(torch.equal(kept[name], seen[-1][name]) for name in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 3.0}, r"no better: its held-out KL was \d.* before and \d+"),
        ({"learning_rate": 1e30}, "step 2 .*lower learning_rate .now 1e\\+30. or raise warmup"),
    ],
)
def test_a_student_that_got_worse_is_a_failure_and_leaves_nothing_behind(
    tmp_path: Path,
    teacher: Path,
    model: Path,
    chats: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(TrainingError, match=message) as raised:
        distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, **{**QUICK, **options})
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# --- what is refused before a weight is read ----------------------------------------------------


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mistill.pytorch.loading.load_pytorch", refuse)
    monkeypatch.setattr("distill.teacher.live_teacher.load_teacher", refuse)


@pytest.mark.usefixtures("no_loading")
class TestRefusals:
    def test_a_student_with_other_tokens(
        self, tmp_path: Path, teacher: Path, model: Path, chats: Path
    ) -> None:
        import shutil

        other = shutil.copytree(model, tmp_path / "other")
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(VocabularyError, match=r"2 of .* ids stand for different tokens"):
            distill.train(other, tmp_path / "out", teacher=teacher, texts=chats)

    def test_a_student_with_another_number_of_rows(
        self, tmp_path: Path, teacher: Path, chats: Path
    ) -> None:
        rows = load_vocabulary(teacher).size
        other = tiny_model(tmp_path / "other", vocab_size=rows + 8)
        with pytest.raises(VocabularyError, match=f"{rows + 8} rows against {rows}"):
            distill.train(other, tmp_path / "out", teacher=teacher, texts=chats)

    def test_a_target_that_exists(
        self, tmp_path: Path, teacher: Path, model: Path, chats: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(TargetExistsError):
            distill.train(model, tmp_path / "out", teacher=teacher, texts=chats)

    @pytest.mark.parametrize("role", ["student", "teacher"])
    def test_a_target_that_is_a_source(
        self, teacher: Path, model: Path, chats: Path, role: str
    ) -> None:
        target = {"student": model, "teacher": teacher}[role]
        with pytest.raises(FolderError, match="is its own source"):
            distill.train(model, target, teacher=teacher, texts=chats, overwrite=True)

    def test_a_teacher_that_is_the_student(
        self, tmp_path: Path, teacher: Path, chats: Path
    ) -> None:
        with pytest.raises(FolderError, match="same model"):
            distill.train(teacher, tmp_path / "out", teacher=teacher, texts=chats)

    def test_a_missing_folder(self, tmp_path: Path, teacher: Path, chats: Path) -> None:
        with pytest.raises(FolderError, match="nowhere"):
            distill.train(tmp_path / "nowhere", tmp_path / "out", teacher=teacher, texts=chats)

    def test_a_quantized_student(
        self, tmp_path: Path, teacher: Path, model: Path, chats: Path
    ) -> None:
        import shutil

        quantized = shutil.copytree(model, tmp_path / "quantized")
        config = json.loads((quantized / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64}
        (quantized / "config.json").write_text(json.dumps(config))
        with pytest.raises(FolderError, match="gptq weights, which cannot be trained"):
            distill.train(quantized, tmp_path / "out", teacher=teacher, texts=chats)

    def test_empty_texts(self, tmp_path: Path, teacher: Path, model: Path, chats: Path) -> None:
        empty = tmp_path / "empty.txt"
        empty.write_text("\n \n")
        with pytest.raises(TextError, match="empty"):
            distill.train(model, tmp_path / "out", teacher=teacher, texts=empty)
        with pytest.raises(TextError, match="empty"):
            distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, held_out=empty)

    def test_text_too_short_to_share(self, tmp_path: Path, teacher: Path, model: Path) -> None:
        short = tmp_path / "short.txt"
        short.write_text("A wind.")
        with pytest.raises(TextError, match="give held_out texts or more text"):
            distill.train(model, tmp_path / "out", teacher=teacher, texts=short)

    def test_text_that_predicts_nothing(
        self, tmp_path: Path, teacher: Path, model: Path, chats: Path
    ) -> None:
        short = tmp_path / "short.txt"
        short.write_text("A")
        with pytest.raises(TextError, match="the texts hold nothing to be predicted"):
            distill.train(model, tmp_path / "out", teacher=teacher, texts=short, held_out=chats)

    def test_blocks_longer_than_the_context(
        self, tmp_path: Path, teacher: Path, model: Path, chats: Path
    ) -> None:
        with pytest.raises(SettingsError, match=r"block_length of 513 .* context of 512"):
            distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, block_length=513)

    @pytest.mark.parametrize(
        ("options", "module", "words"),
        [
            ({"trackers": ("tensorboard",)}, "tensorboard", r"mistill\[tensorboard\]"),
            ({"trackers": ("wandb",)}, "wandb", "pip install wandb"),
            ({"lora_rank": 4}, "peft", r"mistill\[tune\]"),
            ({"optimizer": "adamw_8bit"}, "bitsandbytes", r"mistill\[compress\]"),
            ({"teacher_precision": "nf4"}, "bitsandbytes", r"mistill\[compress\]"),
        ],
    )
    def test_a_library_that_is_not_installed(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        teacher: Path,
        model: Path,
        chats: Path,
        options: dict[str, Any],
        module: str,
        words: str,
    ) -> None:
        for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtraError, match=words):
            distill.train(model, tmp_path / "out", teacher=teacher, texts=chats, **options)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("both", [False, True])
    def test_no_teacher_or_two(
        self, tmp_path: Path, teacher: Path, model: Path, chats: Path, both: bool
    ) -> None:
        given: dict[str, Any] = {"teacher": teacher, "targets": tmp_path} if both else {}
        with pytest.raises(SettingsError, match="both are given" if both else "neither is given"):
            distill.train(model, tmp_path / "out", texts=chats, **given)

    @pytest.mark.parametrize(
        "options",
        [
            {"divergence": "reverse_kl"},
            {"on_policy": 0.5},
            {"teacher_precision": "nf4"},
            {"teacher_device_map": "auto"},
        ],
    )
    def test_what_cached_targets_cannot_tell(
        self, tmp_path: Path, model: Path, chats: Path, options: dict[str, Any]
    ) -> None:
        (name,) = options
        with pytest.raises(SettingsError, match=f"^{name} = .* needs the teacher itself"):
            distill.train(
                model, tmp_path / "out", targets=tmp_path / "nowhere", texts=chats, **options
            )


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 0},
        {"block_length": 1},
        {"batch_size": 0},
        {"batch_size": 4, "micro_batch_size": 3},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"warmup": 1.5},
        {"weight_decay": -0.1},
        {"max_gradient_norm": 0.0},
        {"temperature": 0.0},
        {"cross_entropy": 1.1},
        {"held_out_share": 1.0},
        {"held_out_tokens": 0},
        {"evaluate_every": -1},
        {"checkpoint_every": -1},
        {"loss_memory_mib": 0.0},
        {"precision": "float16"},
        {"teacher_precision": "int8"},
        {"teacher_device_map": "anywhere"},
        {"trackers": ("mlflow",)},
        {"trackers": "wandb"},
        {"trackers": ("wandb", "wandb")},
        {"optimizer": "sgd"},
        {"lora_rank": -1},
        {"divergence": "kl"},
        {"mixture": 1.0},
        {"on_policy": 1.5},
        {"on_policy_temperature": 0.0},
        {"on_policy_prompt": 0},
        {"cross_entropy": 1.0, "on_policy": 0.5},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    name = list(options)[-1]
    with pytest.raises(SettingsError, match=f"^{name} (should|must)"):
        TrainSettings(**options)


# --- held-out text ------------------------------------------------------------------------------


def documents_of(*sizes: int) -> list[Document]:
    return [
        Document(np.full(size, number, np.int64), np.ones(size, bool))
        for number, size in enumerate(sizes)
    ]


def test_held_out_documents_are_whole_and_a_share_of_the_tokens() -> None:
    documents = documents_of(*[10] * 40)
    learnt, judged = split_documents(documents, 0.2, seed=0)
    assert sum(len(document.ids) for document in judged) == 80
    assert {int(document.ids[0]) for document in learnt + judged} == set(range(40))
    assert len(learnt) + len(judged) == 40
    again = split_documents(documents, 0.2, seed=0)[1]
    assert [d.ids[0] for d in again] == [d.ids[0] for d in judged]
    other = split_documents(documents, 0.2, seed=1)[1]
    assert [d.ids[0] for d in other] != [d.ids[0] for d in judged]


def test_a_document_larger_than_the_share_is_not_held_out() -> None:
    learnt, judged = split_documents(documents_of(1000, 5, 5), 0.05, seed=0)
    assert [len(document.ids) for document in learnt] == [1000]
    assert sorted(int(document.ids[0]) for document in judged) == [1, 2]


def test_the_end_of_a_single_document_is_held_out() -> None:
    (learnt,), (judged,) = split_documents(documents_of(1000), 0.05, seed=0)
    assert (len(learnt.ids), len(judged.ids)) == (950, 50)


def test_held_out_text_is_read_evenly_up_to_its_limit(model: Path, chats: Path) -> None:
    vocabulary = load_vocabulary(model)
    settings = TrainSettings(block_length=64, held_out_tokens=192)
    _, whole = read_blocks(
        chats, chats, vocabulary, TrainSettings(block_length=64, held_out_tokens=10**6)
    )
    _, judged = read_blocks(chats, chats, vocabulary, settings)
    assert len(whole) > 6
    assert len(judged) == 3
    rows = [int(np.flatnonzero((whole.ids == row).all(axis=1))[0]) for row in judged.ids]
    assert rows[0] == 0
    assert rows[-1] == len(whole) - 1
    assert abs(rows[1] - (len(whole) - 1) / 2) <= 1
    assert whole.tokens == sum(len(d.ids) for d in read_documents(chats, vocabulary))
