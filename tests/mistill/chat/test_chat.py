"""Streamed text, stop strings, and conversations with their history."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.decoders import DecodeStream

import export
from mistill.chat import bot as chat
from mistill.chat import reply as reply_module
from mistill.chat.bot import ChatBot
from mistill.chat.settings import ChatSettings
from mistill.chat.stream_text import StopStrings, TextStream
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.opening import open_model
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.errors import ContextError, SettingsError, TextError, VocabularyError
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from tests.tiny import SENTENCES, tiny_tokenizer

END = 4  # <|im_end|>


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return load_vocabulary(tiny_tokenizer(tmp_path_factory.mktemp("byte-level")))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """The way of Llama 2 and Mistral v0.1: a mark for spaces, and single bytes as a last resort."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    letters = [
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz",
        "\u2581t",
        "he",
        "\u2581the",
        "ll",
        "\u00e9",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("l", "l")]
    tokenizer = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_vocabulary(folder)


# --- streamed text --------------------------------------------------------------------------------


def streamed(vocabulary: Vocabulary, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(vocabulary, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


TEXTS = [
    *SENTENCES,
    "the hello",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family, \U0001f1eb\U0001f1f7 flag",
    "e\u0301 combining, \u0928\u092e\u0938\u094d\u0924\u0947",
    "  two spaces, a tab\tand\n\nlines ",
    "\U0010ffff\u0080\u07ff\u0800\uffff",
]


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_none_breaks_a_character(
    kind: str, text: str, request: pytest.FixtureRequest
) -> None:
    vocabulary = request.getfixturevalue(kind)
    ids = vocabulary.encode(text)
    pieces = streamed(vocabulary, ids)
    assert "".join(pieces) == text == vocabulary.decode(ids)
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""
    for piece in pieces:
        piece.encode("utf-8")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_appear_no_later_than_those_of_the_tokenizers_library(
    text: str, byte_level: Vocabulary
) -> None:
    tokenizer = Tokenizer.from_str((byte_level._folder / "tokenizer.json").read_text("utf-8"))
    ids = byte_level.encode(text)
    ours, theirs = TextStream(byte_level), DecodeStream()
    shown, expected = "", ""
    for token in ids:
        shown += ours.add(token)
        expected += theirs.step(tokenizer, token) or ""
        assert shown.startswith(expected)
    assert shown + ours.finish() == text


def test_bytes_that_are_no_character_are_shown_as_the_replacement_character(
    byte_level: Vocabulary,
) -> None:
    smile = byte_level.encode("\U0001f600")
    assert len(smile) > 1
    assert streamed(byte_level, smile[:-1]) == [*[""] * (len(smile) - 1), "\ufffd"]
    letter = byte_level.encode("a")
    assert "".join(streamed(byte_level, [*smile[:-1], *letter])) == "\ufffda"


def test_special_tokens_are_marks_and_not_text(byte_level: Vocabulary) -> None:
    hello = byte_level.encode("hello")
    assert "".join(streamed(byte_level, [1, *hello, 3, *hello])) == "hellohello"


def test_only_the_first_space_of_sentencepiece_is_not_part_of_the_text(
    sentence_piece: Vocabulary,
) -> None:
    the, he = (sentence_piece._tokenizer.token_to_id(token) for token in ("\u2581the", "he"))
    assert the is not None
    assert he is not None
    assert streamed(sentence_piece, [the, the]) == ["the", " the", ""]
    assert streamed(sentence_piece, [he, the]) == ["he", " the", ""]


def cut_slowly(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string, found letter by letter."""
    for end in range(len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def test_stop_strings_cut_alike_however_the_text_is_cut_into_pieces() -> None:
    chance = random.Random(0)
    for _ in range(3000):
        text = "".join(chance.choices("ab\n", k=chance.randrange(14)))
        stop = ["".join(chance.choices("ab\n", k=chance.randint(1, 4))) for _ in range(3)]
        stop = stop[: chance.randint(1, 3)]
        expected = cut_slowly(text, stop)
        strings, shown, rest = StopStrings(stop), "", text
        while rest and not strings.found:
            size = chance.randint(1, 4)
            shown += strings.add(rest[:size])
            rest = rest[size:]
            # Nothing is shown that would have to be taken back.
            assert expected.startswith(shown), (text, stop)
        if not strings.found:
            # Nothing is held back that cannot become a stop string.
            held = strings._held
            assert not held or any(string.startswith(held) for string in stop), (text, stop)
            shown += strings.rest()
        assert shown == expected, (text, stop)


def test_a_stop_string_is_found_across_tokens_and_characters(byte_level: Vocabulary) -> None:
    ids = byte_level.encode("Ask: \U0001f600\U0001f601. User: more")
    for stop, expected in [
        (["User:"], "Ask: \U0001f600\U0001f601. "),
        (["\U0001f601"], "Ask: \U0001f600"),
        ([". U", "User:"], "Ask: \U0001f600\U0001f601"),
        (["never"], "Ask: \U0001f600\U0001f601. User: more"),
    ]:
        assert "".join(streamed(byte_level, ids, stop)) == expected


# --- a model that says what it is told ------------------------------------------------------------


class Scripted:
    """A language model that has its replies by heart; it notes what it reads."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        replies: Sequence[Sequence[int]],
        context_length: int = 1000,
        before_token: Callable[[int], None] = lambda place: None,
    ) -> None:
        self.vocabulary_size = vocabulary.size
        self.context_length = context_length
        self.prompts: list[list[int]] = []
        self._replies = iter(replies)
        self._before_token = before_token

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        raise AssertionError("a chat does not score")

    def stream(self, ids: Sequence[int], choose: Any = None) -> Iterator[int]:
        self.prompts.append(list(ids))
        reply = itertools.chain(next(self._replies), itertools.repeat(END))
        for place in range(self.context_length - len(ids)):
            self._before_token(place)
            token = next(reply)
            logits = np.zeros(self.vocabulary_size, np.float32)
            logits[token] = 99
            yield choose(logits)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_tokenizer(tmp_path / "scripted")


def scripted(folder: Path, replies: Sequence[str], **options: Any) -> tuple[ChatBot, Scripted]:
    vocabulary = load_vocabulary(folder)
    known = {
        name: options.pop(name) for name in ("context_length", "before_token") if name in options
    }
    model = Scripted(vocabulary, [vocabulary.encode(reply) for reply in replies], **known)
    return ChatBot(folder, model=model, **options), model


def test_the_model_reads_the_conversation_as_its_template_writes_it(folder: Path) -> None:
    bot, model = scripted(folder, ["Hello.", "Fine."], system="Be brief.")
    assert "".join(bot.reply("Hi")) == "Hello."
    assert "".join(bot.reply("How are you?")) == "Fine."
    text = load_vocabulary(folder).decode(model.prompts[1])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nHow are you?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert bot.history == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Fine."},
    ]
    assert bot.last_ending == "end of turn"


def test_a_reply_ends_at_any_end_token_and_does_not_show_it(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2]}))
    vocabulary = load_vocabulary(folder)
    assert {2, 4} <= set(vocabulary.end_ids)
    for end in (2, 4):
        hello = vocabulary.encode("Hello")
        bot = ChatBot(folder, model=Scripted(vocabulary, [[*hello, end, *hello]]))
        assert "".join(bot.reply("Hi")) == "Hello"
        assert bot.last_speed is not None
        assert bot.last_speed.new_tokens == len(hello) + 1


def test_no_piece_is_empty_and_no_character_is_broken(folder: Path) -> None:
    text = "Caf\u00e9 \U0001f600\U0001f600, \ud55c\uad6d\uc5b4."
    bot, _ = scripted(folder, [text])
    pieces = list(bot.reply("Hi"))
    assert "".join(pieces) == text
    assert "" not in pieces
    assert len(pieces) > 5


def test_a_stop_string_ends_the_reply_and_is_in_no_history(folder: Path) -> None:
    bot, _ = scripted(folder, ["One. User: two", "No stop. Us"], stop=("User:",))
    assert "".join(bot.reply("Hi")) == "One. "
    assert bot.last_ending == "stop string"
    assert bot.history[-1] == {"role": "assistant", "content": "One. "}
    assert "".join(bot.reply("Hi")) == "No stop. Us"


def test_a_reply_is_cut_at_max_new_tokens(folder: Path) -> None:
    vocabulary = load_vocabulary(folder)
    text = "one two three four five six seven eight"
    for count in (1, 2, 7):
        bot, _ = scripted(folder, [text], max_new_tokens=count)
        assert "".join(bot.reply("Hi")) == vocabulary.decode(vocabulary.encode(text)[:count])
        assert bot.last_ending == "max_new_tokens"
        assert bot.last_speed is not None
        assert bot.last_speed.new_tokens == count


def test_a_closed_reply_stays_in_the_history_as_far_as_it_was_shown(folder: Path) -> None:
    bot, model = scripted(folder, ["one two three four", "five"])
    reply = bot.reply("Count")
    shown = [next(reply), next(reply)]
    reply.close()
    assert bot.last_ending == "interrupted"
    assert bot.history[-1] == {"role": "assistant", "content": "".join(shown)}
    assert list(bot.reply("Go on")) == ["five"] or bot.history[-1]["content"] == "five"
    assert "".join(shown) + "<|im_end|>" in load_vocabulary(folder).decode(model.prompts[1])


def test_an_interrupt_within_the_model_keeps_what_was_shown(folder: Path) -> None:
    def interrupt(place: int) -> None:
        if place == 3:
            raise KeyboardInterrupt

    bot, _ = scripted(folder, ["one two three four"], before_token=interrupt)
    shown: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        shown.extend(bot.reply("Count"))
    assert bot.last_ending == "interrupted"
    assert len(bot.history) == 2
    said = load_vocabulary(folder).encode("one two three four")[:3]
    assert bot.history[-1]["content"] == load_vocabulary(folder).decode(said)


def test_a_reply_of_which_nothing_was_shown_leaves_no_trace(folder: Path) -> None:
    def interrupt(place: int) -> None:
        raise KeyboardInterrupt

    bot, _ = scripted(folder, ["one"], before_token=interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(bot.reply("Count"))
    assert bot.history == []
    bot.reply("never begun").close()
    assert bot.history == []


def test_an_empty_reply_is_a_reply(folder: Path) -> None:
    bot, _ = scripted(folder, ["", "Hello"])
    assert list(bot.reply("Hi")) == []
    assert [message["role"] for message in bot.history] == ["user", "assistant"]
    assert "".join(bot.reply("Hi")) == "Hello"


def test_replies_at_once_do_not_end_one_another_and_join_the_history_as_they_end(
    folder: Path,
) -> None:
    bot, model = scripted(folder, ["one two three", "Hello", "later"])
    first = bot.reply("Count")
    shown = next(first)
    second = bot.reply("Hi")
    assert "".join(second) == "Hello"
    assert shown + "".join(first) == first.text == "one two three"
    assert (first.ending, second.ending) == ("end of turn", "end of turn")
    assert first.speed is not None
    assert first.speed.new_tokens > 1
    contents = [message["content"] for message in bot.history]
    assert contents == ["Hi", "Hello", "Count", "one two three"]
    # Neither saw the other; the next one sees both.
    assert "Count" not in load_vocabulary(folder).decode(model.prompts[1])
    assert "".join(bot.reply("And?")) == "later"
    assert "Count" in load_vocabulary(folder).decode(model.prompts[2])


def test_a_reply_begun_before_a_reset_does_not_join_the_new_conversation(folder: Path) -> None:
    bot, _ = scripted(folder, ["one two", "Hello"])
    reply = bot.reply("Count")
    next(reply)
    bot.reset()
    assert list(reply) == []
    assert reply.ending == "interrupted"
    assert bot.history == []


def test_options_of_one_reply_change_no_other(folder: Path) -> None:
    text = "one two three four five"
    bot, _ = scripted(folder, [text, text, text], max_new_tokens=4)
    cut = "".join(bot.reply("Count", max_new_tokens=2))
    assert bot.last_ending == "max_new_tokens"
    assert len("".join(bot.reply("Count"))) > len(cut)
    assert "".join(bot.reply("Count", stop=["two"], max_new_tokens=9)) == "one "
    assert bot.settings.stop == ()
    with pytest.raises(SettingsError, match="did you mean max_new_tokens"):
        bot.reply("Count", max_new_token=3)  # type: ignore[call-arg]
    with pytest.raises(SettingsError, match="temperature must be at least 0"):
        bot.reply("Count", temperature=-1)


def test_tasks_of_asyncio_read_replies_of_one_chatbot_at_once(chatbot: Path) -> None:
    bot = ChatBot(chatbot, temperature=0, max_new_tokens=12, threads=1)
    alone = []
    for question in SENTENCES[:3]:
        bot.reset()
        alone.append("".join(bot.reply(question)))
    bot.reset()

    async def ask(question: str) -> str:
        return "".join([part async for part in bot.stream(question)])

    async def leave() -> str:
        parts = bot.stream(SENTENCES[3])
        first = await anext(parts)
        await parts.aclose()  # type: ignore[attr-defined]
        return first

    async def all_at_once() -> list[str]:
        return list(await asyncio.gather(*map(ask, SENTENCES[:3]), leave()))

    *replies, first = asyncio.run(all_at_once())
    assert replies == alone
    assert len(bot.history) == 8
    assert bot.history[1::2].count({"role": "assistant", "content": first}) == 1


def test_threads_that_share_a_model_and_a_reset_repeat_to_the_last_bit(chatbot: Path) -> None:
    """At temperature 0 the odds of every token are those of a process of its own."""
    questions = [[*SENTENCES[:3]], [SENTENCES[0], SENTENCES[4], "Hi"], ["Hi", *SENTENCES[4:6]]]

    def talk(bot: ChatBot, asked: Sequence[str]) -> list[Any]:
        bot.reset()
        odds = []
        for question in asked:
            reply = bot.reply(question, log_probabilities=2)
            text = "".join(reply)
            odds.append((text, [score.log_probability for score in reply.scores]))
        return odds

    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 9, "threads": 1}
    alone = [talk(ChatBot(chatbot, **options), asked) for asked in questions]
    model = OnnxModel(chatbot, threads=1)
    together: list[Any] = [None] * 3

    def work(number: int) -> None:
        bot = ChatBot(chatbot, model=model, **options)
        together[number] = [talk(bot, questions[number]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [[one, one] for one in alone]


def test_reset_forgets_the_conversation_and_not_the_system(folder: Path) -> None:
    bot, model = scripted(folder, ["one two", "Hello"], system="Be brief.")
    next(bot.reply("Count"))
    bot.reset()
    assert bot.history == [{"role": "system", "content": "Be brief."}]
    assert "".join(bot.reply("Hi")) == "Hello"
    assert "Count" not in load_vocabulary(folder).decode(model.prompts[1])


def test_the_history_may_be_written_by_hand(folder: Path) -> None:
    bot, model = scripted(folder, ["Yes."])
    bot.history += [
        {"role": "user", "content": "Is it cold?"},
        {"role": "assistant", "content": "Very."},
    ]
    assert "".join(bot.reply("Windy?")) == "Yes."
    assert "Very.<|im_end|>" in load_vocabulary(folder).decode(model.prompts[0])


# --- the context ----------------------------------------------------------------------------------


def test_a_conversation_that_outgrows_the_context_is_refused_with_its_size(folder: Path) -> None:
    bot, model = scripted(folder, ["one two three"] * 9, context_length=90)
    with pytest.raises(ContextError, match=r"has \d+ tokens and the model's context holds 90"):
        for _ in range(9):
            list(bot.reply("A question of some length."))
    turns = len(bot.history) // 2
    assert 0 < turns < 9
    assert len(model.prompts) == turns
    assert all(len(prompt) < 90 for prompt in model.prompts)
    bot.reset()
    assert "".join(bot.reply("Hi")) == "one two three"


def test_a_conversation_must_leave_room_for_one_token(folder: Path) -> None:
    bot, model = scripted(folder, ["one"])
    list(bot.reply("Hi"))
    length = len(model.prompts[0])
    full, _ = scripted(folder, ["one two"], context_length=length)
    with pytest.raises(ContextError, match="shorten the message"):
        full.reply("Hi")
    assert full.history == []
    nearly, _ = scripted(folder, ["one two"], context_length=length + 1)
    assert "one".startswith("".join(nearly.reply("Hi")))
    assert nearly.last_speed is not None
    assert nearly.last_speed.new_tokens == 1


def test_a_reply_that_reaches_the_end_of_the_context_says_so(folder: Path) -> None:
    bot, model = scripted(folder, ["one two three four five six seven"], context_length=40)
    list(bot.reply("Count to ten"))
    assert bot.last_ending == "context"
    assert bot.last_speed is not None
    assert len(model.prompts[0]) + bot.last_speed.new_tokens == 40


def test_sliding_forgets_the_oldest_turns_and_keeps_the_system_and_the_question(
    folder: Path,
) -> None:
    replies = [f"reply {number}" for number in range(20)]
    bot, model = scripted(
        folder, replies, context_length=400, overflow="slide", system="Be brief.", max_new_tokens=30
    )
    vocabulary = load_vocabulary(folder)
    for number in range(20):
        assert "".join(bot.reply(f"question {number}")) == f"reply {number}"
        text = vocabulary.decode(model.prompts[-1])
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith(f"question {number}<|im_end|>\n<|im_start|>assistant\n")
        # There is room for the reply: 30 tokens, less than a quarter of the context.
        assert len(model.prompts[-1]) <= 400 - 30
        kept = [turn for turn in range(number) if f"question {turn}<" in text]
        assert kept == list(range(number - len(kept), number))
        assert all(f"reply {turn}<" in text for turn in kept)
    assert len(bot.history) == 41
    # What is forgotten stays forgotten, and much of it goes at once: the cache keeps its worth.
    starts = [
        vocabulary.decode(prompt).split("question ")[1].split("<")[0] for prompt in model.prompts
    ]
    assert starts == sorted(starts, key=int)
    assert 2 <= len(set(starts)) <= 6


def test_a_message_longer_than_the_context_is_refused_even_when_sliding(folder: Path) -> None:
    bot, _ = scripted(folder, ["Hello", "Hello"], context_length=60, overflow="slide")
    list(bot.reply("Hi"))
    with pytest.raises(ContextError, match="shorten the message"):
        bot.reply("word " * 80)
    assert "".join(bot.reply("Hi")) == "Hello"


# --- speed ----------------------------------------------------------------------------------------


def test_the_speed_of_a_reply_is_the_time_that_the_model_took(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return now

    def pass_time(place: int) -> None:
        nonlocal now
        now += 2.0 if place == 0 else 0.25

    monkeypatch.setattr(chat, "time", Clock)
    monkeypatch.setattr(reply_module, "time", Clock)
    bot, model = scripted(folder, ["one two three"], before_token=pass_time)
    assert bot.last_speed is None
    for _ in bot.reply("Count"):
        now += 50  # the reader takes its time
    speed = bot.last_speed
    assert speed is not None
    assert speed.prompt_tokens == len(model.prompts[0])
    assert speed.first_token_seconds == 2.0
    assert speed.new_tokens == len(load_vocabulary(folder).encode("one two three")) + 1
    assert speed.tokens_per_second == 4.0


def test_a_reply_of_one_token_has_no_tokens_per_second(folder: Path) -> None:
    bot, _ = scripted(folder, [""])
    list(bot.reply("Hi"))
    assert bot.last_speed is not None
    assert bot.last_speed.new_tokens == 1
    assert bot.last_speed.tokens_per_second == 0


# --- real models ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatbot(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.to_onnx(model, tmp_path_factory.mktemp("onnx") / "chatbot", parity_positions=0)


def test_an_onnx_folder_and_its_source_say_the_same(chatbot: Path, model: Path) -> None:
    conversations = []
    for path in (chatbot, model):
        bot = ChatBot(path, temperature=0, repetition_penalty=1, max_new_tokens=40, threads=1)
        for question in SENTENCES[:3]:
            list(bot.reply(question))
        conversations.append(bot.history)
    assert conversations[0] == conversations[1]
    assert len(conversations[0]) == 6
    assert len(set(conversations[0][1]["content"])) > 5


def test_a_later_turn_reads_only_what_is_new(
    chatbot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = OnnxModel(chatbot, threads=1)
    bot = ChatBot(chatbot, model=opened, temperature=0, max_new_tokens=30)
    list(bot.reply(SENTENCES[0]))
    assert bot.last_speed is not None
    first = bot.last_speed.prompt_tokens
    read: list[int] = []
    run = opened._read

    def noted(tokens: list[int], scores: NDArray[np.float32]) -> None:
        read.append(len(tokens))
        run(tokens, scores)

    monkeypatch.setattr(opened, "_read", noted)
    reply = bot.reply("And now?")
    next(reply)
    before_more = sum(read)
    reply.close()
    # A random model spells its reply in ways that the tokenizer does not, so that may be read
    # again, but nothing before it is.
    assert before_more <= bot.last_speed.prompt_tokens - first
    assert first > 20


def test_a_seed_repeats_a_conversation(chatbot: Path) -> None:
    opened = open_model(chatbot, threads=1)

    def talk(bot: ChatBot) -> list[str]:
        return ["".join(bot.reply("Hi")) for _ in range(3)]

    options: dict[str, Any] = {"model": opened, "temperature": 1.5, "max_new_tokens": 12}
    bot = ChatBot(chatbot, seed=3, **options)
    first = talk(bot)
    bot.reset()
    assert talk(bot) == first
    assert talk(ChatBot(chatbot, seed=3, **options)) == first
    assert talk(ChatBot(chatbot, seed=4, **options)) != first


def test_the_penalty_counts_the_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[list[int]] = []

    def sampler(*arguments: Any, seen: list[int]) -> Sampler:
        noted.append(seen)
        return Sampler(*arguments, seen=seen)

    monkeypatch.setattr(chat, "Sampler", sampler)
    bot, model = scripted(folder, ["Hello"], repetition_penalty=1.1)
    list(bot.reply("Hi"))
    assert noted == model.prompts


def test_a_chatbot_is_sampled_as_it_says_itself_where_nobody_says_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"do_sample": True, "temperature": 0.3, "repetition_penalty": 1.2}
    (folder / "generation_config.json").write_text(json.dumps(own))
    noted: list[SamplingSettings] = []

    def sampler(settings: SamplingSettings, *arguments: Any, seen: list[int]) -> Sampler:
        noted.append(settings)
        return Sampler(settings, *arguments, seen=seen)

    monkeypatch.setattr(chat, "Sampler", sampler)
    bot, _ = scripted(folder, ["Hello"] * 3, repetition_penalty=1)
    list(bot.reply("Hi"))
    list(bot.reply("Hi", temperature=0))
    list(bot.reply("Hi", repetition_penalty=None))
    assert [(one.temperature, one.repetition_penalty) for one in noted] == [
        (0.3, 1), (0, 1), (0.3, 1.2)
    ]  # fmt: skip


# --- what is refused ------------------------------------------------------------------------------


def test_a_folder_without_a_chat_template_is_refused_in_one_line(
    chatbot: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(chatbot, copy)
    (copy / "chat_template.jinja").unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"]["chat_template.jinja"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VocabularyError, match="no chat template") as refused:
        ChatBot(copy)
    assert "\n" not in str(refused.value)


def test_what_the_template_refuses_is_refused_before_the_model_reads(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}ok"
    )
    bot, model = scripted(folder, ["Hello"])
    list(bot.reply("Hi"))
    with pytest.raises(TextError, match="one at a time"):
        bot.reply("Hi again")
    assert len(model.prompts) == 1
    assert len(bot.history) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"stop": "User:"},
        {"stop": ("",)},
        {"overflow": "ignore"},
        {"temperature": -1},
        {"temprature": 1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused_by_name(
    options: dict[str, Any], folder: Path
) -> None:
    with pytest.raises(SettingsError, match=next(iter(options)).rstrip("s")):
        ChatBot(folder, **options)


def test_settings_come_as_an_object_or_as_options_but_not_both(folder: Path) -> None:
    settings = ChatSettings(max_new_tokens=3)
    assert scripted(folder, [], settings=settings)[0].settings is settings
    with pytest.raises(SettingsError, match="not both"):
        ChatBot(folder, settings=settings, max_new_tokens=4)


# --- the system prompt ----------------------------------------------------------------------------


def test_a_system_prompt_that_fills_the_context_is_refused_by_its_name(folder: Path) -> None:
    for overflow in ("refuse", "slide"):
        with pytest.raises(ContextError, match=r"system prompt takes \d+ tokens .* shorten the s"):
            scripted(folder, [], system="word " * 100, context_length=64, overflow=overflow)
    bot, _ = scripted(folder, ["Hello."], context_length=64)
    bot.history = [{"role": "system", "content": "word " * 100}]
    with pytest.raises(ContextError, match="shorten the system prompt"):
        bot.reply("Hi")
    bot, _ = scripted(folder, ["Hello."], system="Be brief.", context_length=64)
    with pytest.raises(ContextError, match="shorten the message"):
        bot.reply("word " * 100)


def test_a_system_prompt_that_the_template_leaves_out_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scripted(folder, [], system="Be brief.")
    assert not caplog.records
    file = folder / "chat_template.jinja"
    file.write_text("{% set messages = messages[1:] %}" + file.read_text())
    scripted(folder, [], system="Be brief.")
    assert "does not write the system prompt" in caplog.text


def test_half_of_a_character_is_refused(folder: Path) -> None:
    with pytest.raises(TextError, match=r"half of a character, U\+D83D"):
        scripted(folder, [], system="\ud83d")
    bot, _ = scripted(folder, ["Hello."])
    with pytest.raises(TextError, match=r"half of a character, U\+D83D"):
        bot.reply("\ud83d?")
    assert "".join(bot.reply("\U0001f600?")) == "Hello."


def test_a_system_prompt_given_now_takes_the_place_of_the_saved_one(
    chatbot: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4, "threads": 1}
    first = ChatBot(chatbot, system="Be a pirate.", **options)
    "".join(first.reply("Hello"))
    first.save(tmp_path / "kept")
    second = ChatBot(chatbot, system="Be a poet.", **options)
    second.restore(tmp_path / "kept")
    assert second.history == [{"role": "system", "content": "Be a poet."}, *first.history[1:]]
    anew = ChatBot(chatbot, **options)
    anew.history = list(second.history)
    assert "".join(second.reply("Hello")) == "".join(anew.reply("Hello"))
    third = ChatBot(chatbot, **options)
    third.restore(tmp_path / "kept")
    assert third.history == first.history
