"""Text and conversations in, token blocks and masks out: the only reader of text in the project.

The name of a text gives rows, rows give documents of token ids, and documents are packed into
blocks. A mask marks the tokens that a model learns to predict: in plain text all but the first, in
a conversation those of the assistant and the token that ends its turn. Few chat templates mark
them, so that they are found by rendering the conversation up to each turn. The whole conversation
is tokenized at once, because tokens of separate parts would differ at their boundaries.

Local files are read here, because ``datasets`` takes a text that looks like a date for a date, and
stops at a column that first appears after ten megabytes. Parquet files and the Hub are streamed
through ``datasets``, without a copy in a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.errors import TextError
from mistill.settings import require
from mistill.text.blocks import Document
from mistill.text.rows import Row, Texts, find_file, first_row, json_type, read_lines, sources_of
from mistill.text.vocabulary import Message, Vocabulary

_ACCEPTED = (
    "messages, conversations, prompt with response or completion, instruction (and input) with "
    "output or response, or text"
)
_ANSWERS = {"prompt": ("response", "completion"), "instruction": ("output", "response")}
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

# Number of last characters of a prompt that locate the reply in a rendered turn.
_SEAM = 16


# --- what a row holds ---------------------------------------------------------------------------


def _content(row: Row) -> str | list[Message]:
    """The text or the conversation of a row, whatever its columns are called."""
    value = row.value
    for column in ("messages", "conversations", "conversation"):
        if value.get(column) is not None:
            return _conversation(value[column], row.origin)
    for question, answers in _ANSWERS.items():
        answer = next((name for name in answers if value.get(name) is not None), None)
        if value.get(question) is not None and answer is not None:
            reply = _string(value[answer], f"{answer} of {row.origin}")
            prompt = _question(row, question)
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    if "text" in value:
        return _string(value["text"] or "", f"text of {row.origin}")
    columns = ", ".join(sorted(map(str, value))) or "none"
    raise TextError(f"{row.origin} has the columns {columns}; mistill reads {_ACCEPTED}")


def _question(row: Row, column: str) -> str:
    """A prompt, or an instruction with its input."""
    question = _string(row.value[column], f"{column} of {row.origin}")
    context = row.value.get("input") if column == "instruction" else None
    return f"{question}\n\n{_string(context, f'input of {row.origin}')}" if context else question


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TextError(f"the {name} should be text, not {json_type(value)}")
    return value


def _conversation(value: Any, origin: str) -> list[Message]:
    """Turns as role and content, from the spelling of OpenAI or of ShareGPT."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise TextError(f"the conversation of {origin} should be a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        turn_origin = f"turn {number} of {origin}"
        if not isinstance(turn, Mapping):
            raise TextError(f"{turn_origin} should be an object with role and content")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in _ROLES:
            raise TextError(
                f"{turn_origin} has the role {role!r}; mistill reads {', '.join(_ROLES)}"
            )
        messages.append(
            {"role": _ROLES[role], "content": _string(content, f"content of {turn_origin}")}
        )
    return messages


def _check_turns(messages: Sequence[Message], origin: str) -> None:
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles or roles[0] != "user":
        raise TextError(f"the conversation of {origin} should begin with the user's turn")
    if roles[-1] != "assistant":
        raise TextError(
            f"the conversation of {origin} ends with the user's turn; the assistant's should be "
            "last"
        )
    if any(not message["content"].strip() for message in messages if message["role"] != "system"):
        raise TextError(f"the conversation of {origin} has an empty turn")


# --- documents ----------------------------------------------------------------------------------


def read_documents(
    texts: Texts, vocabulary: Vocabulary, *, limit: int | None = None
) -> Iterator[Document]:
    """Turn texts into token ids and masks, in their order.

    A .txt file is one document, because its paragraphs need their context; a very long file is
    split every 2 million characters. Every row of another source is a document.

    Missing, empty and unknown texts are refused at once, a malformed row when it is reached.

    Args:
        texts: A .txt, .jsonl, .json or .parquet file, a Hub dataset (``owner/name``, or
            ``owner/name:config:split``), a shipped text such as ``@demo-train``, or several.
        vocabulary: Vocabulary that turns the text into tokens.
        limit: Stop after this many tokens, cutting the last document there; None reads all.

    Returns:
        An iterator over documents.

    Raises:
        TextError: If a text is missing, malformed, empty, or of an unknown kind.
        VocabularyError: If there are conversations and no chat template.
    """
    require(limit is None or limit > 0, f"limit must be above 0 tokens, not {limit}")
    sources = sources_of(texts)
    opened = [first_row(source) for source in sources]
    documents = _documents(itertools.chain.from_iterable(opened), vocabulary)
    first = next(documents, None)
    if first is None:
        raise TextError(f"there is no text in {', '.join(sources)}")
    return _limited(itertools.chain([first], documents), limit)


def read_stream(texts: Texts, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """All texts as one sequence of tokens, as papers measure perplexity.

    A .txt file is taken as it is. Rows of other sources are joined by an empty line, as the authors
    of GPTQ join the rows of WikiText; conversations are rendered by the chat template. The sequence
    is tokenized at once, and begins with the BOS token if the tokenizer adds one.

    Args:
        texts: As for ``read_documents``.
        vocabulary: Vocabulary that turns the text into tokens.

    Returns:
        Token ids, shape (T,).

    Raises:
        TextError: If a text is missing, malformed, empty, or of an unknown kind.
        VocabularyError: If there are conversations and no chat template.
    """
    source_texts = []
    for source in sources_of(texts):
        path = find_file(source)
        joint = "" if path is not None and path.suffix.lower() == ".txt" else "\n\n"
        contents = map(_content, first_row(source))
        source_texts.append(
            joint.join(
                content if isinstance(content, str) else vocabulary.render(content)
                for content in contents
            )
        )
    ids = vocabulary.encode("\n\n".join(source_texts))
    begin = [vocabulary.bos_id] if vocabulary.adds_bos and vocabulary.bos_id is not None else []
    return np.array([*begin, *ids], np.int64)


def _limited(documents: Iterator[Document], limit: int | None) -> Iterator[Document]:
    if limit is None:
        yield from documents
        return
    left = limit
    for document in documents:
        yield Document(document.ids[:left], document.mask[:left])
        left -= len(document.ids)
        if left <= 0:
            return


def _documents(rows: Iterator[Row], vocabulary: Vocabulary) -> Iterator[Document]:
    for row in rows:
        content = _content(row)
        if isinstance(content, str):
            if content.strip():
                yield _plain(content, vocabulary)
            continue
        _check_turns(content, row.origin)
        try:
            yield from conversation_documents(content, vocabulary)
        except TextError as error:
            raise TextError(f"{row.origin}: {error}") from error


def _plain(text: str, vocabulary: Vocabulary) -> Document:
    ids = vocabulary.encode(text)
    if vocabulary.adds_bos and vocabulary.bos_id is not None:
        ids = [vocabulary.bos_id, *ids]
    mask = np.ones(len(ids), bool)
    mask[:1] = False
    return Document(np.array(ids, np.int64), mask)


def conversation_documents(messages: Sequence[Message], vocabulary: Vocabulary) -> list[Document]:
    """Turn a conversation into tokens, and mark those that the assistant writes.

    The assistant's tokens run from the end of the generation prompt to the token that ends the
    turn, inclusive; a line break that the template writes after that does not count. Usually the
    whole conversation is one document. Some templates render a turn differently if it is not the
    last: Mistral's move the system prompt to the last question, others drop the reasoning of
    earlier replies. Then every reply becomes a document of its own, so that it is learned after
    exactly the prompt that precedes it in use.

    Args:
        messages: Turns that begin with the user or the system and end with the assistant.
        vocabulary: With a chat template.

    Returns:
        One document, or one for each turn of the assistant.

    Raises:
        TextError: If the template refuses the conversation, or hides the answer.
        VocabularyError: If there is no chat template.
    """
    whole = vocabulary.render(messages)
    turns = [
        _prompt_and_answer(messages[: number + 1], vocabulary)
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if all(whole.startswith(prompt + answer) for prompt, answer in turns):
        spans = [(len(prompt), len(prompt) + len(answer)) for prompt, answer in turns]
        return [_masked(whole, spans, vocabulary)]
    return [
        _masked(prompt + answer, [(len(prompt), len(prompt) + len(answer))], vocabulary)
        for prompt, answer in turns
    ]


def _prompt_and_answer(messages: Sequence[Message], vocabulary: Vocabulary) -> tuple[str, str]:
    """The prompt of the last turn, and the reply with the token that ends it."""
    prompt = vocabulary.render(messages[:-1], add_generation_prompt=True)
    turn = vocabulary.render(messages)
    content = messages[-1]["content"].strip()
    position = turn.rfind(content)
    if turn.startswith(prompt):
        begin = len(prompt)
    elif position < 0:
        raise TextError(
            "the chat template changes the text of the assistant's turn, so that it cannot be "
            "marked"
        )
    else:
        begin = _seam(prompt, turn, position)
    content_end = max(position, begin) + len(content) if position >= 0 else begin
    return prompt, turn[begin : _end_of_turn(turn, content_end, vocabulary)]


def _seam(prompt: str, turn: str, position: int) -> int:
    """Where the reply begins in a turn whose start differs from the prompt.

    That is after the last characters of the prompt, usually at the content or a space before it.
    """
    for begin in range(position, max(position - _SEAM, 0), -1):
        if turn[:begin].endswith(prompt[-_SEAM:]):
            return begin
    raise TextError(
        "the chat template renders the same prompt in two ways, so that the reply cannot be marked"
    )


def _end_of_turn(turn: str, start: int, vocabulary: Vocabulary) -> int:
    """The end of the first token that ends a reply; the end of the text if there is none."""
    ends = [vocabulary.token_bytes(token).decode() for token in vocabulary.end_ids]
    positions = [(turn.find(end, start), end) for end in ends]
    first = min(((position, end) for position, end in positions if position >= 0), default=None)
    return len(turn) if first is None else first[0] + len(first[1])


def _masked(text: str, spans: Sequence[tuple[int, int]], vocabulary: Vocabulary) -> Document:
    """A document whose mask marks the tokens that begin inside one of the spans.

    A token that begins before a span and reaches into it does not count, because the prompt ends
    where the span begins, so that the model never writes it.
    """
    ids, starts = vocabulary.encode_spans(text)
    mask = np.zeros(len(ids), bool)
    for begin, end in spans:
        mask |= (starts >= begin) & (starts < end)
    mask[:1] = False
    return Document(ids, mask)


# --- prompts ------------------------------------------------------------------------------------


def read_prompts(prompts: Texts) -> list[list[Message]]:
    """Read the prompts that a teacher answers.

    Args:
        prompts: A .txt file with a prompt on each line, or rows with ``prompt``, ``instruction``
            (and ``input``), ``question``, or a conversation, whose last answer is left out.

    Returns:
        Conversations that end with the user's turn, in their order.

    Raises:
        TextError: If there are none, or one cannot be read.
    """
    conversations: list[list[Message]] = []
    for source in sources_of(prompts):
        path = find_file(source)
        if path is not None and path.suffix.lower() == ".txt":
            lines = (line.strip() for line in read_lines(path))
            conversations += [[{"role": "user", "content": line}] for line in lines if line]
        else:
            conversations += [_prompt(row) for row in first_row(source)]
    if not conversations:
        raise TextError(f"there are no prompts in {', '.join(sources_of(prompts))}")
    return conversations


def _prompt(row: Row) -> list[Message]:
    for column in ("messages", "conversations", "conversation"):
        if row.value.get(column) is not None:
            messages = _conversation(row.value[column], row.origin)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            _check_turns([*messages, {"role": "assistant", "content": "?"}], row.origin)
            return messages
    for column in ("prompt", "instruction", "question"):
        if row.value.get(column) is not None:
            return [{"role": "user", "content": _question(row, column)}]
    columns = ", ".join(sorted(map(str, row.value))) or "none"
    raise TextError(
        f"{row.origin} has the columns {columns}; prompts are read from prompt, instruction (and "
        "input), question, messages or conversations"
    )


# --- packing ------------------------------------------------------------------------------------
