"""Every command of docs/preferences.md runs, on a tiny model and with smaller numbers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from mistill.cli.app import main
from tests.scripted_server import Answer
from tests.scripted_server import scripted as scripted
from tests.tiny import SENTENCES, tiny_model
from tests.tune.pairs import pair_rows

PAGE = Path(__file__).parent.parent.parent / "docs" / "preferences.md"
COMMANDS = re.findall(r"^    mistill (.*)$", PAGE.read_text(), re.MULTILINE)
LESS = {
    "preferences": "--steps 2 --batch-size 4 --max-length 200 --learning-rate 1e-3 --keep last",
    "reward": "--steps 2 --batch-size 4 --max-length 200 --learning-rate 1e-3 --keep last",
    "reinforce": "--steps 1 --batch-size 4 --samples 2 --max-length 100 --max-new-tokens 4 "
    "--keep last --held-out-prompts 2",
    "supervised": "--tokens 3000 --block-length 128 --batch-size 2 --learning-rate 5e-3",
    "bench": "--new-tokens 4 --limit 2 --threads 1",
    "generate": "--max-new-tokens 40 --keep-unfinished --temperature 1.5 --top-p 1",
}
NUMBERS = {"--best-of": "4", "--without-prompts": "40"}


def smaller(command: str, model: Path, server: str) -> list[str]:
    """The words of a command with smaller numbers, the tiny model for SmolLM2, and a server."""
    names = {"@smollm2": str(model), "http://127.0.0.1:8000/v1": server}
    words = [names.get(word, word) for word in shlex.split(command)]
    for place, word in enumerate(words[:-1]):
        if word in NUMBERS:
            words[place + 1] = NUMBERS[word]
    kind = words[1] if words[0] == "tune" else words[0]
    return [*words, *LESS.get(kind, "").split()]


@pytest.mark.slow
def test_every_command_of_the_page_runs(model, chats, tmp_path, monkeypatch, scripted):
    says_a: Answer = (200, {}, {"choices": [{"message": {"content": "A"}}]})
    server = scripted(lambda body, number: says_a)
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(chats, "chats.jsonl")
    rows = "".join(json.dumps(row) + "\n" for row in pair_rows())
    Path("prompts.txt").write_text("".join(f"{text} {n}\n" for n in (1, 2) for text in SENTENCES))
    Path("texts.txt").write_text("\n".join(SENTENCES))
    Path("prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in SENTENCES)
    )
    Path("schema.json").write_text('{"type": "object"}')
    tiny_model(Path("judge-model"), seed=7, max_position_embeddings=2048)
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        Path("pairs.jsonl").write_text(rows)
        # The page makes the same folder in several ways.
        assert main([*smaller(command, model, server.url), "--overwrite"]) == 0, command
