"""Files appear whole or not at all, on this machine and elsewhere."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from mistill.errors import FolderError
from mistill.folders.location import Location, location_of


@pytest.fixture(params=["here", "objects", "moves", "file"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    folder = tmp_path / "a" / "b"
    if request.param == "objects":
        return location_of(f"memory://{uuid.uuid4().hex}/b/")
    if request.param == "moves":
        return Location("moves", str(folder), LocalFileSystem())
    return location_of(folder if request.param == "here" else f"file://{folder}")


def test_what_is_written_is_read(location: Location) -> None:
    assert location.names() == []
    assert not location.exists("one")
    location.write("one", b"0123456789")
    location.write("two", b"abc")
    location.write("one", b"9876543210")
    assert location.names() == ["one", "two"]
    assert location.exists("one")
    assert location.size("one") == 10
    assert location.read("one") == b"9876543210"
    assert location.read("one", 2, 5) == b"765"
    assert location.read("one", 8, 99) == b"10"
    parts = [("two", 1, 2), ("one", 0, 2), ("two", 0, 3)]
    assert location.read_parts(parts) == [b"b", b"98", b"abc"]
    location.remove("one")
    location.remove("one")
    assert location.names() == ["two"]


def test_a_missing_file_is_named(location: Location) -> None:
    location.write("one", b"")
    for ask in (
        lambda: location.read("none"),
        lambda: location.size("none"),
        lambda: location.read_parts([("none", 0, 1)]),
    ):
        with pytest.raises(FolderError, match="none"):
            ask()


@pytest.mark.parametrize("kind", ["here", "moves"])
def test_a_write_that_fails_leaves_the_old_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = Location("here", str(tmp_path), LocalFileSystem() if kind == "moves" else None)
    location.write("one", b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("cut off")

    monkeypatch.setattr(Path, "replace", fail)
    monkeypatch.setattr(LocalFileSystem, "mv", fail)
    with pytest.raises(OSError, match="cut off"):
        location.write("one", b"new")
    assert location.read("one") == b"old"
    assert len(location.names()) == 2
    location.remove_partials("two")
    assert len(location.names()) == 2
    location.remove_partials("one")
    assert location.names() == ["one"]


def test_an_address_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(FolderError, match="does not know"):
        location_of("gopher://hole/targets")
