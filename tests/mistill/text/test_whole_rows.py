"""A model learns the text that transformers renders of the whole row, or the row is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mistill.errors import TextError
from mistill.text.documents import (
    read_documents,
    read_prompt_conversations,
    read_prompts,
    read_stream,
)
from mistill.text.vocabulary import Vocabulary, load_vocabulary
from tests.mistill import made
from tests.mistill.text import templates
from tests.mistill.text.templates import learned, refusal, texts_of, theirs, vocabulary_of
from tests.mistill.text.test_text import lines
from tests.tiny import CHATML, tiny_tokenizer

QUESTION = {"role": "user", "content": "How high is the tide in Brest?"}
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
CALLING = [
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4.1 m", "name": "tide"},
    {"role": "assistant", "content": "4.1 metres."},
]
THINKING = [QUESTION, {"role": "assistant", "content": "4 m.", "reasoning_content": "Spring tide."}]
PIRATE = {"role": "system", "content": "Speak like a pirate."}
PLAIN = [QUESTION, {"role": "assistant", "content": "4 metres."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide",
            "description": "Height of the tide",
            "parameters": {"type": "object", "properties": {"port": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return vocabulary_of(tmp_path_factory.mktemp("chatml"), CHATML)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return vocabulary_of(tmp_path_factory.mktemp("qwen"), templates.QWEN_3)


# --- the same text as transformers --------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (templates.LLAMA_3, {"messages": [PIRATE, *PLAIN]}),
        (templates.LLAMA_3, {"messages": CALLING, "tools": TOOLS}),
        (templates.QWEN_3, {"messages": [PIRATE, *PLAIN], "tools": TOOLS}),
        (templates.QWEN_3, {"messages": CALLING, "tools": TOOLS}),
        (templates.QWEN_3, {"messages": THINKING}),
        (templates.GEMMA, {"messages": [*PLAIN, *PLAIN]}),
        (templates.PHI_3, {"messages": [PIRATE, *PLAIN, *PLAIN]}),
        (templates.PARTS, {"messages": PLAIN}),
        ("{{ documents[0].text }}" + CHATML, {"messages": PLAIN, "documents": [{"text": "Low."}]}),
        (
            "{% if not quiet %}!{% endif %}" + CHATML,
            {"messages": PLAIN, "chat_template_kwargs": {"quiet": True}},
        ),
    ],
)
def test_the_text_is_the_one_that_transformers_renders(
    template: str, row: dict[str, Any], tmp_path: Path
):
    vocabulary = vocabulary_of(tmp_path / "v", template)
    options = {name: value for name, value in row.items() if name in ("tools", "documents")}
    options |= row.get("chat_template_kwargs", {})
    expected = theirs(tmp_path / "v", row["messages"], **options)
    *_, last = read_documents(lines(tmp_path / "a.jsonl", row), vocabulary)
    text = vocabulary.decode(last.ids.tolist())
    # An answer that is a document of its own ends with its turn, without the line break after it.
    assert expected.startswith(text)
    assert expected[len(text) :] in ("", "\n")
    assert read_stream(tmp_path / "a.jsonl", vocabulary).tolist() == vocabulary.encode(expected)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_reach_the_template_by_each_of_their_names(
    field: str, qwen: Vocabulary, tmp_path: Path
):
    messages = [QUESTION, {"role": "assistant", "content": "4 m.", field: "Spring tide."}]
    [document] = read_documents(lines(tmp_path / "a.jsonl", {"messages": messages}), qwen)
    assert learned(document, qwen) == ["<think>\nSpring tide.\n</think>\n\n4 m.<|im_end|>"]
    assert qwen.decode(document.ids.tolist()) == theirs(qwen.folder, messages)


@pytest.fixture(autouse=True)
def _warnings_alone() -> None:
    """A command that another test ran in this process shows how many rows were read, too."""
    logging.getLogger("mistill.text.row_counts").setLevel(logging.NOTSET)


def test_calls_are_learned_and_what_a_tool_answers_is_not(qwen: Vocabulary, tmp_path: Path):
    call, answer = read_documents(
        lines(tmp_path / "a.jsonl", {"messages": CALLING, "tools": TOOLS}), qwen
    )
    assert learned(call, qwen) == [
        '<think>\n\n</think>\n\n\n<tool_call>\n{"name": "tide", "arguments": {"port": "Brest"}}\n'
        "</tool_call><|im_end|>"
    ]
    assert learned(answer, qwen) == ["<think>\n\n</think>\n\n4.1 metres.<|im_end|>"]


def test_a_null_is_as_if_it_were_not_there(tmp_path: Path):
    """Tables that join two data sets have a null for every key that only the other uses."""
    template = CHATML.replace(
        "+ message['content']",
        "+ (message.name if message.name is defined else '') + message.content",
    )
    vocabulary = vocabulary_of(tmp_path / "v", template)
    messages = [{**turn, "name": None, "tool_calls": None} for turn in PLAIN]
    [text] = texts_of(lines(tmp_path / "a.jsonl", {"messages": messages}), vocabulary)
    assert text == theirs(tmp_path / "v", messages)
    assert "None" not in text


def test_nulls_inside_a_table_are_left_out_of_tools_and_calls(qwen: Vocabulary, tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    other = {"type": "function", "function": {"name": "wind", "arguments": {"knots": 3}}}
    rows = [
        {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in (CALL, other)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = texts_of(tmp_path / "a.parquet", qwen)
    assert '{"name": "tide", "arguments": {"port": "Brest"}}' in first
    assert '{"name": "wind", "arguments": {"knots": 3}}' in second


def test_special_tokens_are_handed_over_by_every_name(tmp_path: Path):
    folder = tiny_tokenizer(tmp_path / "v")
    names = {
        "mask_token": "<|im_end|>",
        "image_token": "<unk>",
        "extra_special_tokens": {"opening_token": "<|im_start|>"},
        "sep_token": None,
    }
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | names))
    wanted = ("opening_token", "mask_token", "image_token", "sep_token", "bos_token", "pad_token")
    template = "".join("{{ %s }}" % name for name in wanted) + CHATML  # noqa: UP031
    (folder / "chat_template.jinja").write_text(template)
    text = load_vocabulary(folder).render(PLAIN)
    assert text == theirs(folder, PLAIN)
    assert text.startswith("<|im_start|><|im_end|><unk><s></s><|im_start|>user")


ADDED = {"1": {"content": "<s>", "special": True}}


@pytest.mark.parametrize(
    ("stated", "older"),
    [
        ({"tokenizer_class": "Qwen2Tokenizer"}, None),
        ({"tokenizer_class": "GPT2TokenizerFast", "unk_token": None}, None),
        ({"bos_token": "</s>"}, {"bos_token": "<s>"}),
        ({"bos_token": None}, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}),
        ({"eos_token": "</s>", "added_tokens_decoder": ADDED}, {"bos_token": "<s>"}),
    ],
)
def test_special_tokens_are_named_by_the_file_that_transformers_believes(
    stated: dict[str, Any], older: dict[str, Any] | None, tmp_path: Path
):
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
    template = "|".join("{{ %s }}" % name for name in names)  # noqa: UP031
    folder = made.put_template(tiny_tokenizer(tmp_path / "v"), template)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **stated}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if older is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(older))
    assert load_vocabulary(folder).render(PLAIN) == theirs(folder, PLAIN)


def test_a_template_for_tools_renders_the_rows_that_have_some(tmp_path: Path):
    folder = tiny_tokenizer(tmp_path / "v")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}" + CHATML)
    vocabulary = load_vocabulary(folder)
    for tools in (None, TOOLS):
        assert vocabulary.render(PLAIN, tools=tools) == theirs(folder, PLAIN, tools=tools)


# --- columns beside the turns -------------------------------------------------------------------


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": PLAIN},
        {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Arr."}]},
        {"instruction": "Where?", "output": "Arr."},
        {"question": "Where?", "answer": "Arr."},
        {"prompt": [QUESTION], "completion": PLAIN[1:]},
    ],
)
def test_a_system_prompt_beside_the_turns_is_the_first_turn(
    column: str, row: dict[str, Any], chatml: Vocabulary, tmp_path: Path
):
    file = lines(tmp_path / "a.jsonl", {**row, column: PIRATE["content"]})
    [text] = texts_of(file, chatml)
    assert text.startswith("<|im_start|>system\nSpeak like a pirate.<|im_end|>\n<|im_start|>user")
    assert text.count("pirate") == 1
    [prompt] = read_prompts(file)
    assert prompt[0] == PIRATE


def test_two_system_prompts_that_differ_are_refused(chatml: Vocabulary, tmp_path: Path):
    same, other = (
        {"system": text, "messages": [PIRATE, *PLAIN]} for text in (PIRATE["content"], "No")
    )
    [text] = texts_of(lines(tmp_path / "a.jsonl", same), chatml)
    assert text.count("pirate") == 1
    message = refusal(lines(tmp_path / "b.jsonl", other), chatml)
    assert "line 1 has a system prompt in its turns and another in the column system" in message


@pytest.mark.parametrize("question", ["instruction", "question", "prompt"])
@pytest.mark.parametrize("column", ["input", "context"])
def test_the_passage_that_a_question_is_about_follows_it(
    question: str, column: str, chatml: Vocabulary, tmp_path: Path
):
    row = {question: "Who keeps it?", column: "Ines keeps it.", "response": "Ines."}
    [text] = texts_of(lines(tmp_path / "a.jsonl", row), chatml)
    assert "Who keeps it?\n\nInes keeps it.<|im_end|>" in text


@pytest.mark.parametrize(
    "history",
    [
        [["In summer?", "Warm."]],
        [{"role": "user", "content": "In summer?"}, {"role": "assistant", "content": "Warm."}],
    ],
)
def test_a_history_becomes_earlier_turns(history: Any, chatml: Vocabulary, tmp_path: Path):
    row = {"instruction": "In winter?", "input": "", "output": "Cold.", "history": history}
    [document] = read_documents(lines(tmp_path / "a.jsonl", {**row, "system": "Brief."}), chatml)
    assert chatml.decode(document.ids.tolist()) == (
        "<|im_start|>system\nBrief.<|im_end|>\n"
        "<|im_start|>user\nIn summer?<|im_end|>\n<|im_start|>assistant\nWarm.<|im_end|>\n"
        "<|im_start|>user\nIn winter?<|im_end|>\n<|im_start|>assistant\nCold.<|im_end|>\n"
    )
    assert learned(document, chatml) == ["Warm.<|im_end|>", "Cold.<|im_end|>"]


def test_tools_may_stand_as_json_in_a_text(qwen: Vocabulary, tmp_path: Path):
    kinds = (TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])])
    rows = [{"messages": PLAIN, "tools": tools} for tools in kinds]
    first, *others = texts_of(lines(tmp_path / "a.jsonl", *rows), qwen)
    assert "Height of the tide" in first
    assert others == [first, first]


def test_a_column_that_is_left_out_is_named(
    chatml: Vocabulary, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = [
        {"messages": PLAIN, "id": 1, "source": "web", "knowledge": "Low tide.", "rejected": None},
        {"messages": PLAIN, "id": 2, "category": "sea", "knowledge": ""},
        {"messages": PLAIN, "tools": TOOLS},
    ]
    assert len(texts_of(lines(tmp_path / "a.jsonl", *rows), chatml)) == 3
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(": ")[2] for line in said] == [
        "the column knowledge is left out, in 1 of 3 rows",
        "the chat template does not write the tools of 1 of 3 rows",
    ]


def test_prompts_keep_their_tools(tmp_path: Path):
    file = lines(tmp_path / "a.jsonl", {"prompt": "How high?", "tools": TOOLS})
    [talk] = read_prompt_conversations(file)
    assert talk.tools == TOOLS
    with pytest.raises(TextError, match="has tools"):
        read_prompts(file)


# --- shapes -------------------------------------------------------------------------------------

WIND = [{"role": "user", "content": "Name a wind."}, {"role": "assistant", "content": "The bora."}]
PARTS = [
    {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in WIND
]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": WIND[:1], "completion": WIND[1:]},
        {"prompt": WIND[:1], "completion": "The bora."},
        {"prompt": "Name a wind.", "completion": WIND[1:]},
        {"messages": PARTS},
        {"conversations": {"from": ["human", "gpt"], "value": ["Name a wind.", "The bora."]}},
        {"messages": {"role": ["user", "assistant"], "content": ["Name a wind.", "The bora."]}},
        {
            "conversations": [
                {"role": None, "content": None, "from": "human", "value": "Name a wind."},
                {"role": None, "content": None, "from": "gpt", "value": "The bora."},
            ]
        },
        {"messages": json.dumps(WIND)},
        {"conversation": [{"input": "Name a wind.", "output": "The bora."}]},
        {"messages": [{"role": " User", "content": "Name a wind."}, WIND[1]]},
    ],
)
def test_one_conversation_in_many_shapes_is_one_text(
    row: dict[str, Any], chatml: Vocabulary, tmp_path: Path
):
    [expected] = texts_of(lines(tmp_path / "a.jsonl", {"messages": WIND}), chatml)
    assert texts_of(lines(tmp_path / "b.jsonl", row), chatml) == [expected]


def test_parts_are_given_to_a_template_that_writes_parts(tmp_path: Path):
    vocabulary = vocabulary_of(tmp_path / "v", templates.PARTS)
    text = [{"type": "text", "text": " Name "}, {"type": "text", "text": "a wind."}]
    messages = [{"role": "user", "content": text}, WIND[1]]
    [document] = read_documents(lines(tmp_path / "a.jsonl", {"messages": messages}), vocabulary)
    assert vocabulary.decode(document.ids.tolist()) == theirs(tmp_path / "v", messages)
    assert learned(document, vocabulary) == ["The bora.<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of the type 'image'"),
        ({"messages": [{**WIND[0], "images": ["a.png"]}, WIND[1]]}, "turn 1 of .* holds images"),
        ({"messages": WIND, "image": "a.png"}, "line 1 holds image, and mistill reads text only"),
        ({"messages": {"a": [1], "b": [1, 2]}}, "should be a list of turns, not an object"),
        ({"messages": '[{"role": "user"'}, "conversation of .* line 1 is not valid JSON"),
        ({"messages": ["Name a wind.", "The bora."]}, "should be an object .*, not text"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"has the role \['user'\]"),
        (
            {"messages": [{"from": "function_call", "value": "{}"}]},
            "write a call of a tool",
        ),
        ({"messages": [WIND[0], {"role": "assistant", "tool_calls": 5}]}, "tool_calls of turn 2"),
        ({"question": "a", "context": ["b"], "answer": "c"}, "context of .* should be text, not a"),
        ({"messages": WIND, "tools": "none"}, "tools of .* line 1 is not valid JSON"),
        ({"messages": WIND, "tools": [1]}, "tools of .* line 1 should be a list of objects"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history of .* should be a list"),
        ({"messages": None}, "messages of .* line 1 is null; mistill reads"),
        ({"messages": [{**WIND[0], "content": "\ud83d?"}, WIND[1]]}, "line 1 holds half of a char"),
        ({"text": "\udcb2."}, r"line 1 holds half of a character, U\+DCB2"),
    ],
)
def test_a_shape_that_is_not_read_is_named(
    row: dict[str, Any], message: str, chatml: Vocabulary, tmp_path: Path
):
    with pytest.raises(TextError, match=message) as refused:
        list(read_documents(lines(tmp_path / "a.jsonl", row), chatml))
    assert "\n" not in str(refused.value)


def test_a_whole_emoji_is_no_half_of_one(chatml: Vocabulary, tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "Whole: \\ud83d\\ude00."}\n')
    assert texts_of(file, chatml) == ["Whole: \U0001f600."]


# --- turns that are not to be learned -----------------------------------------------------------


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"train": False}, {"training": False}, {"loss": 0}, {"masked": True}],
)
def test_a_turn_that_is_marked_as_not_to_be_learned_is_not(
    mark: dict[str, Any], chatml: Vocabulary, tmp_path: Path
):
    messages = [*WIND[:1], {**WIND[1], **mark}, *WIND]
    file = lines(tmp_path / "a.jsonl", {"messages": messages})
    [document] = read_documents(file, chatml)
    assert chatml.decode(document.ids.tolist()) == theirs(chatml.folder, messages)
    assert learned(document, chatml) == ["The bora.<|im_end|>"]
    assert document.mask[: len(document.mask) // 2].sum() == 0


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"mask": 0}, {"weight": None}])
def test_a_turn_that_is_marked_as_to_be_learned_is(
    mark: dict[str, Any], chatml: Vocabulary, tmp_path: Path
):
    file = lines(tmp_path / "a.jsonl", {"messages": [WIND[0], {**WIND[1], **mark}]})
    [document] = read_documents(file, chatml)
    assert learned(document, chatml) == ["The bora.<|im_end|>"]


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"train": "no"}, {"train_detail": [{"a": 1}]}])
def test_a_mark_that_is_not_yes_or_no_is_refused(
    mark: dict[str, Any], chatml: Vocabulary, tmp_path: Path
):
    message = refusal(
        lines(tmp_path / "a.jsonl", {"messages": [WIND[0], {**WIND[1], **mark}]}), chatml
    )
    assert "a turn whole or not at all" in message


def test_what_a_prompt_lets_the_assistant_say_is_not_learned(chatml: Vocabulary, tmp_path: Path):
    row = {"prompt": [*WIND, WIND[0]], "completion": WIND[1:]}
    [document] = read_documents(lines(tmp_path / "a.jsonl", row), chatml)
    assert learned(document, chatml) == ["The bora.<|im_end|>"]


# --- what a template leaves out -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (templates.PHI_3, CALLING, "refuses this conversation"),
        (
            templates.PHI_3,
            [QUESTION, *WIND[1:], {"role": "tool", "content": "4.1 m"}, PLAIN[1]],
            "does not write turn 3, of the role tool",
        ),
        (
            "{% set messages = messages[1:] %}" + templates.PHI_3,
            [PIRATE, *PLAIN],
            "does not write turn 1, of the role system",
        ),
        (templates.PHI_3, THINKING, "does not write the reasoning_content of turn 2"),
        (
            templates.PHI_3,
            [QUESTION, {"role": "assistant", "content": "Look.", "tool_calls": [CALL]}],
            "does not write the tool_calls of turn 2",
        ),
        (CHATML, CALLING, "refuses this conversation"),
        (templates.GEMMA, [PIRATE, *PLAIN], "System role not supported"),
    ],
)
def test_what_a_template_does_not_write_is_refused(
    template: str, messages: Any, message: str, tmp_path: Path
):
    vocabulary = vocabulary_of(tmp_path / "v", template)
    with pytest.raises(TextError, match=message) as refused:
        list(read_documents(lines(tmp_path / "a.jsonl", {"messages": messages}), vocabulary))
    assert "line 1" in str(refused.value)
    assert "\n" not in str(refused.value)


# --- thoughts -----------------------------------------------------------------------------------

ASKED = {"role": "user", "content": "1 + 1?"}


def reply(content: str) -> list[dict[str, str]]:
    return [ASKED, {"role": "assistant", "content": content}]


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (templates.CUTS_THOUGHTS, "<think>\nSo.\n</think>\n\n2", "<think>\nSo.\n</think>\n\n2"),
        (templates.CUTS_THOUGHTS, "2", "2"),
        (templates.OPENS_THOUGHTS, "So.\n</think>\n\n2", "So.\n</think>\n\n2"),
        (templates.OPENS_THOUGHTS, "<think>\nSo.\n</think>\n\n2", "So.\n</think>\n\n2"),
        (templates.OPENS_THOUGHTS, "<think>\nSo and", "So and"),
        (templates.QWEN_3, "<think>So.</think>2", "<think>\nSo.\n</think>\n\n2"),
    ],
)
def test_thoughts_are_learned_after_the_prompt_that_is_in_use(
    template: str, content: str, expected: str, tmp_path: Path
):
    vocabulary = vocabulary_of(tmp_path / "v", template)
    [document] = read_documents(
        lines(tmp_path / "a.jsonl", {"messages": reply(content)}), vocabulary
    )
    prompt = vocabulary.render([ASKED], add_generation_prompt=True)
    text = vocabulary.decode(document.ids.tolist())
    assert text.removesuffix("\n") == f"{prompt}{expected}<|im_end|>"
    assert learned(document, vocabulary) == [f"{expected}<|im_end|>"]


def test_an_answer_that_does_not_close_its_thoughts_is_told_how(tmp_path: Path):
    vocabulary = vocabulary_of(tmp_path / "v", templates.OPENS_THOUGHTS)
    message = refusal(lines(tmp_path / "a.jsonl", {"messages": reply("2")}), vocabulary)
    assert "line 1: the prompt of the chat template opens" in message
    assert "write it as thoughts</think>answer" in message


# --- where an answer ends -----------------------------------------------------------------------


@pytest.mark.parametrize("content", ["end", "i", "|>", "m", "\n<", "assistant", "d"])
def test_an_answer_whose_letters_are_in_its_end_is_learned_up_to_it(
    content: str, chatml: Vocabulary, tmp_path: Path
):
    messages = [ASKED, {"role": "assistant", "content": content}]
    [document] = read_documents(lines(tmp_path / "a.jsonl", {"messages": messages}), chatml)
    assert learned(document, chatml) == [f"{content}<|im_end|>"]


def test_a_template_without_an_end_is_warned_of_and_its_line_breaks_are_not_learned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    vocabulary = vocabulary_of(tmp_path / "v", templates.ENDLESS)
    file = lines(tmp_path / "a.jsonl", {"messages": [*WIND, *WIND]})
    [document] = read_documents(file, vocabulary)
    assert learned(document, vocabulary) == ["The bora.", "The bora."]
    assert f"the chat template of {tmp_path / 'v'} ends no answer" in caplog.text
    caplog.clear()
    list(read_documents(file, vocabulary_of(tmp_path / "w", CHATML)))
    assert not caplog.records


def test_plain_text_gets_the_tokens_that_its_tokenizer_states_once(tmp_path: Path):
    folder = tiny_tokenizer(tmp_path / "v")
    config = folder / "tokenizer_config.json"
    stated = {"add_bos_token": True, "add_eos_token": True, "eos_token": "</s>"}
    config.write_text(json.dumps(json.loads(config.read_text()) | stated))
    vocabulary = load_vocabulary(folder)
    rows = [{"text": text} for text in ("Hello.", "<s>Hello.", "Hello.</s>", "<s>Hello.</s>")]
    file = lines(tmp_path / "a.jsonl", *rows)
    for document in read_documents(file, vocabulary):
        assert vocabulary.decode(document.ids.tolist()) == "<s>Hello.</s>"
        assert document.mask.tolist() == [False] + [True] * (len(document.ids) - 1)
    one = lines(tmp_path / "b.jsonl", rows[3])
    assert vocabulary.decode(read_stream(one, vocabulary).tolist()) == "<s>Hello.</s>"


def test_tokens_of_plain_text_are_those_of_transformers(tmp_path: Path):
    from transformers import AutoTokenizer

    folder = tiny_tokenizer(tmp_path / "v")
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text("utf-8"))
    names = {"<s>": 1, "</s>": 2}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]} for name, number in names.items()
        },
    }
    file.write_text(json.dumps(definition))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "</s>"}))
    [document] = read_documents(
        lines(tmp_path / "a.jsonl", {"text": "Hello."}), load_vocabulary(folder)
    )
    assert document.ids.tolist() == AutoTokenizer.from_pretrained(folder)("Hello.")["input_ids"]


def test_a_long_file_in_pieces_ends_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mistill.text.rows.DOCUMENT_CHARACTERS", 10)
    folder = tiny_tokenizer(tmp_path / "v")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_eos_token": True}))
    file = tmp_path / "a.txt"
    file.write_text("\ufeffOne line and\nanother one.\nAnd a third.\n", "utf-8")
    pieces = texts_of(file, load_vocabulary(folder))
    assert pieces == ["One line and\n", "another one.\n", "And a third.\n<|im_end|>"]


# --- rows that are passed over ------------------------------------------------------------------

BAD_ROWS: list[Any] = [
    {"messages": WIND},
    {"messages": [*WIND, WIND[0]]},
    {"messages": []},
    {"messages": None},
    '{"messages": ',
    [1],
    {"messages": [WIND[1], *WIND]},
    {"text": "\ud83d"},
    {"instruction": "a", "output": ""},
    {"messages": [{**WIND[0], "content": [{"type": "image"}]}, WIND[1]]},
    {"messages": WIND},
]


def test_bad_rows_are_passed_over_where_that_is_asked_for(
    chatml: Vocabulary, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = lines(tmp_path / "a.jsonl", *BAD_ROWS)
    documents = list(read_documents(file, chatml, skip_bad_rows=True))
    assert [learned(document, chatml) for document in documents] == [["The bora.<|im_end|>"]] * 2
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{file}: 11 rows read, 0 cut, 9 passed over: ")
    assert "the conversation of the row ends with the user's turn" in said
    assert all(f"(line {number})" in said for number in (2, 3, 4, 5, 6, 7, 8, 9, 10))
    with pytest.raises(TextError, match="line 2"):
        list(read_documents(file, chatml))


def test_many_rows_of_one_reason_are_counted(
    chatml: Vocabulary, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = [{"instruction": "a", "output": ""}] * 9 + [{"text": ""}, {"text": "b " * 40}]
    list(read_documents(lines(tmp_path / "a.jsonl", *rows), chatml, skip_bad_rows=True))
    [said] = [record.getMessage() for record in caplog.records]
    assert "10 passed over: the conversation of the row has an empty turn" in said
    assert "(line 1, line 2, line 3, line 4, line 5 and 4 more); the row holds no text" in said


def test_the_summary_counts_documents_that_are_cut(
    chatml: Vocabulary, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    file = lines(tmp_path / "a.jsonl", *({"text": "word " * n} for n in (1, 30, 40, 2)))
    list(read_documents(file, chatml, block_length=20))
    assert f"{file}: 4 rows read, 2 cut, 0 passed over" in caplog.text
    caplog.clear()
    list(read_documents(file, chatml, limit=10))
    assert "2 rows read, 1 cut, 0 passed over" in caplog.text


def test_texts_of_bad_rows_alone_are_refused_with_the_reasons(chatml: Vocabulary, tmp_path: Path):
    file = lines(tmp_path / "a.jsonl", *BAD_ROWS[1:6])
    with pytest.raises(TextError, match=r"there is no text in .*; passed over: .*ends with the us"):
        read_documents(file, chatml, skip_bad_rows=True)


def test_bad_prompts_are_passed_over_too(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = lines(tmp_path / "a.jsonl", {"prompt": "One?"}, {"prompt": "\ud83d"}, {"a": 1})
    assert read_prompts(file, skip_bad_rows=True) == [[{"role": "user", "content": "One?"}]]
    assert "3 rows read, 0 cut, 2 passed over" in caplog.text
    with pytest.raises(TextError, match="line 2 holds half of a character"):
        read_prompts(file)
