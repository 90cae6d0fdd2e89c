"""What is sent to the Hub is looked at first, and nothing is sent unless that is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import export
from mistill.cli import main
from mistill.errors import FolderError, SettingsError
from mistill.sharing import push


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX folder; read only."""
    return export.to_onnx(model, tmp_path_factory.mktemp("push") / "bot", parity_positions=0)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repository: str, **options: Any) -> None:
            calls.append((repository, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr("mistill.sharing.hub_answers", lambda: True)
    return calls


def test_nothing_is_sent_unless_that_is_asked_for(
    made: Path, sent: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(made), "me/bot"]) == 0
    said = capsys.readouterr().out
    assert "model.onnx" in said
    assert "nothing was sent" in said
    assert "names no licence" in said
    assert sent == []
    upload = push(made, "me/bot", send=True, private=False)
    assert upload.files["model.onnx"] == (made / "model.onnx").stat().st_size
    assert sent[0] == ("me/bot", {"private": False, "exist_ok": True})
    assert sent[1][1]["folder_path"] == made.resolve() or sent[1][1]["folder_path"] == made
    assert sent[1][1]["repo_id"] == "me/bot"


def test_what_should_not_leave_the_machine_is_refused(
    made: Path, sent: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="should be owner/name"):
        push(made, "bot", send=True)
    bot = Path(shutil.copytree(made, tmp_path / "bot"))
    lineage = json.loads((bot / "lineage.json").read_text())
    lineage[-1]["texts"] = ["/home/me/secret/chats.jsonl"]
    (bot / "lineage.json").write_text(json.dumps(lineage))
    manifest = json.loads((bot / "manifest.json").read_text())
    del manifest["files"]["lineage.json"]
    (bot / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FolderError, match=r"names the place /home/me/secret/chats\.jsonl"):
        push(bot, "me/bot", send=True)
    model = Path(shutil.copytree(made, tmp_path / "other"))
    (model / "model.onnx.data").unlink()
    with pytest.raises(FolderError, match="not a usable model folder"):
        push(model, "me/bot", send=True)
    assert sent == []


def test_a_folder_with_a_file_of_somebody_else_is_not_sent(
    made: Path, sent: list[Any], tmp_path: Path
) -> None:
    bot = Path(shutil.copytree(made, tmp_path / "bot"))
    (bot / "README.md").write_text("# My own words\n")
    assert "README.md" in push(bot, "me/bot", send=True).files
    (bot / "README.md").write_bytes("---\nlicense: mit\n---\n# Mod\u00e8le\n".encode("latin-1"))
    assert push(bot, "me/bot").remarks == ()
    sent.clear()
    (bot / "secrets.env").write_text("TOKEN=1")
    with pytest.raises(FolderError, match=r"holds secrets\.env, which no step of mistill wrote"):
        push(bot, "me/bot", send=True)
    assert sent == []


def test_a_failed_upload_is_one_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def create_repo(self, *_: Any, **__: Any) -> None:
            raise OSError("no\nroute to host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr("mistill.sharing.hub_answers", lambda: True)
    with pytest.raises(FolderError, match="sent to me/bot: no route to host; the same"):
        push(made, "me/bot", send=True)
