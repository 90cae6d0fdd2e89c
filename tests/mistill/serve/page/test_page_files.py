"""The page's files: complete, in two languages, with nothing that its strict policy refuses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from mistill.serve.http.page_files import page_files
from tests.mistill.serve.page.scripted_server import PAGE

FILES = sorted(PAGE.iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
SOURCE = "\n".join(file.read_text("utf-8") for file in FILES if file.suffix in (".js", ".html"))
WORDS: dict[str, dict[str, str]] = json.loads((PAGE / "words.json").read_text("utf-8"))
# Names of things, not addresses that anything is fetched from.
NAMESPACES = {"http://www.w3.org/2000/svg"}
# What turns a text into markup or into a program.
SINKS = (
    *("innerHTML", "outerHTML", "insertAdjacentHTML", "srcdoc", "DOMParser", "document.write"),
    *("createContextualFragment", "setHTML", "eval(", "Function(", 'setTimeout("', "import("),
    *("javascript:", "createPolicy", "XMLHttpRequest", "sendBeacon", "WebSocket"),
)


class _Tags(HTMLParser):
    """The start tags of a document, and the texts inside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inside.append(data)


@pytest.fixture(scope="module")
def document() -> _Tags:
    tags = _Tags()
    tags.feed((PAGE / "index.html").read_text("utf-8"))
    return tags


def test_every_file_is_served_and_every_address_in_the_files_leads_to_one(document):
    served = page_files()
    assert len(served) == len(FILES)
    addresses = {
        value
        for _, attributes in document.tags
        for name in ("src", "href")
        if (value := attributes.get(name))
    }
    assert addresses
    assert {f"/{address}" for address in addresses} <= set(served)
    imports = {
        name for file in SCRIPTS for name in re.findall(r'from "(.*?)"', file.read_text("utf-8"))
    }
    assert {f"/static/{name.removeprefix('./')}" for name in imports} <= set(served)
    reached = {name.removeprefix("./") for name in imports} | {"page.js"}
    assert reached == {file.name for file in SCRIPTS}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_names_an_address_outside(file):
    text = file.read_text("utf-8")
    # Comments may say how an address looks; programs may compare with the beginning of one.
    code = re.sub(r"^\s*(//|\*|/\*).*$", "", text, flags=re.MULTILINE)
    outside = set(re.findall(r"""(?:https?:|wss?:|["'(])//[\w.-]+[^\s"'`)]*""", code)) - NAMESPACES
    assert not outside
    assert "@import" not in text
    assert "url(" not in text


def test_the_document_has_no_program_and_no_style_of_its_own(document):
    assert not document.inside
    for tag, attributes in document.tags:
        assert tag not in ("style", "base", "iframe", "object", "embed"), tag
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        if tag == "script":
            assert attributes["type"] == "module"
            assert attributes["src"]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_no_program_makes_markup_or_code_of_text(file):
    text = file.read_text("utf-8")
    assert not [sink for sink in SINKS if sink in text]
    assert not re.findall(r"setAttribute\(\s*[\"'](?:style|on\w+)", text)


def test_both_languages_have_the_same_words_with_the_same_gaps():
    gap = re.compile(r"\{\w+\}")
    assert set(WORDS) == {"en", "ko"}
    assert set(WORDS["en"]) == set(WORDS["ko"])
    for key, english in WORDS["en"].items():
        korean = WORDS["ko"][key]
        assert english.strip() == english
        assert english
        assert sorted(gap.findall(english)) == sorted(gap.findall(korean)), key
    named_alike = {key for key, text in WORDS["en"].items() if WORDS["ko"][key] == text}
    assert named_alike == {"set_min_p", "set_top_k", "set_top_p"}


def test_every_word_is_used_and_every_word_that_is_used_is_there():
    used = set(re.findall(r'data-(?:word|label|placeholder)="(\w+)"', SOURCE))
    used |= set(re.findall(r'word\("(\w+)"', SOURCE))
    assert used <= set(WORDS["en"])
    # Words whose names are put together, such as those of each sampling setting.
    parts = re.findall(r"`(\w+_)\$\{", SOURCE)
    texts = set(re.findall(r'"(\w+)"', SOURCE))
    for key in WORDS["en"]:
        assert key in texts or any(key.startswith(part) for part in parts), key


def test_each_sampling_setting_is_explained():
    settings = re.findall(r'\{ name: "(\w+)"', (PAGE / "settings.js").read_text("utf-8"))
    assert len(settings) == 11
    for name in settings:
        assert f"set_{name}" in WORDS["en"]
        assert f"about_{name}" in WORDS["en"]


def test_the_key_is_never_written_where_it_outlives_the_tab():
    api = (PAGE / "api.js").read_text("utf-8")
    assert "sessionStorage.setItem(KEY" in api
    assert "localStorage" not in api
    assert not [
        file.name
        for file in SCRIPTS
        if file.name != "api.js" and "mistill-key" in file.read_text("utf-8")
    ]


def test_files_stay_readable():
    for file in SCRIPTS:
        assert len(file.read_text("utf-8").splitlines()) <= 450, file.name
