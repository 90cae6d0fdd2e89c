"""Options of a conversation: saving, drafts, probabilities of tokens; also from a shell."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export
from mistill.chat.bot import ChatBot
from mistill.cli.app import main
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.opening import open_model
from mistill.engine.speculation import SpeculativeModel
from mistill.errors import FolderError, SettingsError
from mistill.text.vocabulary import load_vocabulary

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 20, "threads": 1}


@pytest.fixture(scope="module")
def chatbot(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.to_onnx(model, tmp_path_factory.mktemp("onnx") / "chatbot", parity_positions=0)


def test_a_kept_conversation_goes_on_as_if_it_had_not_stopped(
    chatbot: Path, tmp_path: Path
) -> None:
    bot = ChatBot(chatbot, system="Be brief.", **GREEDY)
    list(bot.reply("Hello"))
    file = bot.save(tmp_path / "kept.safetensors")
    expected = "".join(bot.reply("And now?"))

    opened = OnnxModel(chatbot, threads=1)
    restored = ChatBot(chatbot, model=opened, temperature=0, max_new_tokens=20)
    restored.restore(file)
    assert restored.history == bot.history[:3]
    read = []
    run = opened._read

    def noted(tokens: list[int], scores: Any) -> None:
        read.append(len(tokens))
        run(tokens, scores)

    opened._read = noted  # type: ignore[method-assign]
    assert "".join(restored.reply("And now?")) == expected
    assert restored.last_speed is not None
    # The system's and the first question's tokens were in the file. What was written is read again
    # at temperature 0, and positions are read in pairs.
    vocabulary = load_vocabulary(chatbot)
    first = len(
        vocabulary.encode(vocabulary.render(restored.history[:2], add_generation_prompt=True))
    )
    again = sum(read) - restored.last_speed.new_tokens
    assert again < restored.last_speed.prompt_tokens - first + 2


def test_a_file_without_a_conversation_is_refused(chatbot: Path, tmp_path: Path) -> None:
    file = OnnxModel(chatbot, threads=1).save_cache(tmp_path / "kept")
    with pytest.raises(FolderError, match="holds no conversation"):
        ChatBot(chatbot, **GREEDY).restore(file)


@pytest.mark.parametrize(
    "conversation",
    [
        "{",
        "[]",
        '{"history": [{"role": "user"}], "forgotten": 0}',
        '{"history": [{"role": "user", "content": 7}], "forgotten": 0}',
        '{"history": [], "forgotten": 1}',
        '{"history": [], "forgotten": "0"}',
    ],
)
def test_a_damaged_conversation_is_refused_and_changes_nothing(
    conversation: str, chatbot: Path, tmp_path: Path
) -> None:
    model = OnnxModel(chatbot, threads=1)
    file = model.save_cache(tmp_path / "kept", conversation=conversation)
    bot = ChatBot(chatbot, model=model, system="Be brief.", **GREEDY)
    before = list(bot.history)
    with pytest.raises(FolderError, match=r"the conversation in .* is damaged"):
        bot.restore(file)
    assert bot.history == before


def test_only_onnx_folders_are_saved_and_speculate(model: Path, tmp_path: Path) -> None:
    opened = open_model(model, threads=1)
    bot = ChatBot(model, model=opened)
    with pytest.raises(SettingsError, match="only a conversation with an ONNX folder"):
        bot.save(tmp_path / "kept")
    with pytest.raises(SettingsError, match="speculative decoding needs an ONNX folder"):
        ChatBot(model, model=opened, draft="lookup")
    with pytest.raises(SettingsError, match=r"provider is for ONNX folders, .* is a float folder"):
        ChatBot(model, provider="cuda")


def test_a_chatbot_with_a_draft_says_the_same(chatbot: Path, tmp_path: Path) -> None:
    plain = ChatBot(chatbot, **GREEDY)
    for draft in ("lookup", chatbot):
        bot = ChatBot(chatbot, draft=draft, **GREEDY)
        assert isinstance(bot._model, SpeculativeModel)
        plain.reset()
        for question in ("Hello", "And now?"):
            assert "".join(bot.reply(question)) == "".join(plain.reply(question))
        assert bot.save(tmp_path / "kept").is_file()


def test_a_chatbot_and_its_draft_leave_the_processors_to_each_other(
    chatbot: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def yields(model: Any) -> bool:
        options = model.session.get_session_options()
        try:
            return bool(options.get_session_config_entry("session.force_spinning_stop") == "1")
        except RuntimeError:  # was never set
            return False

    assert not yields(ChatBot(chatbot)._model)
    looking_up: Any = ChatBot(chatbot, draft="lookup")._model
    assert not yields(looking_up.model)
    speculative: Any = ChatBot(chatbot, draft=chatbot)._model
    assert yields(speculative.model)
    assert yields(speculative._draft._model)
    assert "alone=False" not in caplog.text
    ChatBot(chatbot, model=OnnxModel(chatbot), draft=chatbot)
    assert "was opened with alone=True" in caplog.text


def test_how_probable_each_token_was_is_what_the_logits_say(chatbot: Path) -> None:
    bot = ChatBot(chatbot, temperature=1, max_new_tokens=9, seed=0, threads=1)
    list(bot.reply("Hello"))
    assert bot.last_scores == []
    bot.reset()
    list(bot.reply("Hello", log_probabilities=3))
    assert bot.last_speed is not None
    assert len(bot.last_scores) == bot.last_speed.new_tokens
    vocabulary = load_vocabulary(chatbot)
    prompt = vocabulary.encode(
        vocabulary.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    )
    written = [score.token for score in bot.last_scores]
    logits = OnnxModel(chatbot, threads=1).logits(np.array([prompt + written]))[0]
    logits = logits[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for place, score in enumerate(bot.last_scores):
        assert score.log_probability == pytest.approx(expected[place, score.token], abs=1e-4)
        best = np.argsort(-expected[place])[:3].tolist()
        assert [token for token, _ in score.top] == best
    with pytest.raises(SettingsError, match="log_probabilities must be 0 or more"):
        bot.reply("Hello", log_probabilities=-1)


# --- from a shell ---------------------------------------------------------------------------------


def typed(
    lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: Any
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code = main(["chat", *map(str, options), "--threads", "1"])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_command_answers_in_the_form_of_a_schema(
    chatbot: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}, "wind": {"enum": ["mistral", "breeze"]}},
        "required": ["sunny", "wind"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    code, out, _ = typed(
        "Today?\nTomorrow?\n",
        monkeypatch,
        capsys,
        chatbot,
        "--lines",
        "--json-schema",
        tmp_path / "schema.json",
        "--temperature",
        "2",
    )
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 2
    for answer in answers:
        assert list(answer) == ["sunny", "wind"]
        assert isinstance(answer["sunny"], bool)
        assert answer["wind"] in ("mistral", "breeze")


def test_the_command_takes_other_forms_and_refuses_two(
    chatbot: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "yes.lark").write_text('start: "yes" | "no"\n')
    _, out, _ = typed("Well?\n", monkeypatch, capsys, chatbot, "--regex", "[0-9]{4}")
    assert out.strip().isdigit()
    assert len(out.strip()) == 4
    _, out, _ = typed("Well?\n", monkeypatch, capsys, chatbot, "--grammar", tmp_path / "yes.lark")
    assert out.strip() in ("yes", "no")
    code, out, err = typed(
        "Well?\n", monkeypatch, capsys, chatbot, "--regex", "a", "--grammar", tmp_path / "yes.lark"
    )
    assert (code, out) == (2, "")
    assert "one of --json-schema, --regex and --grammar" in err


def test_the_command_keeps_a_session_and_speculates(
    chatbot: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [chatbot, "--temperature", "0", "--max-new-tokens", "12"]
    _, whole, _ = typed("Hello\nAnd now?\n", monkeypatch, capsys, *options, "--lines")
    session = ["--session", tmp_path / "kept", "--draft", "lookup"]
    _, first, _ = typed("Hello\n", monkeypatch, capsys, *options, *session)
    _, second, _ = typed("And now?\n", monkeypatch, capsys, *options, *session)
    assert first + second == whole


def test_a_session_that_cannot_be_kept_is_refused_before_the_chat(
    chatbot: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = typed(
        "Hello\n", monkeypatch, capsys, chatbot, "--session", tmp_path / "nowhere" / "kept"
    )
    assert (code, out) == (2, "")
    assert "there is no folder" in err
