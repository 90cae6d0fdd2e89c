"""What is said of a folder that was measured is what it predicts; nothing else of it changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantize
from mistill.cli.app import main
from mistill.cli.fidelity import read_fidelity
from mistill.errors import FolderError, SettingsError, TextError, VocabularyError
from mistill.folders.folder import QUANTIZE_REPORT_FILE, read_json
from mistill.folders.lineage import fingerprint, read_lineage
from mistill.measures.kl import compare, predict
from mistill.pytorch.loading import load_pytorch
from mistill.recipe import read_recipe, run_recipe
from mistill.text.blocks import pack
from mistill.text.documents import read_documents
from mistill.text.vocabulary import load_vocabulary
from tests.tiny import SENTENCES, tiny_model

SMALL: dict[str, Any] = {"samples": 4, "block_length": 64}
WAYS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "gptq": (quantize.to_gptq, {"group_size": 32, **SMALL}),
    "rounding": (quantize.to_rounding, {"group_size": 32}),
    "nf4": (quantize.to_nf4, {}),
    "mixed": (
        quantize.to_mixed,
        {"bits_per_weight": 9, "formats": ("bits=4, group_size=32",), **SMALL},
    ),
}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("held-out") / "text.txt"
    file.write_text(" ".join(SENTENCES[::-1] * 12), "utf-8")
    return file


@pytest.mark.parametrize("way", WAYS)
def test_what_is_said_is_what_the_folder_predicts_and_all_else_stays(
    way: str, model: Path, teacher: Path, chats: Path, held_out: Path, tmp_path: Path
) -> None:
    """Against the folders loaded as a whole; and against the same call without measuring."""
    make, options = WAYS[way]
    if way in ("gptq", "mixed"):
        options = {**options, "texts": chats}
    plain = make(model, tmp_path / "plain", **options)
    made = make(model, tmp_path / "made", held_out=held_out, teacher=teacher, **options)

    blocks = pack(read_documents(held_out, load_vocabulary(model)), 512)
    folders = {"source": model, "teacher": teacher, "made": made}
    asked = {name: predict(load_pytorch(folder), blocks) for name, folder in folders.items()}
    references = {name: asked[name] for name in ("source", "teacher")}
    expected = compare(references, {"made": asked["made"], "source": asked["source"]}, blocks)
    measured = read_fidelity(made)
    assert measured is not None
    assert measured["held_out"] == [held_out.name]
    for found, wanted in (
        (measured["source"], expected["made"]["source"]),
        (measured["teacher"], expected["made"]["teacher"]),
        (measured["source_to_teacher"], expected["source"]["teacher"]),
    ):
        assert found["kl"] == pytest.approx(wanted.kl, rel=1e-3)
        assert found["kl_standard_error"] == pytest.approx(wanted.kl_standard_error, rel=1e-2)
        assert found["kl_p99"] == pytest.approx(wanted.kl_p99, rel=1e-2)
        assert found["agreement"] == pytest.approx(wanted.agreement, abs=2 / wanted.tokens)
        assert found["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-4)
        assert found["reference_perplexity"] == pytest.approx(wanted.reference_perplexity, rel=1e-4)
        assert found["tokens"] == int(blocks.kept.sum())
    assert 0 < measured["source"]["kl"] < measured["teacher"]["kl"]

    assert fingerprint(made) == fingerprint(plain)
    steps = [read_lineage(folder)[-1] for folder in (made, plain)]
    assert {**steps[0], "date": None} == {**steps[1], "date": None}
    report = read_json(plain / QUANTIZE_REPORT_FILE)
    assert report.keys() == read_json(made / QUANTIZE_REPORT_FILE).keys() - {"measured"}
    assert read_fidelity(plain) is None


def test_a_folder_that_cannot_be_measured_does_not_appear_and_the_work_is_kept(
    model: Path, chats: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "small"
    options = {"group_size": 32, "texts": chats, "held_out": held_out, **SMALL}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quantize.measuring.fidelity.predictions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize.to_gptq(model, target, **options)
        assert not target.exists()
        with pytest.raises(KeyboardInterrupt):
            quantize.to_rounding(model, tmp_path / "r", group_size=32, held_out=held_out)
        assert not (tmp_path / "r").exists()
    monkeypatch.setattr("quantize.folders.gptq_folder.quantize_layer", None)
    quantize.to_gptq(model, target, **options)
    assert read_fidelity(target) is not None


def test_what_cannot_be_compared_is_refused_before_any_work(
    model: Path, chats: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.folders.gptq_folder.LayeredModel", None)
    target = tmp_path / "small"
    grid: dict[str, Any] = {"group_size": 32, **SMALL}
    with pytest.raises(SettingsError, match="give held_out"):
        quantize.to_gptq(model, target, texts=chats, teacher=model, **grid)
    with pytest.raises(SettingsError, match="give held_out"):
        quantize.to_nf4(model, target, teacher=model)
    other = tiny_model(tmp_path / "other", vocab_size=400)
    with pytest.raises(VocabularyError, match="different vocabularies: 384 rows against 400"):
        quantize.to_gptq(model, target, texts=chats, held_out=held_out, teacher=other, **grid)
    with pytest.raises(FolderError, match="nowhere"):
        quantize.to_nf4(model, target, held_out=held_out, teacher=tmp_path / "nowhere")
    monkeypatch.setattr("quantize.folders.rounding_folder.TensorWriter", None)
    empty = tmp_path / "one.txt"
    empty.write_text("a", "utf-8")
    with pytest.raises(TextError, match="no token to predict"):
        quantize.to_rounding(model, target, group_size=32, held_out=empty)
    assert not target.exists()


def test_the_commands_show_it_and_inspect_does_too(
    model: Path, teacher: Path, chats: Path, held_out: Path, tmp_path: Path, capsys: Any
) -> None:
    judging = ["--held-out", str(held_out), "--teacher", str(teacher), "--json"]
    calibration = ["--texts", str(chats), "--samples", "4", "--block-length", "64"]
    mix = ["--bits-per-weight", "9", "--formats", "bits=4, group_size=32"]
    for way, options in (
        ("gptq", [*calibration, "--group-size", "32"]),
        ("rounding", ["--group-size", "32"]),
        ("nf4", []),
        ("mixed", [*calibration, *mix]),
    ):
        target = tmp_path / way
        assert main(["quantize", way, str(model), str(target), *options, *judging]) == 0
        printed = capsys.readouterr().out
        measured = read_fidelity(target)
        assert measured is not None
        assert json.loads(printed.splitlines()[-1])["measured"] == measured
        kls = [f"{measured[name]['kl']:.5f}" for name in measured if name != "held_out"]
        assert len(kls) == 3
        assert all(kl in printed for kl in kls)
    assert main(["inspect", str(target), "--json"]) == 0
    printed = capsys.readouterr().out
    assert all(kl in printed for kl in kls)
    assert json.loads(printed.splitlines()[-1])["measured"] == measured


def test_a_recipe_measures_where_it_is_told_to(
    model: Path, teacher: Path, held_out: Path, tmp_path: Path
) -> None:
    file = tmp_path / "r.toml"
    asking = f'held_out = "{held_out}"\nteacher = "{teacher}"\n'
    text = f'[small]\nstep = "rounding"\nsource = "{model}"\ngroup_size = 32\n'
    next_step = '[plain]\nstep = "nf4"\nsource = "rotated"\n'
    rotated = f'[rotated]\nstep = "rotate"\nsource = "{model}"\nseed = 4\n'
    file.write_text(text + asking + rotated + next_step)
    made = run_recipe(read_recipe(file, out=tmp_path / "out"))
    measured = read_fidelity(made["small"])
    assert measured is not None
    assert measured["teacher"]["kl"] > measured["source"]["kl"] > 0
    assert [step["step"] for step in read_lineage(made["plain"])] == ["rotate", "nf4"]
    assert read_lineage(made["rotated"])[-1]["settings"]["seed"] == 4


def test_a_recipe_tunes_what_it_has_rounded(model: Path, held_out: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        f'''
[rough]
step = "rounding"
source = "{model}"
bits = 3
group_size = 32

[tuned]
step = "tune"
source = "rough"
teacher = "{model}"
texts = "{held_out}"
steps = 6
batch_size = 2
block_length = 32
learning_rate = 1e-2
held_out_blocks = 4
'''
    )
    made = run_recipe(read_recipe(file, out=tmp_path / "out"))
    step = read_lineage(made["tuned"])[-1]
    assert (step["step"], step["settings"]["steps"]) == ("tune", 6)
    assert step["after"]["kl"] < step["before"]["kl"]
