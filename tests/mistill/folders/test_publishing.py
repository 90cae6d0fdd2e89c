"""Outputs appear whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from mistill.errors import FolderError, SettingsError, TargetExistsError
from mistill.folders import publishing, renaming
from mistill.folders.locking import held_alone, temporary_folder
from mistill.folders.publishing import (
    creating,
    creating_file,
    publish,
    refuse_existing,
    replacing,
    scratch_beside,
    working,
    write_atomically,
)


def hidden(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.name.startswith("."))


def run_until_ready_then_kill(code: str, ready: Path) -> None:
    """Start Python on ``code``, wait until it makes the file ``ready``, and kill it."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    deadline = time.monotonic() + 300
    while not ready.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_folder_appears_only_when_it_is_finished(tmp_path):
    target = tmp_path / "deep" / "target"
    with creating(target) as partial:
        (partial / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    assert hidden(target.parent) == []


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), creating(tmp_path / "target") as partial:
        (partial / "a.txt").write_text("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_before_any_work(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(TargetExistsError, match="exists already"), creating(tmp_path / "target"):
        pytest.fail("the body ran")


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "lineage.json").write_text("old")
    with pytest.raises(RuntimeError), creating(target, overwrite=True):
        raise RuntimeError
    assert (target / "lineage.json").read_text() == "old"
    with creating(target, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
        assert (target / "lineage.json").exists()
    assert [file.name for file in target.iterdir()] == ["config.json"]
    assert hidden(tmp_path) == []


def test_a_target_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="is a file"), creating(tmp_path / "file" / "target"):
        pytest.fail("the body ran")


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "target"
    with (
        pytest.raises(TargetExistsError, match="made by another process"),
        creating(target) as partial,
    ):
        (partial / "ours.txt").write_text("ours")
        target.mkdir()
        (target / "theirs.txt").write_text("theirs")
    assert [file.name for file in target.iterdir()] == ["theirs.txt"]


def test_a_killed_process_leaves_no_target_and_the_next_one_clears_up(tmp_path):
    target = tmp_path / "target"
    run_until_ready_then_kill(
        f"""
        import time
        from pathlib import Path
        from mistill.folders.publishing import creating
        with creating({str(target)!r}) as partial:
            (partial / "half.txt").write_text("half")
            Path({str(tmp_path / "ready")!r}).touch()
            time.sleep(600)
        """,
        tmp_path / "ready",
    )
    assert not target.exists()
    assert len(hidden(tmp_path)) == 1
    with creating(target) as partial:
        (partial / "whole.txt").write_text("whole")
    assert [file.name for file in target.iterdir()] == ["whole.txt"]
    assert hidden(tmp_path) == []


def test_a_folder_set_aside_by_a_killed_process_is_put_back(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    aside = tmp_path / f".target.{process.pid}.replaced"
    aside.mkdir()
    (aside / "old.txt").write_text("old")
    with pytest.raises(TargetExistsError), creating(tmp_path / "target"):
        pytest.fail("the target exists again")
    assert (tmp_path / "target" / "old.txt").read_text() == "old"


def test_a_full_disk_is_one_clear_line_and_nothing_is_left(tmp_path):
    code = f"""
    import resource
    from mistill.errors import FolderError
    from mistill.folders.publishing import creating
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        with creating({str(tmp_path / "target")!r}) as partial:
            (partial / "big").write_bytes(bytes(2000))
    except FolderError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "no room to write" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_working_folders_outlive_an_interruption_and_go_when_published(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(RuntimeError), working(target, {"seed": 1}) as work:
        (work / "state").write_text("half")
        raise RuntimeError
    assert not target.exists()
    with working(target, {"seed": 1}) as work:
        assert (work / "state").read_text() == "half"
        (work / "result").mkdir()
        (work / "result" / "a.txt").write_text("a")
        publish(work, target)
    assert [file.name for file in target.iterdir()] == ["a.txt"]
    assert hidden(tmp_path) == []


def test_a_working_folder_of_other_settings_is_not_reused(tmp_path):
    with working(tmp_path / "target", {"seed": 1}) as work:
        (work / "state").write_text("old")
    with (
        pytest.raises(SettingsError, match="seed has changed"),
        working(tmp_path / "target", {"seed": 2}),
    ):
        pytest.fail("state of other work was used")
    assert (work / "state").read_text() == "old"
    with working(tmp_path / "target", {"seed": 2}, anew=True) as work:
        assert not (work / "state").exists()


def test_a_damaged_note_of_a_working_folder_is_other_work(tmp_path):
    with working(tmp_path / "target", {"seed": 1}) as work:
        (work / "state").write_text("old")
    (work / "key.json").write_text("[")
    with (
        pytest.raises(SettingsError, match="begun with other settings"),
        working(tmp_path / "target", {"seed": 1}),
    ):
        pytest.fail("state of other work was used")


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be synced")
def test_the_folder_that_holds_a_new_name_is_synced_after_the_renaming(tmp_path, monkeypatch):
    events = []
    rename, replace = Path.rename, Path.replace
    for module in (publishing, renaming):
        monkeypatch.setattr(
            module, "sync_folder", lambda folder: events.append(("sync", Path(folder)))
        )
    for name, move in (("rename", rename), ("replace", replace)):

        def noted(self, to, move=move):
            events.append(("rename", Path(to)))
            return move(self, to)

        monkeypatch.setattr(Path, name, noted)
    with creating(tmp_path / "folder") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("text")
    with creating_file(tmp_path / "file") as partial:
        partial.write_text("text")
    write_atomically(tmp_path / "small", "text")
    for name in ("folder", "file", "small"):
        place = events.index(("rename", tmp_path / name))
        assert events[place + 1] == ("sync", tmp_path)
    before = events[: events.index(("rename", tmp_path / "folder"))]
    assert "inner" in {folder.name for kind, folder in before if kind == "sync"}


def test_two_processes_do_not_work_on_one_target(tmp_path):
    with (
        working(tmp_path / "target", {}),
        pytest.raises(FolderError, match="another process"),
        working(tmp_path / "target", {}),
    ):
        pytest.fail("both got in")


def _dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    "message",
    [
        "24576 requested and 15376 written",
        "[enforce fail at inline_container.cc:672] . unexpected pos 4416 vs 4310",
        "basic_ios::clear: iostream error",
        "No space left on device",
    ],
)
def test_a_full_disk_in_the_words_of_a_library_is_a_full_disk(tmp_path, message):
    with pytest.raises(FolderError, match="no room to write"), replacing(tmp_path / "file"):
        raise RuntimeError(message)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_of_a_file_goes_with_the_next_writing(tmp_path):
    left = tmp_path / f".a [1].json.{_dead_process()}.partial"
    left.write_text("half")
    write_atomically(tmp_path / "a [1].json", "whole")
    assert [item.name for item in tmp_path.iterdir()] == ["a [1].json"]


def test_a_scratch_folder_goes_at_the_end_and_with_the_next_step(tmp_path):
    (tmp_path / f".target.{_dead_process()}.scratch").mkdir()
    with scratch_beside(tmp_path / "target") as scratch:
        with creating(tmp_path / "target") as partial:
            (partial / "file").touch()
        assert scratch.is_dir()
    assert [item.name for item in tmp_path.iterdir()] == ["target"]


def test_a_working_folder_whose_result_has_its_name_goes_with_the_next_step(tmp_path):
    with working(tmp_path / "target", {}) as work:
        (work / "result").mkdir()
        (work / "finished").touch()
        (work / "result").rename(tmp_path / "target")  # and killed before it removes the folder
    with pytest.raises(TargetExistsError):
        refuse_existing(tmp_path / "target")
    assert [item.name for item in tmp_path.iterdir()] == ["target"]


def test_a_target_that_another_process_made_meanwhile_is_refused_before_the_work(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(TargetExistsError, match="meantime"), working(tmp_path / "target", {}):
        pytest.fail("the work would be for nothing")
    assert [item.name for item in tmp_path.iterdir()] == ["target"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged on Linux")
def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path, monkeypatch):
    with creating(tmp_path / "target") as partial:
        (partial / "lineage.json").write_text("[]")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("between two renames it is gone"))
    with creating(tmp_path / "target", overwrite=True) as partial:
        (partial / "lineage.json").write_text("[{}]")
    assert (tmp_path / "target" / "lineage.json").read_text() == "[{}]"
    assert [item.name for item in tmp_path.iterdir()] == ["target"]


def test_a_file_is_held_by_one_process_alone(tmp_path):
    with (
        held_alone(tmp_path / "file"),
        pytest.raises(FolderError, match="another process has"),
        held_alone(tmp_path / "file"),
    ):
        pytest.fail("both hold it")
    assert list(tmp_path.iterdir()) == []


def test_temporary_folders_of_killed_processes_go_and_those_in_use_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "mistill-left"
    left.mkdir()
    (left / "lock").touch()
    foreign = tmp_path / "mistill-foreign"
    foreign.mkdir()
    (tmp_path / "precious").write_text("precious")
    (foreign / "lock").symlink_to(tmp_path / "precious")
    with temporary_folder() as first, temporary_folder() as second:
        assert first.is_dir()
        assert second.is_dir()
        assert not left.exists()
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["mistill-foreign", "precious"]
