"""Every command and every program of the guides runs, on tiny models."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

import export
from mistill.cli.app import main
from mistill.cli.help_pages import option_name
from tests.mistill.cli.test_help import COMMANDS, options

DOCS = Path(__file__).parent.parent / "docs"
# In an order in which each finds what it needs.
GUIDES = ("quantizing", "exporting", "chatting", "korean-chatbot")
# Those whose commands are run in tests of their own, or take long, are held to their options here.
PAGES = (*GUIDES, "tuning", "preferences", "distilling", "data", "reports")
README = DOCS.parent / "README.md"


def blocks(guide: str, language: str) -> list[str]:
    text = (DOCS / f"{guide}.md").read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory, model, chats):
    folder = tmp_path_factory.mktemp("guides")
    shutil.copytree(model, folder / "trained")
    export.to_onnx(model, folder / "chatbot-of-the-test", parity_positions=0)
    (folder / "prompts.txt").write_text("What is a mistral?\nCount to three.\n")
    return folder


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_and_program_runs(guide, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    if guide in ("chatting", "korean-chatbot") and not Path("chatbot").exists():
        Path("chatbot-of-the-test").rename("chatbot")
    if guide == "exporting" and not Path("small").exists():
        words = ["quantize", "rounding", "trained", "small", "--group-size", "32"]
        assert main(words) == 0
    for line in "".join(blocks(guide, "sh")).splitlines():
        command, _, file = line.partition(" < ")
        if file:
            monkeypatch.setattr("sys.stdin", io.StringIO(Path(file).read_text()))
        words = shlex.split(command)
        assert words.pop(0) == "mistill"
        if words[0] == "chat" and "--max-new-tokens" not in words:
            words += ["--max-new-tokens", "5"]
        assert main(words) == 0, line
    for program in blocks(guide, "python"):
        exec(compile(program, guide, "exec"), {})
        assert capsys.readouterr().out


@pytest.mark.parametrize("guide", PAGES)
def test_every_option_that_a_guide_names_exists(guide):
    known = {name for command in COMMANDS for name in options(command)}
    text = (DOCS / f"{guide}.md").read_text("utf-8")
    # A table names the program that measured it, with options of its own.
    text = re.sub(r"<!-- table .*?<!-- end -->", "", text, flags=re.DOTALL)
    named = {option_name(name) for name in re.findall(r"--[a-z][a-z0-9-]+", text)}
    assert {name.removeprefix("no_") for name in named} <= known


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), README], ids=lambda page: page.stem)
def test_every_place_that_is_linked_exists(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not link.startswith("http"):
            name, _, place = link.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), link
            assert not place or place in places(file), link


def places(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.strip().lower()).replace(" ", "-") for head in heads}
