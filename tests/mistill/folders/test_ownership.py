"""Only what mistill made is replaced, and never a source, what holds one, or a link."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import distill
import export
import quantize
from mistill import save_model
from mistill.errors import FolderError
from mistill.folders.ownership import why_not_ours
from mistill.folders.publishing import creating_file, refuse_existing
from tests.tiny import tiny_model

STEPS: dict[str, Callable[..., Path]] = {
    "teacher": save_model,
    "export": export.to_onnx,
    "rounding": quantize.to_rounding,
    "nf4": quantize.to_nf4,
    "rotate": quantize.rotate,
    "dequantize": quantize.dequantize,
    "student": distill.new_student,
}


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(item.relative_to(folder)): item.read_bytes() if item.is_file() else None
        for item in folder.rglob("*")
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A source, and folders and links that no step may replace."""
    model = tiny_model(tmp_path / "model")
    shutil.copytree(model, tmp_path / "itself")
    shutil.copytree(model, tmp_path / "box" / "model")
    (tmp_path / "box" / "diary.txt").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "wedding.jpg").write_text("mine")
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("itself", "itself", "its own source"),
        ("box/model", "box", "holds its source"),
        ("model", "photos", "was not made by mistill"),
        ("model", "linked", "is a link to real"),
        ("model", "dangling", "is a link to nowhere"),
    ],
)
def test_what_is_not_ours_to_replace_is_refused_and_stays(
    place: Path, step: str, source: str, target: str, words: str
) -> None:
    before = contents(place)
    with pytest.raises(FolderError, match=words) as raised:
        STEPS[step](place / source, place / target, overwrite=True)
    assert "\n" not in str(raised.value)
    assert contents(place) == before


def test_a_folder_that_a_step_made_is_replaced(place: Path) -> None:
    made = save_model(place / "model", place / "made")
    assert why_not_ours(made) is None
    (made / "config.json").write_text("{}")
    save_model(place / "model", made, overwrite=True)
    assert contents(made)["config.json"] == (place / "model" / "config.json").read_bytes()


def test_a_folder_into_which_a_user_put_something_is_the_users(place: Path) -> None:
    made = save_model(place / "model", place / "made")
    (made / "notes").mkdir()
    with pytest.raises(FolderError, match="holds notes, which no step of mistill wrote"):
        save_model(place / "model", made, overwrite=True)
    (made / "notes").rmdir()
    (made / "diary.json").write_text("{}")
    with pytest.raises(FolderError, match=r"holds diary\.json"):
        save_model(place / "model", made, overwrite=True)


def test_a_link_inside_a_folder_makes_it_the_users(place: Path) -> None:
    made = save_model(place / "model", place / "made")
    (made / "merges.txt").symlink_to(place / "box" / "diary.txt")
    assert why_not_ours(made) == "holds merges.txt, which no step of mistill wrote"


def test_a_source_is_recognised_by_any_of_its_names(place: Path, monkeypatch) -> None:
    (place / "other-name").symlink_to("model")
    with pytest.raises(FolderError, match="its own source"):
        refuse_existing(place / "model", True, [place / "other-name"])
    monkeypatch.chdir(place / "box")
    with pytest.raises(FolderError, match="holds its source model"):
        refuse_existing(".", True, ["model"])


def test_a_file_is_not_written_over_its_source(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("weights")
    with pytest.raises(FolderError, match="its own source"), creating_file(file, True, [file]):
        pytest.fail("the source was opened for writing")
    assert file.read_text() == "weights"
