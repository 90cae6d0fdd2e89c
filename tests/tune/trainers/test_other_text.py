"""What a report says of text that a model was not tuned on."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tune
from mistill.cli.app import main
from mistill.errors import SettingsError, TextError
from mistill.folders.lineage import read_lineage
from mistill.pytorch.loading import load_pytorch
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import SENTENCES, tiny_model
from tune.settings import PreferenceSettings, ReinforceSettings, SupervisedSettings
from tune.trainers.other_text import read_other_text

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SUPERVISED: dict[str, Any] = {
    "block_length": 128,
    "batch_size": 2,
    "learning_rate": 5e-3,
    "tokens": 1500,
    "held_out_share": 0.2,
    "lora_rank": 4,
    "replies": 0,
}
STEPS: dict[str, Any] = {
    "batch_size": 4,
    "lora_rank": 4,
    "learning_rate": 5e-3,
    "steps": 2,
    "keep": "last",
}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text and conversations that no test tunes on."""
    file = tmp_path_factory.mktemp("other") / "other.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
        for one, other in itertools.pairwise(SENTENCES)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def report_of(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "tuning_report.json").read_text("utf-8"))
    return read


def slowly(base: Path, tuned: Path, text: Path) -> dict[str, float]:
    """The same figures, document by document and without blocks."""
    documents = list(read_documents(text, load_vocabulary(base)))
    nats: dict[str, list[float]] = {"before": [], "after": []}
    there = back = 0.0
    models: list[Any] = [load_pytorch(base), load_pytorch(tuned)]
    for document in documents:
        with torch.no_grad():
            p, q = (
                model(torch.tensor(document.ids)[None], use_cache=False)
                .logits[0]
                .double()
                .log_softmax(-1)
                for model in models
            )
        for place in range(1, len(document.ids)):
            if document.mask[place]:
                before, after = p[place - 1], q[place - 1]
                nats["before"].append(-float(before[document.ids[place]]))
                nats["after"].append(-float(after[document.ids[place]]))
                there += float((after.exp() * (after - before)).sum())
                back += float((before.exp() * (before - after)).sum())
    count = len(nats["before"])
    return {
        "before": math.fsum(nats["before"]) / count,
        "after": math.fsum(nats["after"]) / count,
        "tuned_from_base": there / count,
        "base_from_tuned": back / count,
        "tokens": count,
    }


def agree(found: dict[str, Any], expected: dict[str, float]) -> None:
    for when in ("before", "after"):
        assert found[when]["cross_entropy"] == pytest.approx(expected[when], rel=1e-5)
    for way in ("tuned_from_base", "base_from_tuned"):
        assert found["kl"][way] == pytest.approx(expected[way], rel=1e-3)
        assert found["kl"][way] > 1e-6
    assert found["kl"]["tokens"] == expected["tokens"]
    assert found["change"] == pytest.approx(expected["after"] - expected["before"], abs=1e-5)


def test_supervised_tuning_tells_what_the_folders_say_of_other_text(model, chats, other, tmp_path):
    made = tune.supervised(model, tmp_path / "out", texts=chats, other_texts=other, **SUPERVISED)
    found = report_of(made)["other_text"]
    assert found["texts"] == ["other.jsonl"]
    agree(found, slowly(model, made, other))
    assert found["change"] != pytest.approx(report_of(made)["change"], abs=1e-3)
    (entry,) = read_lineage(made)
    assert entry["other_texts"] == ["other.jsonl"]
    assert entry["other_text"] == found


@pytest.mark.parametrize("rank", [4, 0])
def test_preferences_tell_what_the_folders_say_of_other_text(rank, model, pairs, other, tmp_path):
    options = {**STEPS, "max_length": 200, "lora_rank": rank}
    made = tune.preferences(model, tmp_path / "out", pairs=pairs, other_texts=other, **options)
    found = report_of(made)["other_text"]
    agree(found, slowly(model, made, other))
    # Each of the five conversations is a part of one block or of two.
    assert found["change_standard_error"] is None or found["change_standard_error"] > 0
    (entry,) = read_lineage(made)
    assert entry["other_texts"] == ["other.jsonl"]
    assert entry["other_text"] == found


def test_reinforcement_tells_what_the_folders_say_of_other_text(model, other, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{text} {n}\n" for n in range(3) for text in SENTENCES))
    made = tune.reinforce(
        model,
        tmp_path / "out",
        prompts=prompts,
        reward=lambda messages, answer, **columns: float(len(answer)),
        other_texts=other,
        samples=2,
        max_length=100,
        max_new_tokens=4,
        held_out_prompts=2,
        **STEPS,
    )
    found = report_of(made)["other_text"]
    # Answers that were cut off teach nothing, so that a tiny model may not have moved.
    expected = slowly(model, made, other)
    for when in ("before", "after"):
        assert found[when]["cross_entropy"] == pytest.approx(expected[when], rel=1e-5)
    (entry,) = read_lineage(made)
    assert entry["other_texts"] == ["other.jsonl"]
    assert entry["other_text"] == found


def test_without_a_name_shipped_conversations_are_read_and_the_command_tells(
    model, pairs, tmp_path, capsys
):
    words = "--steps 2 --batch-size 4 --max-length 200 --learning-rate 1e-3 --keep last"
    command = ["tune", "preferences", str(model), str(tmp_path / "out"), "--pairs", str(pairs)]
    assert main([*command, *words.split(), "--other-tokens", "600"]) == 0
    found = report_of(tmp_path / "out")["other_text"]
    assert found["texts"] == ["@demo-held-out"]
    assert 0 < found["kl"]["tokens"] < 600
    said = capsys.readouterr().out
    assert (
        f"on other text (@demo-held-out): cross-entropy {found['before']['cross_entropy']:.4f} "
        f"before, {found['after']['cross_entropy']:.4f} after ({found['change']:+.4f}"
    ) in said
    assert f"KL(tuned || base) {found['kl']['tuned_from_base']:.4f}, KL(base || tuned) " in said


def test_nothing_is_read_where_nothing_is_asked_for(model, pairs, tmp_path, capsys):
    words = "--steps 1 --batch-size 4 --max-length 200 --learning-rate 1e-3 --keep last"
    command = ["tune", "preferences", str(model), str(tmp_path / "out"), "--pairs", str(pairs)]
    assert main([*command, *words.split(), "--other-tokens", "0"]) == 0
    assert report_of(tmp_path / "out")["other_text"] is None
    assert "other text" not in capsys.readouterr().out


def test_as_many_tokens_are_read_as_are_allowed(model, other):
    vocabulary = load_vocabulary(model)
    for tokens in (64, 700, 5000):
        settings = SupervisedSettings(other_tokens=tokens)
        read = read_other_text(None, vocabulary, 512, settings)
        assert read is not None
        assert tokens - 64 < int(read.blocks.tokens) <= tokens
        assert read.blocks.block_length == 512
    read = read_other_text(other, vocabulary, 100, SupervisedSettings())
    assert read is not None
    assert read.blocks.block_length == 100


def test_a_model_without_a_template_reads_the_shipped_replies_as_plain_text(tmp_path):
    folder = tiny_model(tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    vocabulary = load_vocabulary(folder)
    read = read_other_text(None, vocabulary, 512, SupervisedSettings(other_tokens=300))
    assert read is not None
    assert read.names == ["@demo-held-out, replies"]
    text = vocabulary.decode(read.blocks.ids[0][:40].tolist())
    assert text.startswith("The sky appears blue because")
    assert read.blocks.kept[0][:300].sum() > 290


def test_text_that_is_missing_or_not_read_is_refused_before_a_weight_is(
    model, chats, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr("mistill.pytorch.loading.load_pytorch", None)
    out = tmp_path / "out"
    with pytest.raises(TextError, match=r"missing\.jsonl"):
        tune.supervised(model, out, texts=chats, other_texts=tmp_path / "missing.jsonl")
    with pytest.raises(TextError, match=r"missing\.jsonl"):
        tune.preferences(model, out, pairs=pairs, other_texts=tmp_path / "missing.jsonl")
    for run, data in ((tune.supervised, "texts"), (tune.preferences, "pairs")):
        with pytest.raises(SettingsError, match="other_tokens 0 reads none of it"):
            run(model, out, **{data: chats}, other_texts=chats, other_tokens=0)
    for settings in (SupervisedSettings, PreferenceSettings, ReinforceSettings):
        with pytest.raises(SettingsError, match="other_tokens must be at least 0"):
            settings(other_tokens=-1)
    assert not out.exists()
