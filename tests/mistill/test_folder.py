"""Folders appear whole or not at all, and say what they hold and what is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mistill.errors import FolderError, TargetExistsError
from mistill.folder import copy_companions, open_folder, problems
from mistill.lineage import add_lineage, fingerprint, read_lineage
from mistill.publishing import creating, publish, working


def hidden(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.name.startswith("."))


def run_until_ready_then_kill(code: str, ready: Path) -> None:
    """Start Python on ``code``, wait until it makes the file ``ready``, and kill it."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    deadline = time.monotonic() + 30
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
    (target / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), creating(target, overwrite=True):
        raise RuntimeError
    assert (target / "old.txt").read_text() == "old"
    with creating(target, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
        assert (target / "old.txt").exists()
    assert [file.name for file in target.iterdir()] == ["new.txt"]
    assert hidden(tmp_path) == []


def test_a_target_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="is a file"), creating(tmp_path / "file" / "target"):
        pytest.fail("the body ran")


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(TargetExistsError, match="appeared"), creating(target) as partial:
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
        from mistill.folder import creating
        with creating({str(target)!r}) as partial:
            (partial / "half.txt").write_text("half")
            Path({str(tmp_path / "ready")!r}).touch()
            time.sleep(60)
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
    with pytest.raises(RuntimeError), creating(tmp_path / "target"):
        raise RuntimeError
    assert (tmp_path / "target" / "old.txt").read_text() == "old"


def test_a_full_disk_is_one_clear_line_and_nothing_is_left(tmp_path):
    code = f"""
    import resource
    from mistill.errors import FolderError
    from mistill.folder import creating
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
    with working(tmp_path / "target", {"seed": 2}) as work:
        assert not (work / "state").exists()


def test_two_processes_do_not_work_on_one_target(tmp_path):
    with (
        working(tmp_path / "target", {}),
        pytest.raises(FolderError, match="another process"),
        working(tmp_path / "target", {}),
    ):
        pytest.fail("both got in")


def test_a_model_folder_is_described_without_loading_it(teacher):
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    info = open_folder(teacher)
    assert info.form == "model"
    assert info.architecture == "mistral"
    assert info.layers == 4
    assert info.parameters == loaded.num_parameters()
    assert info.weight_bytes == (teacher / "model.safetensors").stat().st_size
    assert info.size_bytes == sum(file.stat().st_size for file in teacher.iterdir())
    assert info.context_length == 512
    assert 32 < info.bits_per_weight < 33


def test_everything_that_is_missing_is_listed_at_once(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": 3}))
    assert problems(tmp_path) == [
        "config.json lacks num_hidden_layers, hidden_size, max_position_embeddings",
        "tokenizer.json is missing",
        "model.safetensors is missing",
    ]
    with pytest.raises(FolderError, match=r"lacks .*; tokenizer.json is missing; model.safet"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "JSON object"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "is cut short"),
        (lambda folder: os.truncate(folder / "model.safetensors", 100), "not a safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a safetensors file"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "safetensors only",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-00001.safetensors"}})
            ),
            "model-00001.safetensors is missing",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            "index.json is damaged",
        ),
    ],
)
def test_damage_is_named(model, tmp_path, damage, words):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(FolderError, match=words):
        open_folder(folder)


def test_a_way_of_quantizing_that_is_not_known_is_named(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match="'awq'; mistill reads float, GPTQ and NF4"):
        open_folder(folder)


def test_lineage_carries_on_from_the_source(model, tmp_path):
    with creating(tmp_path / "one") as partial:
        add_lineage(partial, step="first", settings={"a": 1}, source=None)
    with creating(tmp_path / "two") as partial:
        add_lineage(partial, step="second", settings={}, source=tmp_path / "one", kl=0.5)
    first, second = read_lineage(tmp_path / "two")
    assert first["step"] == "first"
    assert first["settings"] == {"a": 1}
    assert second["source_fingerprint"] == fingerprint(tmp_path / "one")
    assert second["kl"] == 0.5
    assert second["versions"]["numpy"]


def test_a_damaged_lineage_is_named(tmp_path):
    (tmp_path / "lineage.json").write_text("{}")
    with pytest.raises(FolderError, match="list of steps"):
        read_lineage(tmp_path)


def test_the_fingerprint_follows_content_and_not_date_or_place(model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert fingerprint(copy) == fingerprint(model)
    (copy / "lineage.json").write_text("[]")
    assert fingerprint(copy) == fingerprint(model)
    (copy / "chat_template.jinja").write_text("other")
    assert fingerprint(copy) != fingerprint(model)


def test_the_fingerprint_of_a_large_file_sees_its_ends(tmp_path):
    content = bytearray(os.urandom(3 << 20))
    (tmp_path / "large").write_bytes(content)
    before = fingerprint(tmp_path / "large")
    content[-1] ^= 1
    (tmp_path / "large").write_bytes(content)
    assert fingerprint(tmp_path / "large") != before


def test_companions_are_copied_and_weights_are_not(model, tmp_path):
    copy_companions(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"hidden_size": "wide"},
            "hidden_size in config.json should be a whole number, not 'wide'",
        ),
        ({"vocab_size": None}, "vocab_size in config.json should be a whole number, not None"),
        ({"quantization_config": "gptq"}, "quantization_config .* should be an object"),
    ],
)
def test_a_config_with_values_of_the_wrong_kind_is_refused(model, tmp_path, changes, words):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(FolderError, match=words):
        open_folder(folder)
