"""JSON that is nested deep or holds a long number is refused in one line wherever it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mistill.cli import main
from mistill.errors import FolderError, TextError
from mistill.folders.json_text import parse_json, parse_message
from tests.tiny import tiny_model

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5_000
BAD = {"deep": '{"a": ' + DEEP + "}", "digits": '{"vocab_size": ' + LONG + "}", "latin": "\xff"}


@pytest.mark.parametrize("name", BAD)
def test_bad_json_is_an_error_in_one_line(name: str) -> None:
    with pytest.raises(FolderError, match=r"^here is not valid JSON: ") as raised:
        parse_json(BAD[name].encode("latin-1"), "here")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300
    with pytest.raises(TextError, match=r"^line 3 is not valid JSON"):
        parse_json("{", "line 3", TextError)
    assert parse_json(b'{"a": [1, null]}', "here") == {"a": [1, None]}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize(
    "file", ["config.json", "lineage.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_folder_with_bad_json_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, file: str, command: str
) -> None:
    folder = tiny_model(tmp_path / "model")
    text = f"[{BAD[name]}]" if file == "lineage.json" else BAD[name]
    (folder / file).write_bytes(text.encode("latin-1"))
    target = [str(tmp_path / "out")] if command == "export" else []
    code = main([command, str(folder), *target])
    written = capfd.readouterr()
    assert code in (1, 2)
    assert file in "".join((written.out + written.err).split())
    assert "Traceback" not in written.err
    assert not (tmp_path / "out").exists()


def test_text_and_schemas_with_bad_json_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], teacher: Path, model: Path
) -> None:
    student = shutil.copytree(model, tmp_path / "model")
    lines = [json.dumps({"text": "A line."}), '{"text": ' + DEEP + "}"]
    (tmp_path / "deep.jsonl").write_text("\n".join(lines) + "\n")
    code = main(
        [
            *("distill", str(student), str(tmp_path / "out"), "--teacher", str(teacher)),
            *("--texts", str(tmp_path / "deep.jsonl"), "--tokens", "64", "--block-length", "64"),
        ]
    )
    assert code == 2
    assert "line 2 is not valid JSON: it is nested too deeply" in capfd.readouterr().err
    (tmp_path / "schema.json").write_text('{"type": "object", "x": ' + DEEP + "}")
    assert main(["chat", str(student), "--json-schema", str(tmp_path / "schema.json")]) == 2
    assert "the JSON schema is not valid JSON" in capfd.readouterr().err


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_a_message_may_nest_so_deep_and_no_deeper(opening: bytes, closing: bytes) -> None:
    for levels in (1, 2, 5):
        content = opening * levels + b'"[[[[[{{{{{"' + closing * levels
        assert parse_message(content, levels, FolderError) == json.loads(content)
        with pytest.raises(FolderError, match="nested"):
            parse_message(opening + content + closing, levels, FolderError)


@pytest.mark.parametrize(
    "content",
    [
        *(b'{"a": 1, "a": 1}', b'[{"b": {"a": 1, "a": 2}}]', b'"\\ud800"', b'{"\\udfff": 1}'),
        *(b"\xef\xbb\xbf1", b'"\xff"', b"[" * 100_000, b"9" * 5000, b"", b"{"),
    ],
)
def test_a_message_that_programs_read_in_different_ways_is_refused(content: bytes) -> None:
    with pytest.raises(FolderError) as caught:
        parse_message(content, 64, FolderError)
    assert len(str(caught.value)) < 200


def test_a_message_of_whole_characters_is_read() -> None:
    content = b'{"a": "\\ud83d\\ude00", "b": [1, 2.5, null], "A": "\\\\ud800"}'
    assert parse_message(content, 2, FolderError) == json.loads(content)
