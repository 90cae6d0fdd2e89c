"""The model card of a folder: what it says, and that nobody's own is replaced."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import export
import quantize
from mistill.errors import FolderError
from mistill.folders.folder import open_folder
from mistill.folders.lineage import add_lineage, fingerprint, read_lineage
from mistill.folders.model_card import BaseModel, add_card, base_model, relation
from mistill.folders.ownership import is_own_card, why_not_ours
from mistill.sources.source import save_model


@pytest.fixture(scope="module")
def chatbot(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX folder of a distilled student of a model of the Hub; read only."""
    folder = tmp_path_factory.mktemp("card")
    source = Path(shutil.copytree(model, folder / "student"))
    steps = [
        {"step": "teacher", "settings": {"source": "owner/large-7b"}, "changed_settings": []},
        {
            "step": "distill",
            "settings": {"tokens": 5000, "batch_size": 4},
            "changed_settings": ["tokens"],
            "teacher": "teacher",
            "tokens": 5120,
            "before": {"kl": 1.25},
            "after": {"kl": 0.5},
            "texts": ["chats.jsonl"],
        },
    ]
    (source / "lineage.json").write_text(json.dumps(steps))
    return export.to_onnx(source, folder / "bot")


def test_the_card_says_what_was_made_of_what_and_what_was_measured(chatbot: Path) -> None:
    text = (chatbot / "README.md").read_text("utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == ["owner/large-7b"]
    assert metadata["base_model_relation"] == "finetune"
    assert {"onnx", "distill"} <= set(metadata["tags"])
    assert "license" not in metadata
    assert "licence is that of owner/large-7b" in text
    assert "| distill | tokens `5000`, texts `chats.jsonl` |" in text
    assert "| distill | KL to the teacher, nats | 1.2500 | 0.5000 |" in text
    parity = json.loads((chatbot / "manifest.json").read_text())["parity"]
    assert f"a KL of {parity['mean_kl']:.4f} nats" in text
    assert 'mistill chat bot "What' in text
    assert str(chatbot.parent) not in text
    assert re.search(r"2 layers of width 64|layers of width \d+", text)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("supervised", "finetune"),
        ("heal", "finetune"),
        ("tune", "quantized"),
        ("gptq", "quantized"),
        ("teacher", None),
    ],
)
def test_only_what_learnt_is_called_a_finetune(step: str, expected: str | None) -> None:
    steps = [
        {"step": "teacher", "settings": {"source": "@smollm2"}},
        {"step": step, "settings": {}},
    ]
    assert relation(steps) == expected


def test_the_embedded_teacher_is_known_with_its_licence() -> None:
    steps = [{"step": "teacher", "settings": {"source": "@smollm2"}}]
    assert base_model(steps) == BaseModel(
        name="HuggingFaceTB/SmolLM2-135M-Instruct", licence="apache-2.0", language="en"
    )
    assert base_model([{"step": "teacher", "settings": {"source": "folder"}}]) == BaseModel()


def test_what_was_made_of_a_model_of_the_hub_at_once_names_it(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "hub" / "models--owner--large--7b" / "snapshots" / ("0" * 40)
    small = quantize.to_rounding(shutil.copytree(model, kept), tmp_path / "small", group_size=32)
    (step,) = read_lineage(small)
    assert (step["hub"], step["source"]) == ("owner/large--7b", "large--7b")
    metadata = yaml.safe_load((small / "README.md").read_text("utf-8").split("---")[1])
    assert metadata["base_model"] == ["owner/large--7b"]
    assert metadata["base_model_relation"] == "quantized"


def test_a_path_is_not_taken_for_a_model_of_the_hub(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "models" / "large")
    monkeypatch.chdir(tmp_path)
    teacher = save_model("models/large", "teacher")
    assert base_model(read_lineage(teacher)) == BaseModel()
    assert "models/large" not in (teacher / "README.md").read_text("utf-8")


def test_every_model_folder_has_a_card_that_names_what_reads_it(
    model: Path, tmp_path: Path
) -> None:
    small = quantize.to_rounding(model, tmp_path / "small", group_size=32)
    text = (small / "README.md").read_text("utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert "# small\n" in text
    assert "mistill export small chatbot" in text
    assert "transformers and gptqmodel read it" in text
    assert "| rounding | group_size `32` |" in text
    assert why_not_ours(small) is None
    quantize.to_rounding(model, small, group_size=64, overwrite=True)
    assert "group_size `64`" in (small / "README.md").read_text("utf-8")


def test_a_card_that_was_changed_is_kept_and_changes_nothing_else(
    chatbot: Path, model: Path, tmp_path: Path
) -> None:
    bot = Path(shutil.copytree(chatbot, tmp_path / "bot"))
    before = fingerprint(bot)
    export.to_onnx(model, bot, overwrite=True, parity_positions=0)
    card = bot / "README.md"
    card.write_text(card.read_text() + "My words.\n")
    open_folder(bot)
    with pytest.raises(FolderError, match=r"README\.md, which is not as mistill wrote"):
        export.to_onnx(model, bot, overwrite=True, parity_positions=0)
    assert "My words." in card.read_text()
    (Path(shutil.copytree(chatbot, tmp_path / "other")) / "README.md").write_text("mine")
    assert fingerprint(tmp_path / "other") == before


def test_settings_cannot_break_the_table(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    add_lineage(source, step="student", settings={"how": "a | b\nc"}, source=None)
    text = (export.to_onnx(source, tmp_path / "b", parity_positions=0) / "README.md").read_text()
    assert "| student | how `a / b c` |" in text


def test_what_a_stranger_recorded_is_neither_markup_nor_a_reason_to_fail(
    model: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    hostile = "`x` | <script>y</script>\n\n# Title \x1b[31m"
    steps: list[dict[str, Any]] = [
        {"step": "teacher"},
        {"step": "gptq", "settings": None, "changed_settings": ["bits"]},
        {
            "step": hostile,
            "settings": {hostile: hostile, "long": "y" * 10_000},
            "changed_settings": [hostile, "long"],
            "versions": {hostile: hostile},
            "date": "|\n<b>",
            "texts": {"a": hostile},
            "before": {"kl": 10**400, "perplexity": 5.0},
            "after": {"kl": 1, "perplexity": 4.0},
        },
    ]
    (source / "lineage.json").write_text(json.dumps(steps))
    name = "my <b>bot $(id) it's"
    text = (quantize.to_rounding(source, tmp_path / name, group_size=32) / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["tags"][0] == "mistill"
    without_code = re.sub(r"```.*?```|`[^`\n]*`", "", text.replace(r"\`", ""), flags=re.DOTALL)
    assert "<" not in without_code.partition("<!-- Written by mistill")[0]
    assert "\x1b" not in text
    assert len(text) < 5000
    table = text.split("## How it was made\n\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(steps) + 1
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in table)
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        "# my &lt;b>bot $(id) it's"
    ]
    assert f"mistill export {shlex.quote(name)} chatbot\n" in text
    assert "| perplexity | 5.00 | 4.00 |" in text
    assert "KL to the teacher" not in text


def test_a_kill_while_a_card_is_written_leaves_no_half_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = quantize.to_rounding(model, tmp_path / "small", group_size=32)
    (small / "README.md").unlink()
    write_text = Path.write_text

    def half(file: Path, text: str, *arguments: Any, **options: Any) -> int:
        write_text(file, text[: len(text) // 2], *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            add_card(small, "small")
    add_card(small, "small")
    assert is_own_card(small / "README.md")
    assert why_not_ours(small) is None


def test_a_model_without_a_chat_template_is_not_said_to_chat(model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    (source / "chat_template.jinja").unlink()
    small = quantize.to_rounding(source, tmp_path / "small", group_size=32)
    bot = export.to_onnx(small, tmp_path / "bot", parity_positions=0)
    for folder in (small, bot):
        text = (folder / "README.md").read_text("utf-8")
        assert "It has no chat template, and continues texts" in text
        assert "mistill chat" not in text


def test_a_folder_for_the_browser_names_the_library_that_opens_it(
    model: Path, tmp_path: Path
) -> None:
    folder = export.to_onnx(model, tmp_path / "web", layout="transformersjs", parity_positions=0)
    text = (folder / "README.md").read_text("utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["library_name"] == "transformers.js"
    assert "pipeline('text-generation', 'web')" in text
    assert f"layers of width {open_folder(model).hidden_size}" in text
