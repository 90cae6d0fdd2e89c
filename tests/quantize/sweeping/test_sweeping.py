"""A sweep's folders are those of its commands, and its figures those of the folders."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import quantize
from mistill.cli.app import main
from mistill.errors import FolderError, SettingsError, TargetExistsError, VocabularyError
from mistill.folders.lineage import read_lineage
from mistill.measures.kl import compare, predict
from mistill.pytorch.loading import load_pytorch
from quantize.calibration_text import draw_blocks
from quantize.measuring.fidelity import measure, predictions
from quantize.settings import GptqSettings
from quantize.sweeping.sweeping import SweepReport, SweepRow, mark_dominated
from tests.tiny import SENTENCES, tiny_model

SMALL: dict[str, Any] = {"samples": 6, "held_out_samples": 6, "block_length": 64}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("held-out") / "text.txt"
    file.write_text(" ".join(SENTENCES[::-1] * 20), "utf-8")
    return file


@pytest.fixture(scope="module")
def swept(
    model: Path, teacher: Path, chats: Path, held_out: Path, tmp_path_factory: Any
) -> SweepReport:
    target = tmp_path_factory.mktemp("sweep") / "all"
    return quantize.sweep(model, target, texts=chats, held_out=held_out, teacher=teacher, **SMALL)


def weights(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))


def test_every_command_makes_the_folder_that_was_measured(
    swept: SweepReport, tmp_path: Path
) -> None:
    assert {row.name for row in swept.rows} == {
        "rounding-row", "rounding-64", "rounding-8bit", "nf4",
        "gptq-row", "gptq-64", "gptq-32", "gptq-8bit", "gptq-64-tuned", "mixed", "mixed-tuned",
    }  # fmt: skip
    for row in swept.rows:
        program, *words = shlex.split(row.command)
        assert program == "mistill"
        words[words.index(str(swept.folder / row.name))] = str(tmp_path / row.name)
        assert main(words) == 0
        assert weights(tmp_path / row.name) == weights(swept.folder / row.name)
        size = sum(file.stat().st_size for file in (tmp_path / row.name).glob("*.safetensors"))
        assert row.weight_bytes == size


def test_figures_are_those_of_the_whole_models(
    swept: SweepReport, model: Path, teacher: Path, held_out: Path
) -> None:
    """Against the folders loaded as a whole, by transformers."""
    drawing = GptqSettings(samples=6, block_length=64)
    blocks = draw_blocks(held_out, model, drawing)
    references = {
        name: predict(load_pytorch(folder), blocks)
        for name, folder in (("source", model), ("teacher", teacher))
    }
    for row in swept.rows:
        loaded = {"it": predict(load_pytorch(swept.folder / row.name), blocks)}
        found = compare(references, loaded, blocks)["it"]
        # The same float32 arithmetic in another order; 8 bits leave KL of 1e-4.
        assert row.kl == pytest.approx(found["source"].kl, rel=1e-3)
        assert row.teacher_kl == pytest.approx(found["teacher"].kl, rel=1e-3)
        assert row.perplexity == pytest.approx(found["source"].perplexity, rel=1e-4)
        assert row.kl_standard_error == pytest.approx(found["source"].kl_standard_error, rel=1e-2)
    assert swept.source_perplexity == pytest.approx(found["source"].reference_perplexity, rel=1e-5)
    assert swept.tokens == int(blocks.kept.sum())
    assert {"rounding-128", "gptq-128"} == swept.skipped.keys()


def test_a_tuned_variant_brings_the_one_that_it_is_made_of(
    swept: SweepReport, model: Path, chats: Path, held_out: Path, tmp_path: Path
) -> None:
    rows = {row.name: row for row in swept.rows}
    for name in ("gptq-64", "mixed"):
        tuned = read_lineage(swept.folder / f"{name}-tuned")
        assert [step["step"] for step in tuned][-1] == "tune"
        assert tuned[:-1] == read_lineage(swept.folder / name)
        assert tuned[-1]["teacher"] == "teacher"
        assert rows[f"{name}-tuned"].weight_bytes == rows[name].weight_bytes
        assert rows[f"{name}-tuned"].teacher_kl != rows[name].teacher_kl
    few = {**SMALL, "variants": ("gptq-64-tuned",)}
    report = quantize.sweep(model, tmp_path / "few", texts=chats, held_out=held_out, **few)
    assert {row.name for row in report.rows} | report.skipped.keys() == {"gptq-64", "gptq-64-tuned"}
    # The text has to fill a block to learn from and one to judge on.
    little = tmp_path / "little.txt"
    little.write_text(" ".join(SENTENCES), "utf-8")
    report = quantize.sweep(
        model, tmp_path / "little", texts=little, held_out=held_out,
        **{**few, "block_length": 256},
    )  # fmt: skip
    assert [row.name for row in report.rows] == ["gptq-64"]
    assert "fill no block" in report.skipped["gptq-64-tuned"]


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    model: Path, chats: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {**SMALL, "variants": ("rounding-64", "rounding-8bit", "nf4")}
    made: list[str] = []
    target = tmp_path / "some"

    def count(name: str, broken: bool = False) -> Any:
        from quantize.sweeping import sweeping

        step = getattr(sweeping, name)

        def counted(*arguments: Any, **options: Any) -> Path:
            if broken:
                raise KeyboardInterrupt
            made.append(name)
            return Path(step(*arguments, **options))

        return counted

    with monkeypatch.context() as patch:
        patch.setattr("quantize.sweeping.sweeping.to_rounding", count("to_rounding"))
        patch.setattr("quantize.sweeping.sweeping.to_nf4", count("to_nf4", broken=True))
        with pytest.raises(KeyboardInterrupt):
            quantize.sweep(model, target, texts=chats, held_out=held_out, **some)
        assert made.count("to_rounding") == 2
        before = len(made)
    monkeypatch.setattr("quantize.sweeping.sweeping.to_rounding", count("to_rounding"))
    report = quantize.sweep(model, target, texts=chats, held_out=held_out, **some)
    assert len(made) == before
    assert {row.name for row in report.rows} == {"rounding-64", "rounding-8bit", "nf4"}
    stored = json.loads((target / "sweep.json").read_text("utf-8"))
    assert stored["report"] == json.loads(json.dumps(report.to_dict()))
    with pytest.raises(TargetExistsError, match="another sweep"):
        quantize.sweep(model, target, texts=chats, held_out=held_out, **{**some, "seed": 5})
    # A variant that somebody removed is made again, whatever is remembered of it.
    shutil.rmtree(target / "rounding-64")
    quantize.sweep(model, target, texts=chats, held_out=held_out, **some)
    assert len(made) == before + 1
    assert (target / "rounding-64" / "model.safetensors").is_file()


def row(name: str, weight_bytes: int, kl: float) -> SweepRow:
    return SweepRow(
        name=name, command="", weight_bytes=weight_bytes, bits_per_weight=1.0, kl=kl,
        kl_standard_error=None, kl_p99=kl, agreement=1.0, perplexity=1.0,
    )  # fmt: skip


def test_what_is_larger_and_no_better_is_marked() -> None:
    rows = [row("a", 10, 0.5), row("b", 10, 0.4), row("c", 20, 0.4), row("d", 30, 0.1)]
    beaten = {one.name: one.dominated_by for one in mark_dominated(rows)}
    assert beaten == {"a": "b", "b": None, "c": "b", "d": None}
    twins = [row("a", 10, 0.5), row("b", 10, 0.5)]
    assert [one.dominated_by for one in mark_dominated(twins)] == [None, None]


def test_the_command_prints_a_table_and_one_document(
    model: Path,
    chats: Path,
    held_out: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["quantize", str(model), str(tmp_path / "all"), "--texts", str(chats)]
    few = ["--variants", "rounding-64", "--variants", "nf4", "--samples", "2"]
    few += ["--held-out-samples", "2", "--block-length", "64"]
    assert main([*words, "--sweep", "--held-out", str(held_out), *few, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert [one["name"] for one in found["rows"]] == ["rounding-64", "nf4"]
    assert any("KL to source" in line for line in lines)
    assert any(line.startswith("rounding-64: mistill quantize rounding") for line in lines)

    assert main([*words, "--sweep"]) == 2
    assert "give --held-out" in capsys.readouterr().err
    assert main([*words, *few]) == 2
    assert "--variants is for a sweep" in capsys.readouterr().err


def test_without_a_sweep_it_is_gptq_with_its_defaults(
    model: Path, chats: Path, tmp_path: Path
) -> None:
    source = tiny_model(
        tmp_path / "wide", hidden_size=128, intermediate_size=256, num_attention_heads=4
    )
    few = ["--samples", "2", "--block-length", "64"]
    words = [str(source), str(tmp_path / "plain"), "--texts", str(chats), *few]
    assert main(["quantize", *words]) == 0
    made = quantize.to_gptq(source, tmp_path / "same", texts=chats, samples=2, block_length=64)
    assert weights(tmp_path / "plain") == weights(made)


def test_what_cannot_be_swept_is_refused(
    model: Path, chats: Path, held_out: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"a variant is one of .*got 'gptq-7'"):
        quantize.SweepSettings(variants=("gptq-7",))
    few = {**SMALL, "variants": ("rounding-128",)}
    with pytest.raises(SettingsError, match="no variant fits"):
        quantize.sweep(model, tmp_path / "none", texts=chats, held_out=held_out, **few)
    assert not (tmp_path / "none").exists()
    other = tiny_model(tmp_path / "other", vocab_size=400)
    with pytest.raises(VocabularyError, match=r"different vocabularies: 384 rows against 400"):
        quantize.sweep(
            model, tmp_path / "two", texts=chats, held_out=held_out, teacher=other, **SMALL
        )
    (tmp_path / "mine").mkdir()
    with pytest.raises(TargetExistsError, match="holds no sweep"):
        quantize.sweep(model, tmp_path / "mine", texts=chats, held_out=held_out, **SMALL)
    (tmp_path / "mine" / "thesis.txt").write_text("Of winds", "utf-8")
    with pytest.raises(TargetExistsError, match="holds no sweep; choose another name"):
        quantize.sweep(
            model, tmp_path / "mine", texts=chats, held_out=held_out, overwrite=True, **SMALL
        )
    assert (tmp_path / "mine" / "thesis.txt").read_text("utf-8") == "Of winds"


def test_what_others_put_into_a_sweep_is_not_removed(
    model: Path, chats: Path, held_out: Path, tmp_path: Path
) -> None:
    few = {**SMALL, "variants": ("rounding-64",)}
    quantize.sweep(model, tmp_path / "sweep", texts=chats, held_out=held_out, **few)
    (tmp_path / "sweep" / "rounding-64" / "thesis.txt").write_text("Of winds", "utf-8")
    with pytest.raises(FolderError, match="holds rounding-64, which no step of mistill wrote"):
        quantize.sweep(
            model, tmp_path / "sweep", texts=held_out, held_out=chats, overwrite=True, **few
        )
    assert (tmp_path / "sweep" / "rounding-64" / "thesis.txt").is_file()
    (tmp_path / "sweep" / "rounding-64" / "thesis.txt").unlink()
    quantize.sweep(model, tmp_path / "sweep", texts=held_out, held_out=chats, overwrite=True, **few)


@pytest.mark.parametrize(
    "change",
    [
        {"kl": "much"},
        {"kl": None},
        {"weight_bytes": 1.5},
        {"name": "../elsewhere"},
        {"kl": float("nan")},
    ],
)
def test_results_that_someone_changed_are_refused(
    change: dict[str, object], model: Path, chats: Path, held_out: Path, tmp_path: Path
) -> None:
    few = {**SMALL, "variants": ("rounding-64",)}
    quantize.sweep(model, tmp_path / "sweep", texts=chats, held_out=held_out, **few)
    file = tmp_path / "sweep" / "sweep.json"
    state = json.loads(file.read_text())
    state["rows"]["rounding-64"].update(change)
    file.write_text(json.dumps(state))
    with pytest.raises(FolderError, match=r"sweep.json"):
        quantize.sweep(model, tmp_path / "sweep", texts=chats, held_out=held_out, **few)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_folders_with_quantized_tables_are_measured_layer_by_layer(
    tied: bool, chats: Path, tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "model", tie_word_embeddings=tied, model_type="llama")
    made = quantize.to_rounding(
        source, tmp_path / "small", group_size=32, head_bits=8, embedding_bits=8
    )
    blocks = draw_blocks(chats, source, GptqSettings(samples=4, block_length=64))
    whole = compare(
        {"source": predict(load_pytorch(source), blocks)},
        {"small": predict(load_pytorch(made), blocks)},
        blocks,
    )["small"]["source"]
    streamed = measure(made, {"source": predictions(source, blocks)}, blocks)["source"]
    assert streamed.kl == pytest.approx(whole.kl, rel=1e-3)
    assert streamed.agreement == whole.agreement
