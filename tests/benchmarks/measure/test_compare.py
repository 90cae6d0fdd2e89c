from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export
import quantize
from benchmarks.figures.fidelity import divergences
from benchmarks.measure import measuring
from benchmarks.measure.child import Worker
from benchmarks.measure.measuring import compare
from benchmarks.measure.questions import read_everyday_prompts
from benchmarks.measure.subjects import short_names
from benchmarks.report.report import Report
from benchmarks.settings import BenchSettings
from mistill.chat.bot import ChatBot
from mistill.errors import (
    FolderError,
    MissingExtraError,
    SettingsError,
    TextError,
    VocabularyError,
)
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary

QUICK: dict[str, Any] = {
    "threads": 1,
    "scored_tokens": 150,
    "rounds": 2,
    "prompt_tokens": 12,
    "new_tokens": 4,
    "context_length": 256,
}
ASKED: dict[str, Any] = {
    "sample_prompts": ("Hi",),
    "sample_models": ("model",),
    "sample_tokens": 6,
    "tasks": True,
    "task_models": ("model",),
    "replies": True,
    "reply_models": ("model",),
    "reply_tokens": 6,
}


class Neighbour:
    """A child without a process, for what does not depend on there being one."""

    log: list[tuple[str, str]]

    def __init__(self, folder: Path, log: list[tuple[str, str]]) -> None:
        self.worker = Worker(folder, 1)
        self.log = log

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.log.append((self.worker.folder.name, do))
        answer: dict[str, Any] = json.loads(json.dumps(self.worker.ask(do, **arguments)))
        return answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Run the models in this process, and note what is asked of whom."""
    log: list[tuple[str, str]] = []

    @contextmanager
    def start(folders: Sequence[Path], threads: int, provider: str) -> Iterator[list[Neighbour]]:
        yield [Neighbour(folder, log) for folder in folders]

    monkeypatch.setattr(measuring, "start_children", start)
    return log


@pytest.fixture(scope="module")
def comparison(teacher: Path, model: Path, chats: Path) -> Report:
    """Two models compared in processes of their own."""
    return compare([teacher, model], texts=chats, **ASKED, **QUICK)


def test_the_first_model_is_the_reference_and_has_no_distance_from_itself(comparison: Report):
    assert comparison.reference == "teacher"
    assert [result.name for result in comparison.models] == ["teacher", "model"]
    assert comparison["teacher"].fidelity is None
    assert comparison["teacher"].mean_kl == 0


def test_quality_is_what_the_models_logits_say(
    comparison: Report, teacher: Path, model: Path, chats: Path
):
    judge, student = Worker(teacher, 1), Worker(model, 1)
    judge.open()
    student.open()
    losses, distances = [], []
    for document in read_documents(chats, load_vocabulary(teacher)):
        ids, kept = document.ids, document.mask[1:]
        theirs = judge.model.logits(ids[None])[0, :-1][kept].astype(np.float64)
        ours = student.model.logits(ids[None])[0, :-1][kept].astype(np.float64)
        log_p = ours - np.log(np.exp(ours).sum(axis=1, keepdims=True))
        losses += list(-log_p[np.arange(len(ours)), ids[1:][kept]])
        distances += list(divergences(theirs.astype(np.float32), ours.astype(np.float32)))
    result = comparison["model"]

    assert result.perplexity.tokens == 150
    assert result.perplexity.mean_loss == pytest.approx(np.mean(losses[:150]), rel=1e-5)
    assert result.fidelity is not None
    assert result.fidelity.mean_kl == pytest.approx(np.mean(distances[:150]), rel=1e-5)


def test_every_round_is_kept_and_float_folders_meet_their_rival(comparison: Report):
    for result in comparison.models:
        assert result.transformers_latency is not None
        for latency in (result.latency, result.transformers_latency):
            assert [len(turn.token_seconds) for turn in latency.turns] == [3, 3]
    over = comparison["teacher"].transformers_latency
    assert over is not None
    assert comparison.speedup("model", over="teacher") == pytest.approx(
        comparison["model"].latency.decode_tokens_per_second / over.decode_tokens_per_second
    )


def test_footprint_is_measured_from_the_files(comparison: Report, model: Path):
    footprint = comparison["model"].footprint

    assert footprint.weight_bytes == (model / "model.safetensors").stat().st_size
    assert footprint.folder_bytes == sum(file.stat().st_size for file in model.iterdir())
    assert footprint.bits_per_weight == pytest.approx(32, rel=0.02)
    assert footprint.peak_memory_bytes >= footprint.resident_memory_bytes > 50e6
    assert footprint.load_seconds > 0


def test_the_record_says_what_it_was_measured_on(comparison: Report, chats: Path):
    assert comparison.machine.threads == 1
    assert comparison.machine.memory_bytes > 1 << 28
    assert comparison.machine.versions["torch"]
    assert comparison.text.sources == (chats.name,)
    assert comparison.text.tokens_scored == 150
    assert comparison.text.tokens_read > 150
    assert comparison.settings == BenchSettings(**QUICK, **ASKED)


def test_the_samples_are_what_a_chatbot_says(comparison: Report, model: Path):
    bot = ChatBot(model, temperature=0, max_new_tokens=6)
    said = "".join(bot.reply("Hi")).strip()
    assert list(comparison.samples) == ["Hi"]
    assert list(comparison.samples["Hi"]) == ["model"]
    assert comparison.samples["Hi"]["model"].removesuffix(" \u2026") == said


def test_the_everyday_replies_are_what_a_chatbot_says(comparison: Report, model: Path):
    replies = comparison["model"].replies
    assert replies is not None
    prompts = read_everyday_prompts()
    bot = ChatBot(model, temperature=0, max_new_tokens=6)
    assert len(replies.texts) == len(replies.ended) == len(prompts)
    for place in (0, 7):
        assert replies.texts[place] == "".join(bot.reply(prompts[place])).strip()
        assert replies.ended[place] == (bot.last_ending != "max_new_tokens")
        bot.reset()
    assert comparison["teacher"].replies is None


def test_only_the_models_that_are_named_answer_the_questions(comparison: Report):
    answers = comparison["model"].answers
    assert answers is not None
    assert len(answers.right) == 120
    assert comparison["teacher"].answers is None


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        ("sample_models", {"sample_prompts": ("Hi",)}),
        ("task_models", {"tasks": True}),
        ("reply_models", {"replies": True}),
    ],
)
def test_a_model_that_is_not_compared_cannot_be_asked(
    names: str, asked: dict[str, Any], model: Path, chats: Path
):
    nobody: dict[str, Any] = {names: ("nobody",)}
    with pytest.raises(SettingsError, match=f"{names} names nobody"):
        compare(model, texts=chats, **asked, **nobody, **QUICK)
    with pytest.raises(SettingsError, match=f"{names} names models, and nothing is asked"):
        BenchSettings(**nobody)


def test_a_real_comparison_survives_the_round_trip(comparison: Report):
    assert Report.from_json(comparison.to_json()) == comparison


def test_models_take_turns(asked: list[tuple[str, str]], teacher: Path, model: Path, chats: Path):
    compare([teacher, model], texts=chats, **QUICK, transformers_generate=False)

    assert [name for name, do in asked if do == "turn"] == [
        *("teacher", "model"),  # warm-up
        *("teacher", "model"),
        *("model", "teacher"),
    ]
    assert asked.index(("model", "memory")) < asked.index(("model", "score"))


def test_a_reference_from_outside_is_scored_but_not_listed(
    asked: list[tuple[str, str]], teacher: Path, model: Path, chats: Path
):
    found = compare([model], texts=chats, reference=teacher, **QUICK)

    assert found.reference == "teacher"
    assert [result.name for result in found.models] == ["model"]
    assert found["model"].mean_kl > 0.01
    assert ("teacher", "turn") not in asked


def test_the_last_model_can_be_the_reference(
    asked: list[tuple[str, str]], teacher: Path, model: Path, chats: Path
):
    found = compare([model, teacher], texts=chats, reference=teacher, **QUICK)

    assert found["teacher"].fidelity is None
    assert found["model"].mean_kl > 0.01


def test_a_copy_of_the_reference_has_no_distance_from_it(
    asked: list[tuple[str, str]], teacher: Path, chats: Path, tmp_path: Path
):
    copy = shutil.copytree(teacher, tmp_path / "copy")

    found = compare([teacher, copy], texts=chats, **QUICK)

    assert found["copy"].mean_kl == 0
    assert found["copy"].fidelity is not None
    assert found["copy"].fidelity.top1_agreement == 1
    assert found["copy"].perplexity == found["teacher"].perplexity


@pytest.fixture(scope="module")
def forms(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two-layer model in every form of the road."""
    folder = tmp_path_factory.mktemp("forms")
    options: dict[str, Any] = {"group_size": 32, "bits": 4}
    return {
        "model": model,
        "gptq": quantize.to_rounding(model, folder / "gptq", **options),
        "nf4": quantize.to_nf4(model, folder / "nf4"),
        "onnx": export.to_onnx(model, folder / "onnx", parity_positions=0),
    }


def test_every_form_of_a_model_can_be_compared(
    asked: list[tuple[str, str]], forms: dict[str, Path], chats: Path
):
    found = compare(list(forms.values()), texts=chats, **QUICK)

    assert [result.form for result in found.models] == list(forms)
    # The same weights in another engine: what is left is the rounding of float32.
    assert found["onnx"].mean_kl < 1e-8
    assert found["gptq"].mean_kl > 1e-3
    assert found["nf4"].mean_kl > 1e-3
    timed = [name for name in forms if found[name].transformers_latency is not None]
    assert timed == ["model"]
    # 4-bit layers beside a 32-bit embedding and head.
    assert found["gptq"].footprint.bits_per_weight < 25
    assert len({result.footprint.parameters for result in found.models}) == 1


def test_a_quantized_model_is_also_held_against_the_float_model_it_was_made_of(
    asked: list[tuple[str, str]], forms: dict[str, Path], teacher: Path, chats: Path
):
    found = compare([teacher, *forms.values()], texts=chats, **QUICK)
    alone = compare([forms["model"], forms["gptq"]], texts=chats, **QUICK)

    assert [result.parent for result in found.models] == [None, None, "model", "model", "model"]
    assert found["gptq"].parent_fidelity == alone["gptq"].fidelity
    assert found["gptq"].parent_fidelity != found["gptq"].fidelity
    assert found["model"].parent_fidelity is None
    assert Report.from_json(found.to_json()) == found


def test_a_parent_that_is_not_compared_is_nobodys_parent(
    asked: list[tuple[str, str]], forms: dict[str, Path], teacher: Path, chats: Path
):
    found = compare([teacher, forms["gptq"]], texts=chats, **QUICK)

    assert found["gptq"].parent is None
    assert found["gptq"].parent_fidelity is None


def test_one_model_alone_can_be_measured(asked: list[tuple[str, str]], model: Path, chats: Path):
    found = compare(model, texts=chats, settings=BenchSettings(**QUICK))

    assert found.reference == "model"
    assert found["model"].perplexity.value > 1


def test_the_record_names_no_place_on_this_machine(
    asked: list[tuple[str, str]], model: Path, chats: Path, tmp_path: Path
):
    made = shutil.copytree(model, tmp_path / "made")
    step = {
        "step": "distill",
        "settings": {"source": str(tmp_path), "keep": [0, 1]},
        "source": str(tmp_path),
        "teacher": str(tmp_path / "teacher"),
        "texts": [str(tmp_path / "a.txt"), "@demo-train"],
    }
    (made / "lineage.json").write_text(json.dumps([step]))

    found = compare(made, texts=chats, **QUICK)

    assert str(tmp_path.parent) not in found.to_json()
    (kept,) = found["made"].lineage
    assert kept["source"] == tmp_path.name
    assert kept["settings"]["keep"] == [0, 1]
    assert kept["teacher"] == "teacher"
    assert kept["texts"] == ["a.txt", "@demo-train"]
    assert found.reference_fingerprint == found["made"].fingerprint


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["road/teacher", "road/small"], ["teacher", "small"]),
        (["one/model", "two/model", "small"], ["one/model", "two/model", "small"]),
        (["/a/x/m", "/b/x/m"], ["a/x/m", "b/x/m"]),
    ],
)
def test_names_are_as_short_as_can_be(paths: list[str], names: list[str]):
    assert short_names(paths) == names


# --- bad input, refused before any process is started -------------------------------------------


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(measuring, "start_children", refuse)


@pytest.mark.usefixtures("nothing_starts")
class TestBadInput:
    def test_no_models(self, chats: Path):
        with pytest.raises(SettingsError, match="there is no model to measure"):
            compare([], texts=chats)

    def test_a_model_given_twice(self, model: Path, chats: Path):
        with pytest.raises(SettingsError, match="given twice"):
            compare([model, model / ".." / model.name], texts=chats)

    def test_a_broken_folder(self, model: Path, chats: Path, tmp_path: Path):
        broken = shutil.copytree(model, tmp_path / "broken")
        (broken / "model.safetensors").unlink()
        with pytest.raises(FolderError, match=r"model\.safetensors is missing"):
            compare([model, broken], texts=chats)

    def test_a_folder_that_is_not_there(self, model: Path, chats: Path, tmp_path: Path):
        with pytest.raises((FolderError, SettingsError), match="gone"):
            compare([model, tmp_path / "gone"], texts=chats)

    def test_vocabularies_of_other_sizes(self, model: Path, chats: Path, tmp_path: Path):
        other = shutil.copytree(model, tmp_path / "other")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
        with pytest.raises(VocabularyError, match="has logits for 999 tokens"):
            compare([model, other], texts=chats)

    def test_vocabularies_of_one_size_that_differ(self, model: Path, chats: Path, tmp_path: Path):
        other = shutil.copytree(model, tmp_path / "other")
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        words = tokenizer["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(VocabularyError, match="do not share a vocabulary"):
            compare([other], texts=chats, reference=model)

    def test_empty_text(self, model: Path, tmp_path: Path):
        (tmp_path / "empty.txt").write_text("")
        with pytest.raises(TextError):
            compare(model, texts=tmp_path / "empty.txt")

    def test_text_that_is_not_there(self, model: Path, tmp_path: Path):
        with pytest.raises(TextError):
            compare(model, texts=tmp_path / "gone.txt")

    def test_more_tokens_than_a_context_holds(self, model: Path, chats: Path):
        with pytest.raises(SettingsError, match=r"a context of 512 tokens.* 500 \+ 48"):
            compare(model, texts=chats, prompt_tokens=500)

    def test_settings_twice(self, model: Path, chats: Path):
        with pytest.raises(SettingsError, match="not both"):
            compare(model, texts=chats, settings=BenchSettings(), rounds=2)


@pytest.mark.parametrize(
    "option",
    [
        {"scored_tokens": 0},
        {"context_length": 1},
        {"rounds": 0},
        {"prompt_tokens": 0},
        {"new_tokens": 1},
        {"turn_seconds": 0.0},
        {"threads": 0},
        {"provider": "gpu"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(option: dict[str, Any]):
    with pytest.raises(SettingsError, match=next(iter(option))):
        BenchSettings(**option)


def test_a_provider_that_is_not_there_is_refused_before_anything_is_measured(
    model: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
):
    def unwanted(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("benchmarks.measure.measuring.start_children", unwanted)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingExtraError, match="has no CUDAExecutionProvider here"):
        compare([model], texts=str(chats), settings=BenchSettings(provider="cuda"))
