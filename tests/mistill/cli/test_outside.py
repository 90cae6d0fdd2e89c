"""What the system refuses is one line that names the file, in every command."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cyclopts import completion
from cyclopts.completion import detect

import mistill
from mistill.cli import app as command_line
from mistill.cli.app import main
from mistill.cli.outside import OUR_PACKAGES, with_counts, without_verbose


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            PermissionError(errno.EACCES, "x", "folder/config.json"),
            "folder/config.json: Permission",
        ),
        (OSError(errno.ENAMETOOLONG, "x", "a" * 5000), "aaa: File name too long"),
        (IsADirectoryError(errno.EISDIR, "x", "folder"), "folder: Is a directory"),
        (OSError(errno.ENOSPC, "x", "out"), "no room to write out"),
        (OSError(errno.EIO, "x"), "a file: Input/output error"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"), "not enough memory"),
    ],
)
def test_an_error_of_the_system_is_one_line(monkeypatch, capsys, error, words):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "app", fail)
    assert main(["inspect", "x"]) == 2
    line = capsys.readouterr().err
    assert words in line
    assert len(line.splitlines()) == 1


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(command_line, "app", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_may_not_be_read_is_named(model, tmp_path, capsys, name):
    folder = Path(shutil.copytree(model, tmp_path / "folder"))
    (folder / name).chmod(0)
    assert main(["inspect", str(folder)]) in (1, 2)
    out, err = capsys.readouterr()
    assert name in out + err
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "lineage.json"])
def test_a_folder_in_the_place_of_a_file_is_named(model, tmp_path, capsys, name):
    folder = Path(shutil.copytree(model, tmp_path / "folder"))
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    assert main(["inspect", str(folder)]) in (0, 1)
    assert main(["export", str(folder), str(tmp_path / "out")]) in (0, 2)
    assert len(capsys.readouterr().err.splitlines()) <= 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes")
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(model, tmp_path, capsys, name):
    folder = Path(shutil.copytree(model, tmp_path / "folder"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    main(["inspect", str(folder)])
    assert main(
        ["quantize", "rounding", str(folder), str(tmp_path / "out"), "--group-size", "32"]
    ) in (0, 2)
    assert len(capsys.readouterr().err.splitlines()) <= 1


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_what_a_command_has_begun_is_cleared_up_when_it_is_ended(model, tmp_path):
    program = (
        "import sys, time\n"
        "from mistill.cli import app\n"
        "from mistill.folders.publishing import creating\n"
        "def slow(*_, **__):\n"
        f"    with creating({str(tmp_path / 'target')!r}) as partial:\n"
        "        (partial / 'half').touch()\n"
        "        time.sleep(60)\n"
        "app.app = slow\n"
        "sys.exit(app.main([]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if list(tmp_path.glob(".target.*/half")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "number"),
    [("20M", "20000000"), ("1e6", "1000000"), ("1.5k", "1500"), ("2B", "2000000000"), ("7", "7")],
)
def test_counts_of_tokens_may_have_units(text, number):
    assert with_counts(["distill", "--tokens", text, "x"]) == ["distill", "--tokens", number, "x"]
    assert with_counts([f"--held-out-tokens={text}"]) == [f"--held-out-tokens={number}"]


@pytest.mark.parametrize("text", ["1.5", "20T", "M", "-3k", "0x10", "1e400", "1.0000001k", ""])
def test_what_is_no_count_stays_for_its_option_to_refuse(text):
    assert with_counts(["--tokens", text]) == ["--tokens", text]
    assert with_counts(["--texts", "20M", "--tokens"]) == ["--texts", "20M", "--tokens"]


def test_a_misspelt_method_is_named_and_not_taken_for_a_model(tmp_path, monkeypatch, capsys):
    assert main(["quantize", "gtpq", "model", "out"]) == 2
    assert capsys.readouterr().err == "mistill: there is no method gtpq; did you mean gptq?\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gtpq").mkdir()
    assert main(["quantize", "gtpq", "out", "--texts", "@demo-train"]) == 2
    assert "no method" not in capsys.readouterr().err


def test_the_version_has_a_short_option(capsys):
    assert main(["-V"]) == 0
    assert capsys.readouterr().out.strip() == mistill.__version__


def test_an_interrupted_command_says_that_its_work_resumes(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mistill.cli.inspection.inspect_folder", interrupt)
    assert main(["inspect", "somewhere"]) == 130
    assert "interrupted; the same command resumes the work" in capsys.readouterr().err


def test_verbose_is_taken_out_wherever_it_stands_but_not_out_of_values() -> None:
    assert without_verbose(["-v", "chat", "bot"]) == (["chat", "bot"], True)
    assert without_verbose(["chat", "bot", "--verbose"]) == (["chat", "bot"], True)
    for words in (["chat", "bot", "-p", "-v"], ["chat", "bot", "--", "-v"], ["chat", "bot"]):
        assert without_verbose(words) == (words, False)


def test_a_verbose_command_tells_its_settings_and_its_time(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in OUR_PACKAGES:
        caplog.set_level(logging.WARNING, name)
    caplog.handler.setLevel(logging.NOTSET)
    assert (
        main(["quantize", "rounding", str(model), str(tmp_path / "quiet"), "--group-size", "32"])
        == 0
    )
    assert "took" not in caplog.text
    assert (
        main(
            ["quantize", "rounding", str(model), str(tmp_path / "told"), "--group-size", "32", "-v"]
        )
        == 0
    )
    assert "RoundingSettings: bits 4" in caplog.text
    assert re.search(r"took \d+\.\d s", caplog.text)
    assert f"next: mistill export {tmp_path / 'told'} CHATBOT" in caplog.text


def test_completion_is_installed_for_a_known_shell(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (detect, completion):
        monkeypatch.setattr(module, "detect_shell", lambda: "bash")
    assert main(["--install-completion"]) == 0
    script = empty_home / ".local/share/bash-completion/completions/mistill"
    assert "quantize" in script.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distill", "a", "b", "--texts", "x", "--lr", "3"], "--lr. Here it is --learning-rate."),
        (
            ["quantize", "gptq", "a", "b", "--texts", "x", "--wbits=4"],
            "--wbits. Here it is --bits.",
        ),
        (["export", "a", "b", "--prec", "int4"], "--prec. Did you mean --precision?"),
        (["inspect", "a", "--lr", "3"], "Unknown option: --lr."),
        # What is missing may be what was misspelt.
        (["distill", "a", "b", "--lr", "3"], "Unknown option: --lr. Here it is --learning-rate."),
        (["distill", "a", "b", "--text", "t"], "Unknown option: --text. Did you mean --texts?"),
        (["distill", "a", "b", "--teacher", "t"], "--texts requires an argument."),
    ],
)
def test_an_option_of_another_tool_is_named_with_ours(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(said)
