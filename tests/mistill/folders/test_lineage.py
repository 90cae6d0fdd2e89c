"""A folder says how it came to be, and is told apart by what it holds."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from mistill.errors import FolderError
from mistill.folders.lineage import (
    add_lineage,
    find_source,
    fingerprint,
    lineage_after,
    read_lineage,
)
from mistill.folders.publishing import creating


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


@dataclass(frozen=True, kw_only=True)
class Settings:
    bits: int = 4
    sizes: tuple[int, ...] = (1, 2)
    name: str


def test_an_entry_names_the_settings_that_are_not_the_defaults():
    (entry,) = lineage_after(None, step="round", settings=Settings(name="a", sizes=(3,)))
    (plain,) = lineage_after(None, step="convert", settings={"to": "gptq_v2"})

    assert entry["settings"] == {"bits": 4, "sizes": [3], "name": "a"}
    assert entry["changed_settings"] == ["sizes", "name"]
    assert plain["changed_settings"] == ["to"]


def test_no_path_of_the_machine_is_recorded_and_the_source_is_found_beside(model, tmp_path):
    source = Path(shutil.copytree(model, tmp_path / "one"))
    settings = {"texts": [str(tmp_path / "chats.jsonl"), "here.jsonl"], "file": "C:\\Users\\me\\x"}
    settings["system"] = "/think first"
    with creating(tmp_path / "two") as partial:
        add_lineage(partial, step="step", settings=settings, source=source, seen={"at": tmp_path})
    assert str(tmp_path) not in (tmp_path / "two" / "lineage.json").read_text()
    (entry,) = read_lineage(tmp_path / "two")
    assert entry["source"] == "one"
    assert entry["settings"]["texts"] == ["chats.jsonl", "here.jsonl"]
    assert "Users" not in entry["settings"]["file"]
    assert entry["settings"]["system"] == "/think first"
    assert find_source(tmp_path / "two", entry) == source
    moved = source.rename(tmp_path / "three")
    assert find_source(tmp_path / "two", entry) is None
    assert find_source(tmp_path / "two", {**entry, "source": "three"}) == moved
