"""Text and conversations in, token blocks and masks out: the only reader of text in the project.

A name becomes rows, rows become documents of token ids, and documents are packed into blocks. A
mask marks what a model shall learn to predict: in plain text every token but the first, in a
conversation what the assistant says and the token with which it ends its turn. Few chat templates
mark that themselves, so it is found by rendering the conversation up to each turn and comparing.
The whole conversation is turned into tokens once: pieces turned into tokens one by one would meet
at boundaries that the model never sees.

Local lines are read here, since ``datasets`` takes a text that looks like a date for a date and
stops at a column that first appears after ten megabytes. Parquet files and the Hub are read
through ``datasets``, as streams: nothing is copied into a cache.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistill.errors import TextError, missing_extra
from mistill.settings import require
from mistill.text.vocabulary import Message, Vocabulary

Texts = str | Path | Sequence[str | Path]

SHIPPED = {
    "@demo-train": "demo-train.jsonl",
    "@demo-held-out": "demo-held-out.jsonl",
    "@demo-prompts": "demo-prompts.txt",
}

_DATA = Path(__file__).parent.parent / "data"
_FILES = (".txt", ".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[^:/]*){0,2}")

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

# Characters of a .txt file that are turned into tokens at once.
_PIECE = 2_000_000
# Characters of a prompt that tell where the turn after it begins.
_SEAM = 16


@dataclass(frozen=True)
class Document:
    """One text or one conversation.

    Attributes:
        ids: Token ids, int64, shape (T,).
        mask: Bool, shape (T,), True where the token is to be predicted from those before it.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class TokenBlocks:
    """Documents packed into blocks of one length, N blocks of T positions.

    The logits at position t predict the token at t + 1; ``kept`` says at which positions that
    counts. To keep documents apart inside a transformers model, give it ``position_ids``, no
    attention mask, and ``use_cache=False``: with a cache it would let them see one another.

    Attributes:
        ids: Token ids, int64, shape (N, T); 0 where there is no document.
        mask: Bool, shape (N, T), True where the token is to be predicted.
        documents: Number of the document at each position, int32, shape (N, T); -1 for none.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    documents: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: slice | NDArray[np.int64] | Sequence[int]) -> TokenBlocks:
        return TokenBlocks(self.ids[which], self.mask[which], self.documents[which])

    @property
    def block_length(self) -> int:
        """Positions in a block, T."""
        return int(self.ids.shape[1])

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Positions whose logits count, bool, shape (N, T); never the last of a document."""
        kept = np.zeros_like(self.mask)
        same = self.documents[:, 1:] == self.documents[:, :-1]
        kept[:, :-1] = self.mask[:, 1:] & same & (self.documents[:, 1:] >= 0)
        return kept

    @property
    def position_ids(self) -> NDArray[np.int64]:
        """Positions counted from 0 in every document, int64, shape (N, T)."""
        places = np.broadcast_to(np.arange(self.block_length), self.ids.shape)
        begins = np.ones(self.ids.shape, bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)

    @property
    def runs(self) -> NDArray[np.int64]:
        """Where each run of one document, or of padding, lies in its block, in row-major order.

        Shape (R, 3): the block, the first column, the column after the last.
        """
        begins = np.ones(self.documents.shape, bool)
        begins[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=self.documents.size)
        rows, columns = np.divmod(starts, self.block_length)
        return np.stack([rows, columns, columns + lengths], axis=1)

    @property
    def tokens(self) -> int:
        """Tokens in all documents, padding left out."""
        return int((self.documents >= 0).sum())


# --- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One record of a source, and where it stands, for messages to the user."""

    value: Mapping[str, Any]
    place: str


def check_texts(texts: Texts) -> None:
    """Refuse texts that are missing, empty or of an unknown kind, reading their first row only.

    Args:
        texts: What ``read_documents`` would be given.

    Raises:
        TextError: If one of them cannot be read.
    """
    for source in _sources(texts):
        _first_row(source)


def _sources(texts: Texts) -> list[str]:
    sources = [texts] if isinstance(texts, str | Path) else list(texts)
    if not sources:
        raise TextError("no text was given; name a .txt, .jsonl or .parquet file or a Hub dataset")
    return [str(source) for source in sources]


def _first_row(source: str) -> Iterator[_Row]:
    """The rows of a source, the first of which has been read, so that what is missing shows."""
    rows = _rows(source)
    first = next(rows, None)
    if first is None:
        raise TextError(f"{source} holds no text")
    return itertools.chain([first], rows)


def _rows(source: str) -> Iterator[_Row]:
    path = _find(source)
    if path is None:
        return _hub_rows(source)
    readers = {
        ".txt": _txt_rows,
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
    }
    return readers[path.suffix.lower()](path)


def _find(source: str) -> Path | None:
    """The file that a source names, or None for a dataset on the Hub."""
    if source.startswith("@"):
        if source not in SHIPPED:
            raise TextError(f"there is no shipped text {source}; there are {', '.join(SHIPPED)}")
        return _DATA / SHIPPED[source]
    path = Path(source).expanduser()
    known = f"{', '.join(_FILES[:-1])} and {_FILES[-1]}"
    if path.is_dir():
        raise TextError(f"{source} is a folder; name the {known} files in it")
    if path.is_file():
        if path.suffix.lower() not in _FILES:
            raise TextError(f"{source} ends in {path.suffix or 'nothing'}; mistill reads {known}")
        return path
    if path.suffix.lower() in _FILES or not _HUB_ID.fullmatch(source):
        raise TextError(
            f"there is no file {source}; give a {known.replace(' and ', ' or ')} file, a Hub "
            f"dataset such as owner/name:config:split, or one of {', '.join(SHIPPED)}"
        )
    return None


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as opened:
            yield from opened
    except UnicodeDecodeError as error:
        problem = f"{error.reason} at byte {error.start}"
        raise TextError(f"{path} is not UTF-8 text: {problem}") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from error


def _txt_rows(path: Path) -> Iterator[_Row]:
    """A file is one document; a very long one is cut where a line ends, every 2 million letters."""
    lines: list[str] = []
    size = 0
    for line in _lines(path):
        lines.append(line)
        size += len(line)
        if size >= _PIECE:
            yield _Row({"text": "".join(lines)}, str(path))
            lines, size = [], 0
    if lines:
        yield _Row({"text": "".join(lines)}, str(path))


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield _Row(_object(_parse(line, place), place), place)


def _json_rows(path: Path) -> Iterator[_Row]:
    value = _parse("".join(_lines(path)) or "[]", str(path))
    if not isinstance(value, list):
        raise TextError(f"{path} should hold a list of objects, not {_kind(value)}")
    for number, item in enumerate(value, 1):
        place = f"{path}, item {number}"
        yield _Row(_object(item, place), place)


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TextError(f"{place} is not valid JSON: {error}") from error


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TextError(f"{place} should hold a JSON object, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list"}
    if value is None:
        return "null"
    return names.get(type(value), f"a {type(value).__name__}")


def _parquet_rows(path: Path) -> Iterator[_Row]:
    # Brackets and stars in a file's own name are no pattern.
    file = glob.escape(str(path))
    with TemporaryDirectory() as cache:  # for a lock that datasets leaves behind
        yield from _dataset_rows(
            str(path), "parquet", data_files=file, split="train", cache_dir=cache
        )


def _hub_rows(source: str) -> Iterator[_Row]:
    """Rows of ``owner/name``, ``owner/name:config`` or ``owner/name:config:split``."""
    name, config, split = (*source.split(":"), "", "")[:3]
    return _dataset_rows(source, name, config or None, split=split or "train")


def _dataset_rows(source: str, *arguments: str | None, **options: str) -> Iterator[_Row]:
    if find_spec("datasets") is None:
        raise missing_extra("datasets", "compress")
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(*arguments, **options, streaming=True)
        for number, row in enumerate(rows, 1):
            yield _Row(row, f"{source}, row {number}")
    except TextError:
        raise
    except DatasetNotFoundError as error:
        raise TextError(
            f"there is no file {source}, and no dataset of that name on the Hub; log in with: hf "
            "auth login if it is private or gated"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise TextError(
            f"there is no file {source}, and the Hub cannot be reached; connect to the network, "
            f"or use {next(iter(SHIPPED))}, which needs none"
        ) from error
    except Exception as error:  # datasets raises whatever its readers raise
        raise TextError(f"{source} cannot be read: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- what a row holds ---------------------------------------------------------------------------


def _content(row: _Row) -> str | list[Message]:
    """The text or the conversation of a row, whatever its columns are called."""
    value = row.value
    for column in ("messages", "conversations", "conversation"):
        if value.get(column) is not None:
            return _conversation(value[column], row.place)
    for question, answers in _ANSWERS.items():
        answer = next((name for name in answers if value.get(name) is not None), None)
        if value.get(question) is not None and answer is not None:
            said = _string(value[answer], f"{answer} of {row.place}")
            asked = _question(row, question)
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    if "text" in value:
        return _string(value["text"] or "", f"text of {row.place}")
    found = ", ".join(sorted(map(str, value))) or "none"
    raise TextError(f"{row.place} has the columns {found}; mistill reads {_ACCEPTED}")


def _question(row: _Row, column: str) -> str:
    """A prompt, or an instruction with the input that it speaks of."""
    question = _string(row.value[column], f"{column} of {row.place}")
    given = row.value.get("input") if column == "instruction" else None
    return f"{question}\n\n{_string(given, f'input of {row.place}')}" if given else question


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TextError(f"the {name} should be text, not {_kind(value)}")
    return value


def _conversation(value: Any, place: str) -> list[Message]:
    """Turns as role and content, from the spelling of OpenAI or of ShareGPT."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise TextError(f"the conversation of {place} should be a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        where = f"turn {number} of {place}"
        if not isinstance(turn, Mapping):
            raise TextError(f"{where} should be an object with role and content")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in _ROLES:
            raise TextError(f"{where} has the role {role!r}; mistill reads {', '.join(_ROLES)}")
        messages.append({"role": _ROLES[role], "content": _string(content, f"content of {where}")})
    return messages


def _check_turns(messages: Sequence[Message], place: str) -> None:
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if not spoken or spoken[0] != "user":
        raise TextError(f"the conversation of {place} should begin with the user's turn")
    if spoken[-1] != "assistant":
        raise TextError(
            f"the conversation of {place} ends with the user's turn; the assistant's should be last"
        )
    if any(not message["content"].strip() for message in messages if message["role"] != "system"):
        raise TextError(f"the conversation of {place} has an empty turn")


# --- documents ----------------------------------------------------------------------------------


def read_documents(
    texts: Texts, vocabulary: Vocabulary, *, limit: int | None = None
) -> Iterator[Document]:
    """Turn texts into token ids and masks, in their order.

    A .txt file is one document (a very long one becomes several, of 2 million letters each): a
    line or a paragraph of it rarely stands alone, and a model asked to predict it without what
    came before would be asked for more than a reader is. Every row of another source is one.

    What is missing, empty or of an unknown kind is refused at once; a row further down is refused
    when it is reached.

    Args:
        texts: A .txt, .jsonl, .json or .parquet file, a Hub dataset (``owner/name``, or
            ``owner/name:config:split``), a shipped text such as ``@demo-train``, or several.
        vocabulary: What the text is written in.
        limit: Stop after this many tokens, cutting the last document there; None reads all.

    Returns:
        An iterator over documents.

    Raises:
        TextError: If a text is missing, malformed, empty, or of an unknown kind.
        VocabularyError: If there are conversations and no chat template.
    """
    require(limit is None or limit > 0, f"limit must be above 0 tokens, not {limit}")
    sources = _sources(texts)
    opened = [_first_row(source) for source in sources]
    documents = _documents(itertools.chain.from_iterable(opened), vocabulary)
    first = next(documents, None)
    if first is None:
        raise TextError(f"there is no text in {', '.join(sources)}")
    return _limited(itertools.chain([first], documents), limit)


def read_stream(texts: Texts, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """All texts as one run of tokens, as those read them who quote perplexities.

    A .txt file is taken as it is. Rows of other sources are joined by an empty line, as the rows of
    WikiText are by the authors of GPTQ and those after them; conversations are written out by the
    chat template. The whole is turned into tokens at once, and begins with the token for the
    beginning where the tokenizer writes one.

    Args:
        texts: As for ``read_documents``.
        vocabulary: What the text is written in.

    Returns:
        Token ids, shape (T,).

    Raises:
        TextError: If a text is missing, malformed, empty, or of an unknown kind.
        VocabularyError: If there are conversations and no chat template.
    """
    whole = []
    for source in _sources(texts):
        path = _find(source)
        joint = "" if path is not None and path.suffix.lower() == ".txt" else "\n\n"
        contents = map(_content, _first_row(source))
        whole.append(
            joint.join(
                content if isinstance(content, str) else vocabulary.render(content)
                for content in contents
            )
        )
    ids = vocabulary.encode("\n\n".join(whole))
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


def _documents(rows: Iterator[_Row], vocabulary: Vocabulary) -> Iterator[Document]:
    for row in rows:
        content = _content(row)
        if isinstance(content, str):
            if content.strip():
                yield _plain(content, vocabulary)
            continue
        _check_turns(content, row.place)
        try:
            yield from conversation_documents(content, vocabulary)
        except TextError as error:
            raise TextError(f"{row.place}: {error}") from error


def _plain(text: str, vocabulary: Vocabulary) -> Document:
    ids = vocabulary.encode(text)
    if vocabulary.adds_bos and vocabulary.bos_id is not None:
        ids = [vocabulary.bos_id, *ids]
    mask = np.ones(len(ids), bool)
    mask[:1] = False
    return Document(np.array(ids, np.int64), mask)


def conversation_documents(messages: Sequence[Message], vocabulary: Vocabulary) -> list[Document]:
    """Turn a conversation into tokens, and mark those that the assistant writes.

    An assistant's tokens run from where the template would ask it to begin up to the token that
    ends its turn, which it writes too; a line break that the template puts after that is not its
    own. Usually the whole conversation is one document. Some templates write a turn differently
    once it is not the last: Mistral's move the system prompt to the last question, others drop
    the thoughts of earlier answers. Then every answer becomes a document of its own, so that it
    is learned after just what precedes it in use.

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
    """The text before the last turn, and what the assistant writes in it up to its end."""
    prompt = vocabulary.render(messages[:-1], add_generation_prompt=True)
    turn = vocabulary.render(messages)
    content = messages[-1]["content"].strip()
    place = turn.rfind(content)
    if turn.startswith(prompt):
        begin = len(prompt)
    elif place < 0:
        raise TextError("the chat template does not write the assistant's turn as it is")
    else:
        begin = _seam(prompt, turn, place)
    spoken = max(place, begin) + len(content) if place >= 0 else begin
    return prompt, turn[begin : _end_of_turn(turn, spoken, vocabulary)]


def _seam(prompt: str, turn: str, place: int) -> int:
    """Where the answer begins in a turn whose start differs from the prompt: after its last words.

    Usually that is at the content, or at a space before it.
    """
    for begin in range(place, max(place - _SEAM, 0), -1):
        if turn[:begin].endswith(prompt[-_SEAM:]):
            return begin
    raise TextError("the chat template writes the prompt of an answer in two different ways")


def _end_of_turn(turn: str, spoken: int, vocabulary: Vocabulary) -> int:
    """Where the first token that ends a reply ends, or else the text."""
    ends = [vocabulary.token_bytes(token).decode() for token in vocabulary.end_ids]
    places = [(turn.find(end, spoken), end) for end in ends]
    found = min(((place, end) for place, end in places if place >= 0), default=None)
    return len(turn) if found is None else found[0] + len(found[1])


def _masked(text: str, spans: Sequence[tuple[int, int]], vocabulary: Vocabulary) -> Document:
    """A document in which the tokens that begin inside one of the spans are to be predicted.

    A token that begins before a span and reaches into it does not count: in use the prompt ends
    where the span begins, so the model never writes it.
    """
    ids, starts = vocabulary.encode_spans(text)
    mask = np.zeros(len(ids), bool)
    for begin, end in spans:
        mask |= (starts >= begin) & (starts < end)
    mask[:1] = False
    return Document(ids, mask)


# --- prompts ------------------------------------------------------------------------------------


def read_prompts(prompts: Texts) -> list[list[Message]]:
    """Read what a teacher shall answer.

    Args:
        prompts: A .txt file with a prompt on each line, or rows with ``prompt``, ``instruction``
            (and ``input``), ``question``, or a conversation, whose last answer is left out.

    Returns:
        Conversations that end with the user's turn, in their order.

    Raises:
        TextError: If there are none, or one cannot be read.
    """
    found: list[list[Message]] = []
    for source in _sources(prompts):
        path = _find(source)
        if path is not None and path.suffix.lower() == ".txt":
            lines = (line.strip() for line in _lines(path))
            found += [[{"role": "user", "content": line}] for line in lines if line]
        else:
            found += [_prompt(row) for row in _first_row(source)]
    if not found:
        raise TextError(f"there are no prompts in {', '.join(_sources(prompts))}")
    return found


def _prompt(row: _Row) -> list[Message]:
    for column in ("messages", "conversations", "conversation"):
        if row.value.get(column) is not None:
            messages = _conversation(row.value[column], row.place)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            _check_turns([*messages, {"role": "assistant", "content": "?"}], row.place)
            return messages
    for column in ("prompt", "instruction", "question"):
        if row.value.get(column) is not None:
            return [{"role": "user", "content": _question(row, column)}]
    found = ", ".join(sorted(map(str, row.value))) or "none"
    raise TextError(
        f"{row.place} has the columns {found}; prompts are read from prompt, instruction (and "
        "input), question, messages or conversations"
    )


# --- packing ------------------------------------------------------------------------------------


def pack(documents: Iterable[Document], block_length: int) -> TokenBlocks:
    """Lay documents side by side in blocks of one length.

    A document that fits into a block is never split, since its end would be learned without its
    beginning: it goes into the fullest block with room for it, or a new one (best fit; Ding et
    al., 2024, https://arxiv.org/abs/2404.10830). A longer one is cut every ``block_length``
    tokens. Blocks are in the order in which they were begun.

    Args:
        documents: Documents in their order.
        block_length: Positions in a block, T; at least 2.

    Returns:
        Blocks in which the first token of every piece is masked: nothing before it tells it.

    Raises:
        TextError: If there are no documents.
    """
    require(block_length >= 2, f"block_length must be at least 2, not {block_length}")
    placed: list[tuple[int, int, int, Document, int]] = []  # block, column, number, document, start
    rooms: list[deque[int]] = [deque() for _ in range(block_length + 1)]  # blocks by room left
    open_rooms = 0  # bit r is set where a block has r positions left
    blocks = 0
    for number, document in enumerate(documents):
        for start in range(0, len(document.ids), block_length):
            length = min(block_length, len(document.ids) - start)
            large_enough = open_rooms >> length << length
            room = (large_enough & -large_enough).bit_length() - 1
            if large_enough:
                block = rooms[room].popleft()
                if not rooms[room]:
                    open_rooms ^= 1 << room
            else:
                block, room, blocks = blocks, block_length, blocks + 1
            placed.append((block, block_length - room, number, document, start))
            left = room - length
            if left:
                rooms[left].append(block)
                open_rooms |= 1 << left
    if not placed:
        raise TextError("there is no text to pack")
    packed = TokenBlocks(
        ids=np.zeros((blocks, block_length), np.int64),
        mask=np.zeros((blocks, block_length), bool),
        documents=np.full((blocks, block_length), -1, np.int32),
    )
    for block, column, number, document, start in placed:
        piece = slice(start, start + block_length)
        ids = document.ids[piece]
        place = (block, slice(column, column + len(ids)))
        packed.ids[place] = ids
        packed.mask[place] = document.mask[piece]
        packed.mask[block, column] = False
        packed.documents[place] = number
    return packed
