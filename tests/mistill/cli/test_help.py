"""What ``--help`` says of each command."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from mistill.cli.app import app, main
from mistill.cli.help_pages import option_name


def commands(part: Any = app, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name in part:
        if not name.startswith("-"):
            yield from commands(part[name], (*path, name))
    if part.default_command:
        yield " ".join(path), part


COMMANDS = dict(commands())
in_each_command = pytest.mark.parametrize("command", COMMANDS)


def arguments(command: str) -> list[Any]:
    return list(COMMANDS[command].assemble_argument_collection(parse_docstring=True))


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
