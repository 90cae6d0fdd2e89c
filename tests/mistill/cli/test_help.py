"""What ``--help`` says of each command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from mistill.cli.app import app, main
from mistill.cli.help_pages import option_name
from mistill.cli.options import LISTS


def commands(part: Any = app, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name in part:
        if not name.startswith("-"):
            yield from commands(part[name], (*path, name))
    if part.default_command:
        yield " ".join(path), part


COMMANDS = dict(commands())
in_each_command = pytest.mark.parametrize("command", COMMANDS)


def arguments(command: str) -> list[Any]:
    part = COMMANDS[command]
    return list(part.assemble_argument_collection(default_parameter=LISTS, parse_docstring=True))


def options(command: str) -> set[str]:
    """Options of a command that are shown; a settings class is none, its fields are."""
    return {
        option_name(argument.name)
        for argument in arguments(command)
        if argument.show and argument.index is None
    }


def help_text(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*command.split(), "--help"]) == 0
    return capsys.readouterr().out


@in_each_command
def test_every_option_is_in_one_group(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(command, capsys)
    assert "─ Parameters ─" not in text
    shown = re.findall(r"^│[ *]{1,8}--([a-z0-9-]+)", text, re.MULTILINE)
    assert {option_name(name) for name in shown} >= options(command)
    assert len(shown) == len(set(shown))


@in_each_command
def test_every_argument_and_option_is_described_by_sentences(command):
    for argument in arguments(command):
        if argument.show:
            text = " ".join((argument.parameter.help or "").split())
            assert text.endswith("."), argument.name


def test_the_options_of_a_first_run_come_before_the_others(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text("chat", capsys)
    titles = ["Arguments", "Conversation", "Sampling", "Speed", "Constrained decoding"]
    places = [text.index(f"─ {title} ─") for title in titles]
    assert places == sorted(places)
    text = help_text("quantize gptq", capsys)
    assert text.index("--texts") < text.index("--bits") < text.index("--damp-percent")
    assert text.index("--damp-percent") < text.index("─ Output ─") < text.index("--overwrite")


def test_help_has_no_markup_of_a_docstring_and_no_empty_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    for command in COMMANDS:
        text = help_text(command, capsys)
        assert "``" not in text
        assert "default: (" not in text
        names = {name for name in options(command) if "_" in name} - {"top_k"}  # also a choice
        assert not [name for name in names if name in text]


@in_each_command
def test_options_have_the_forms_that_make_sense_and_no_others(command, capsys):
    text = help_text(command, capsys)
    assert "--no-no-" not in text
    assert "--empty-" not in text
    for argument in arguments(command):
        names = {name for name in argument.names if name.startswith("--")}
        negatives = {name for name in names if name.startswith("--no-")} - {argument.name}
        is_boolean = bool in (argument.hint, *get_args(argument.hint))
        if argument.name.startswith("--no-") or not is_boolean:
            assert not negatives, argument.name
        else:  # both forms, or the one that changes what happens by default
            assert negatives in ({argument.name.replace("--", "--no-", 1)}, set()), argument.name
            assert negatives or argument.field_info.default is False, argument.name


def test_a_server_without_a_key_is_asked_for_in_one_way(tmp_path, capsys):
    assert main(["serve", str(tmp_path), "--no-no-key"]) != 0
    assert "--no-no-key" in capsys.readouterr().err
    assert main(["chat", str(tmp_path), "--empty-stop"]) != 0
    assert "--empty-stop" in capsys.readouterr().err
