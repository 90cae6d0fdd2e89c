"""Every command and option is shown: in a page of all of them, and each command in a guide."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.commands_page import page

ROOT = Path(__file__).parent.parent
COMMANDS = json.loads((ROOT / "tests" / "surface.json").read_text("utf-8"))["commands"]
PAGE = ROOT / "docs" / "commands.md"
GUIDES = [ROOT / "README.md", *(file for file in (ROOT / "docs").glob("*.md") if file != PAGE)]


def test_the_page_of_all_commands_is_what_their_help_tells() -> None:
    assert PAGE.read_text("utf-8") == page(), "run python -m tests.commands_page"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_the_page(command: str) -> None:
    sections = re.split(r"^#+ mistill ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    (section,) = (text for text in sections if text.splitlines()[0] == command)
    for option in COMMANDS[command]:
        assert option in section


@pytest.mark.parametrize("command", COMMANDS)
def test_a_guide_shows_every_command(command: str) -> None:
    text = "\n".join(file.read_text("utf-8") for file in GUIDES)
    assert re.search(rf"mistill {re.escape(command)}\b", text), f"show mistill {command} in a guide"
