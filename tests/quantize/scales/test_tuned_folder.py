"""Scales and norms that learn from a teacher, and codes that do not move."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import distill
import quantize
from distill.settings import TrainSettings
from mistill.errors import FolderError, SettingsError, TextError, TrainingError, VocabularyError
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from mistill.training.kept_back import is_kept_back
from mistill.training.processes import accelerating
from mistill.training.training_text import read_blocks
from mistill.weights.gptq_layout import QuantizedWeight
from mistill.weights.scaled_linear import ScaledLinear
from quantize.scales import tuned_folder as tuning
from quantize.scales.scale_training import ScaledModel, ScaleStep, ScaleTuning
from quantize.scales.teacher_states import ask_teacher
from quantize.settings import TuningSettings
from tests.launching import launched
from tests.tiny import SENTENCES, tiny_model

OPTIONS: dict[str, Any] = {
    "steps": 12,
    "batch_size": 2,
    "block_length": 32,
    "learning_rate": 1e-2,
    "held_out_blocks": 4,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n\n".join(SENTENCES * 12), "utf-8")
    return file


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    target = tmp_path_factory.mktemp("rough") / "rough"
    return quantize.to_rounding(model, target, bits=3, group_size=32)


@pytest.mark.parametrize("ordered", [True, False])
def test_the_gradient_of_scales_is_that_of_the_weight_they_make(ordered: bool) -> None:
    rng = np.random.default_rng(0)
    g_idx = np.repeat(np.arange(2), 8) if ordered else rng.permutation(np.repeat(np.arange(2), 8))
    weight = QuantizedWeight(
        codes=rng.integers(0, 16, (6, 16)).astype(np.uint8),
        scales=rng.uniform(0.1, 0.3, (6, 2)).astype(np.float16),
        zeros=rng.integers(5, 10, (6, 2)).astype(np.uint8),
        g_idx=g_idx.astype(np.int32),
        bits=4,
        group_size=8,
    )
    bias = torch.randn(6)
    module = ScaledLinear(weight, bias)
    with torch.no_grad():
        module.gain.uniform_(0.8, 1.2)
    x = torch.randn(3, 5, 16, requires_grad=True)
    pull = torch.randn(3, 5, 6)

    scales = torch.from_numpy(weight.scales.astype(np.float32))
    gain = module.gain.detach().clone().requires_grad_(True)
    steps = weight.codes.astype(np.float32) - weight.zeros[:, g_idx].astype(np.float32)
    W = torch.from_numpy(steps) * (scales * gain.T)[:, torch.from_numpy(g_idx)]
    wanted = nn.functional.linear(x, W, bias)
    found = module(x)

    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, [x, module.gain], pull),
        torch.autograd.grad(wanted, [x, gain], pull),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.tuned_scales(), (scales.T * gain).detach())


def test_a_tuned_model_is_closer_and_has_the_same_codes(
    tmp_path: Path, rough: Path, model: Path, texts: Path
) -> None:
    made = quantize.tune(rough, tmp_path / "tuned", teacher=model, texts=texts, **OPTIONS)

    step = read_lineage(made)[-1]
    assert step["step"] == "tune"
    assert step["after"]["kl"] < 0.92 * step["before"]["kl"]
    before, after = (load_file(folder / "model.safetensors") for folder in (rough, made))
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"scales", "weight"}
    assert all("norm" in name for name in changed if name.endswith("weight"))
    assert all(before[name].dtype == after[name].dtype for name in before)
    # What was judged is what lies there.
    assert measured(model, made, texts) == pytest.approx(step["after"]["kl"], rel=1e-5)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (rough, made)]
    assert configs[0] == configs[1]


def measured(model: Path, made: Path, texts: Path) -> float:
    from mistill.measures.kl import compare, predict
    from mistill.pytorch.loading import load_pytorch

    settings = TuningSettings(**OPTIONS)
    _, judged = tuning._read_blocks(made, texts, None, settings, date.today())
    asked, found = (predict(load_pytorch(folder), judged) for folder in (model, made))
    return compare({"teacher": asked}, {"": found}, judged)[""]["teacher"].kl


def test_the_gradient_of_a_step_is_that_of_the_model_written_out(
    tmp_path: Path, rough: Path, model: Path, texts: Path
) -> None:
    """Against whole weights, all logits and one mean over the positions of all blocks."""
    settings = TuningSettings(**{**OPTIONS, "batch_size": 3, "micro_batch_size": 1})
    training, judged = tuning._read_blocks(rough, texts, None, settings, date.today())
    blocks = training[:3]
    scaled = ScaledModel(rough, norms=True)
    gains = {name: linear.gain for name, linear in scaled.linears.items()}
    gains |= {name: norm.gain for name, norm in scaled.norms.items()}
    with torch.no_grad():
        for gain in gains.values():
            gain.uniform_(0.9, 1.1)
    teacher = load_pytorch(model).requires_grad_(False)
    with accelerating(settings, logs=rough) as accelerator:
        step = ScaleStep(scaled.model, 0.05)
        said = ask_teacher(model, training, judged, accelerator, tmp_path)
        task = ScaleTuning(step, scaled, *said, judged, settings, accelerator)
        sums = task.gradients(0, blocks)

    twin = load_pytorch(rough).requires_grad_(False)
    leaves = {name: gain.detach().clone().requires_grad_(True) for name, gain in gains.items()}
    weights = {}
    for name, module in scaled.linears.items():
        spread: Any = leaves[name][module.groups]  # type: ignore[index]
        weights[f"{name}.weight"] = (module.unscaled() * spread).T
    for name in scaled.norms:
        weights[f"{name}.weight"] = twin.get_parameter(f"{name}.weight") * leaves[name]
    inputs = {
        "input_ids": torch.from_numpy(np.ascontiguousarray(blocks.ids)),
        "position_ids": torch.from_numpy(np.ascontiguousarray(blocks.position_ids)),
        "use_cache": False,
    }
    kept = torch.from_numpy(blocks.kept)
    p = teacher(**inputs).logits[kept].log_softmax(-1)
    q = torch.func.functional_call(twin, weights, kwargs=inputs).logits[kept].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    kl.backward()

    assert sums.loss == pytest.approx(float(kl.detach()), rel=1e-5)
    assert len(leaves) > 10
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert bool(leaf.grad.any()), name
        torch.testing.assert_close(gains[name].grad, leaf.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_model_is_judged_as_it_would_be_stored_and_learns_on_in_floats(
    tmp_path: Path, rough: Path, model: Path, texts: Path
) -> None:
    settings = TuningSettings(**OPTIONS)
    training, judged = tuning._read_blocks(rough, texts, None, settings, date.today())
    scaled = ScaledModel(rough, norms=True)
    with accelerating(settings, logs=rough) as accelerator:
        step = ScaleStep(scaled.model, 128)
        said = ask_teacher(model, training, judged, accelerator, tmp_path)
        task = ScaleTuning(step, scaled, *said, judged, settings, accelerator)
        assert task.evaluate().kl == pytest.approx(measured(model, rough, texts), rel=1e-6)
        stored = load_file(rough / "model.safetensors")
        assert all(torch.equal(stored[name], value) for name, value in scaled.tuned().items())
        linear = next(iter(scaled.linears.values()))
        # Less than half of what float16 can tell apart: it is kept, and not judged.
        with torch.no_grad():
            linear.gain.fill_(1 + 2e-4)
        assert task.evaluate().kl == pytest.approx(measured(model, rough, texts), rel=1e-6)
        assert bool((linear.gain == torch.tensor(1 + 2e-4)).all())


def test_micro_batches_change_nothing_but_rounding(
    tmp_path: Path, rough: Path, model: Path, texts: Path
) -> None:
    folders = [
        quantize.tune(
            rough, tmp_path / f"of-{size}", teacher=model, texts=texts, **OPTIONS,
            micro_batch_size=size, gradient_checkpointing=size == 2,
        )
        for size in (1, 2)
    ]  # fmt: skip
    one, two = (read_lineage(folder)[-1]["after"]["kl"] for folder in folders)
    assert one == pytest.approx(two, rel=1e-3)
    with pytest.raises(SettingsError, match="micro_batch_size should divide batch_size"):
        TuningSettings(batch_size=4, micro_batch_size=3)


def test_the_best_of_all_measurements_is_kept(
    tmp_path: Path, rough: Path, model: Path, texts: Path
) -> None:
    options = {**OPTIONS, "learning_rate": 0.05, "evaluate_every": 1}
    made = quantize.tune(rough, tmp_path / "tuned", teacher=model, texts=texts, **options)
    kls = {line["step"]: line["held_out"]["kl"] for line in lines_of(made) if "held_out" in line}
    assert list(kls) == list(range(13))
    step = read_lineage(made)[-1]
    assert kls[step["kept_step"]] == min(kls.values()) == step["after"]["kl"]
    assert measured(model, made, texts) == pytest.approx(step["after"]["kl"], rel=1e-5)


def test_what_a_tracker_wrote_is_published(
    tmp_path: Path, rough: Path, model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(self: Any, step: int, blocks: Any) -> Any:
        log = self.accelerator.project_configuration.logging_dir
        Path(log).mkdir(exist_ok=True)
        (Path(log) / "events").write_text("loss")
        return real(self, step, blocks)

    real = ScaleTuning.gradients
    monkeypatch.setattr(ScaleTuning, "gradients", written)
    made = quantize.tune(rough, tmp_path / "tuned", teacher=model, texts=texts, **OPTIONS)
    assert (made / "tensorboard" / "events").read_text() == "loss"


def test_a_step_in_bfloat16_keeps_scales_in_float32_and_learns_alike(
    tmp_path: Path, rough: Path, model: Path, texts: Path
) -> None:
    gradients = {}
    for precision in ("float32", "bfloat16"):
        settings = TuningSettings(**OPTIONS, precision=precision)
        training, judged = tuning._read_blocks(rough, texts, None, settings, date.today())
        scaled = ScaledModel(rough, norms=True)
        work = tmp_path / f"work-{precision}"
        work.mkdir()
        with accelerating(settings, logs=work) as accelerator:
            step = accelerator.prepare(ScaleStep(scaled.model, 128))
            said = ask_teacher(model, training, judged, accelerator, work)
            task = ScaleTuning(step, scaled, *said, judged, settings, accelerator)
            task.gradients(0, training[:2])
        gains = [linear.gain for linear in scaled.linears.values()]
        gains += [norm.gain for norm in scaled.norms.values()]
        assert {gain.dtype for gain in gains} == {torch.float32}
        found = [gain.grad.flatten() for gain in gains if gain.grad is not None]
        assert len(found) == len(gains)
        gradients[precision] = torch.cat(found)
    ours, theirs = gradients["bfloat16"], gradients["float32"]
    assert not torch.equal(ours, theirs)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999

    folders = [
        quantize.tune(
            rough, tmp_path / precision, teacher=model, texts=texts, **OPTIONS, precision=precision
        )
        for precision in ("float32", "bfloat16")
    ]
    one, two = (read_lineage(folder)[-1]["after"]["kl"] for folder in folders)
    assert one == pytest.approx(two, rel=0.02)


def test_where_the_loss_is_no_number_the_best_model_until_then_is_kept(
    tmp_path: Path, rough: Path, model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, step: int, blocks: Any) -> Any:
        sums = real(self, step, blocks)
        return sums if step < 8 else replace(sums, loss=float("nan"))

    real = ScaleTuning.gradients
    monkeypatch.setattr(ScaleTuning, "gradients", broken)
    options = {**OPTIONS, "evaluate_every": 2}
    with pytest.raises(TrainingError, match=r"lower learning_rate.*kept in") as refused:
        quantize.tune(rough, tmp_path / "tuned", teacher=model, texts=texts, **options)
    kept = Path(str(refused.value).rpartition("kept in ")[2])
    assert measured(model, kept, texts) < measured(model, rough, texts)
    assert not (tmp_path / "tuned").exists()


@pytest.mark.slow
def test_two_processes_learn_as_one_does(
    tmp_path: Path, rough: Path, model: Path, texts: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys\nimport torch\ntorch.set_num_threads(1)\nimport quantize\n"
        "source, target, teacher, texts, options = sys.argv[1:]\n"
        "quantize.tune(source, target, teacher=teacher, texts=texts, **json.loads(options))\n"
    )
    folders = []
    for processes in (1, 2):
        folders.append(tmp_path / f"by-{processes}")
        words = [program, rough, folders[-1], model, texts, json.dumps(OPTIONS)]
        done = launched(words, tmp_path, processes)
        assert done.returncode == 0, done.stderr
    losses = [[line["loss"] for line in lines_of(folder) if "loss" in line] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=2e-3, atol=1e-5, msg=name)
    assert [read_lineage(folder)[-1]["processes"] for folder in folders] == [1, 2]


def test_several_texts_are_read_alike_and_what_is_judged_is_not_trained_on(
    model: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "short.txt", tmp_path / "long.txt"]
    numbers = [str(number * number) for number in range(100, 2000)]
    files[0].write_text(" ".join(numbers[:100]))
    files[1].write_text(" and ".join(numbers[100:]))
    settings = TuningSettings(steps=6, batch_size=2, block_length=32, held_out_blocks=4)
    training, judged = tuning._read_blocks(model, files, None, settings, date.today())
    assert (len(training), len(judged)) == (12, 4)
    blocks = [{tuple(row) for row in part.ids.tolist()} for part in (training, judged)]
    assert not blocks[0] & blocks[1]
    for file in files:
        own = {tuple(row) for row in read_ids(model, file).tolist()}
        assert len(own & blocks[0]) >= 4, f"little of {file.name} is trained on"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_ids(model: Path, text: Path) -> Any:
    from mistill.text.blocks import pack
    from mistill.text.documents import read_documents
    from mistill.text.vocabulary import load_vocabulary

    return pack(read_documents(text, load_vocabulary(model)), 32).ids


def test_the_learning_rate_is_above_0_in_every_step(
    tmp_path: Path, rough: Path, model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    real = torch.optim.AdamW.step

    def recorded(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    options = {**OPTIONS, "steps": 20, "batch_size": 1}
    quantize.tune(rough, tmp_path / "tuned", teacher=model, texts=texts, **options)

    assert len(rates) == 20
    # A tenth of the steps rise to the peak; the cosine of the others ends a step short of 0.
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01])
    assert rates[11] == pytest.approx(0.01 / 2)
    assert rates[-1] == pytest.approx(0.01 * (1 + math.cos(math.pi * 17 / 18)) / 2)
    assert min(rates) > 0


def test_norms_stay_where_they_are_asked_to(
    tmp_path: Path, rough: Path, model: Path, texts: Path
) -> None:
    made = quantize.tune(
        rough, tmp_path / "tuned", teacher=model, texts=texts, norms=False, **OPTIONS
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (rough, made))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"scales"}


def test_an_interrupted_run_resumes_to_the_same_bytes(
    tmp_path: Path, rough: Path, model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "steps": 14}
    whole = quantize.tune(rough, tmp_path / "whole", teacher=model, texts=texts, **options)
    real, taken = ScaleTuning.gradients, [0]

    def counted(self: Any, step: int, blocks: Any) -> Any:
        taken[0] += 1
        if taken[0] == 13:
            raise KeyboardInterrupt
        return real(self, step, blocks)

    monkeypatch.setattr(ScaleTuning, "gradients", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize.tune(rough, tmp_path / "parts", teacher=model, texts=texts, **options)
    assert not (tmp_path / "parts").exists()
    taken[0] = 100
    parts = quantize.tune(rough, tmp_path / "parts", teacher=model, texts=texts, **options)

    assert taken[0] == 104, "it went on from the tenth step"
    name = "model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_tuning_that_does_harm_is_not_published(
    tmp_path: Path, rough: Path, model: Path, texts: Path
) -> None:
    options = {**OPTIONS, "steps": 4, "learning_rate": 0.9}
    with pytest.raises(TrainingError, match="lower learning_rate"):
        quantize.tune(rough, tmp_path / "tuned", teacher=model, texts=texts, **options)
    assert not list(tmp_path.iterdir()), "there is nothing that a second try could go on with"


def test_what_is_wrong_is_said_at_once(
    tmp_path: Path, rough: Path, model: Path, texts: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(FolderError, match="give a GPTQ folder to tune"):
        quantize.tune(model, out, teacher=model, texts=texts)
    with pytest.raises(SettingsError, match="learning_rate must be above 0 and below 1"):
        quantize.tune(rough, out, teacher=model, texts=texts, learning_rate=1.5)
    with pytest.raises(SettingsError, match="does not fit the models' context of 512"):
        quantize.tune(rough, out, teacher=model, texts=texts, block_length=513)
    with pytest.raises(SettingsError, match="steps must be at least 1"):
        quantize.tune(rough, out, teacher=model, texts=texts, steps=0)
    short = tmp_path / "short.txt"
    short.write_text("Too short.", "utf-8")
    with pytest.raises(TextError, match="fill no block"):
        quantize.tune(rough, out, teacher=model, texts=short, **OPTIONS)
    stranger = tiny_model(tmp_path / "stranger")
    tokenizer = json.loads((stranger / "tokenizer.json").read_text("utf-8"))
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[300:302]
    words[first], words[second] = words[second], words[first]
    (stranger / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(VocabularyError, match="different vocabularies"):
        quantize.tune(rough, out, teacher=stranger, texts=texts)
    assert not out.exists()


def test_of_text_that_the_student_was_distilled_on_only_what_was_kept_back_is_read(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"{SENTENCES[n % len(SENTENCES)]} Number {n}, {n * n} and {n + 7}." for n in range(80)]
    seen, other = tmp_path / "seen.jsonl", tmp_path / "other.jsonl"
    seen.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
    other.write_text("".join(json.dumps({"text": row[::-1]}) + "\n" for row in rows), "utf-8")
    student = distill.new_student(model, tmp_path / "cut", layers=1, choose="even")
    trained = distill.train(
        student, tmp_path / "trained", teacher=model, texts=seen, held_out=other, tokens=600,
        block_length=64, kept_back_share=0.2, learning_rate=1e-3, held_out_tokens=256,
    )  # fmt: skip
    step = read_lineage(trained)[-1]
    vocabulary = load_vocabulary(model)
    everything = list(read_documents(seen, vocabulary))
    kept = [document for document in everything if is_kept_back(document, 0.2)]
    assert 5 < len(kept) < 30
    learnt, _ = read_blocks(seen, other, vocabulary, TrainSettings(block_length=64), kept_back=0.2)
    assert step["texts"] == [seen.name]
    assert learnt.tokens == sum(len(each.ids) for each in everything) - sum(
        len(each.ids) for each in kept
    )

    rounded = quantize.to_rounding(trained, tmp_path / "rounded", bits=3, group_size=32)
    settings = TuningSettings(steps=8, batch_size=1, block_length=128, held_out_blocks=1)

    def read(texts: Any, **options: Any) -> set[bytes]:
        both = tuning._read_blocks(rounded, texts, None, replace(settings, **options), date.today())
        return {
            blocks.ids[row, start:stop].tobytes()
            for blocks in both
            for row, start, stop in blocks.runs.tolist()
            if blocks.documents[row, start] >= 0
        }

    assert read(seen) == {document.ids.tobytes() for document in kept}
    assert "give text it has not seen" not in caplog.text
    assert len(read(seen, steps=200, seen_text=True)) == len(everything)
    assert len(read([seen, other], steps=400)) == len(kept) + len(rows)

    # An older student says of no document that it was kept back.
    lineage = trained / "lineage.json"
    lineage.write_text(lineage.read_text("utf-8").replace("kept_back_share", "older"), "utf-8")
    older = quantize.to_rounding(trained, tmp_path / "older", bits=3, group_size=32)
    blocks, _ = tuning._read_blocks(older, seen, None, replace(settings, steps=200), date.today())
    assert blocks.tokens > sum(len(document.ids) for document in kept)
    assert f"trained on all of {seen}; give text it has not seen" in caplog.text
