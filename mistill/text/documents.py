"""Text and conversations in, token blocks and masks out: the only reader of text in the project.

The name of a text gives rows, rows give documents of token ids, and documents are packed into
blocks. A mask marks the tokens that a model learns to predict: in plain text all but the first, in
a conversation those of the assistant and the token that ends its turn. What cannot be read is
refused by file and line, or passed over and counted where that is asked for.

Local files are read here, because ``datasets`` takes a text that looks like a date for a date,
stops at a column that first appears after ten megabytes, and asks a server. The Hub is streamed
through ``datasets``, without a copy in a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mistill.errors import TextError
from mistill.settings import require
from mistill.text.answers import conversation_documents, in_template_form, refuse_unwritten
from mistill.text.blocks import Document
from mistill.text.conversation import Conversation, check_turns
from mistill.text.row_content import check_characters, content_of_row, prompt_of_row
from mistill.text.row_counts import NO_TEXT, RowCounts
from mistill.text.rows import (
    Row,
    Texts,
    find_file,
    first_row,
    read_lines,
    sources_of,
    suffix_of,
)
from mistill.text.typed_marks import encode_conversation, with_typed_marks_hidden
from mistill.text.vocabulary import Message, Vocabulary


def read_documents(
    texts: Texts,
    vocabulary: Vocabulary,
    *,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    block_length: int | None = None,
    counts: RowCounts | None = None,
) -> Iterator[Document]:
    """Turn texts into token ids and masks, in their order.

    A .txt file is one document, because its paragraphs need their context; a very long file is
    split every 2 million characters. Every row of another source is a document.

    Missing, empty and unknown texts are refused at once, a malformed row when it is reached. At
    the end one line is logged: how many rows were read, cut and passed over, and why.

    Args:
        texts: A .txt, .jsonl, .json, .csv or .parquet file, a Hub dataset (``owner/name``, or
            ``owner/name:config:split``), a shipped text such as ``@demo-train``, or several; or
            in memory a list of strings, of rows or of conversations, or a ``datasets.Dataset``.
        vocabulary: Vocabulary that turns the text into tokens.
        limit: Stop after this many tokens, cutting the last document there; None reads all.
        skip_bad_rows: Whether a row that cannot be read is passed over and counted, instead of
            refused.
        block_length: Where the caller cuts longer documents, to count them; None counts none.
        counts: Filled with what the summary says, for a caller that keeps it.

    Returns:
        An iterator over documents.

    Raises:
        TextError: If a text is missing, malformed, empty, or of an unknown kind.
        VocabularyError: If there are conversations and no chat template.
    """
    require(limit is None or limit > 0, f"limit must be above 0 tokens, not {limit}")
    sources = sources_of(texts)
    opened = [first_row(source) for source in sources]
    counts = RowCounts(sources) if counts is None else counts
    documents = _documents(itertools.chain.from_iterable(opened), vocabulary, counts, skip_bad_rows)
    first = next(documents, None)
    if first is None:
        raise counts.nothing_read("there is no text")
    return _counted(itertools.chain([first], documents), limit, block_length, counts, vocabulary)


def read_stream(
    texts: Texts, vocabulary: Vocabulary, *, skip_bad_rows: bool = False
) -> NDArray[np.int64]:
    """All texts as one sequence of tokens, as papers measure perplexity.

    A .txt file is taken as it is. Rows of other sources are joined by an empty line, as the authors
    of GPTQ join the rows of WikiText; conversations are rendered by the chat template. The sequence
    is tokenized at once, and begins with the BOS token if the tokenizer adds one.

    Args:
        texts: As for ``read_documents``.
        vocabulary: Vocabulary that turns the text into tokens.
        skip_bad_rows: Whether a row that cannot be read is passed over and counted.

    Returns:
        Token ids, shape (T,).

    Raises:
        TextError: If a text is missing, malformed, empty, or of an unknown kind.
        VocabularyError: If there are conversations and no chat template.
    """
    source_texts = []
    hidden = False
    counts = RowCounts(sources_of(texts))
    for source in sources_of(texts):
        path = find_file(source)
        joint = "" if path is not None and suffix_of(path) == ".txt" else "\n\n"
        rows = counts.records(first_row(source), skip=skip_bad_rows)
        rendered = [_rendered(row, vocabulary, counts) for row in rows]
        hidden = hidden or any(typed for _, typed in rendered)
        source_texts.append(joint.join(text for text, _ in rendered))
    counts.tell("")
    text = "\n\n".join(source_texts)
    ids = encode_conversation(text, vocabulary, hidden=hidden).ids.tolist()
    return np.array(_begun_and_ended(ids, vocabulary, ends=True), np.int64)


def _counted(
    documents: Iterator[Document],
    limit: int | None,
    block_length: int | None,
    counts: RowCounts,
    vocabulary: Vocabulary,
) -> Iterator[Document]:
    """The documents up to a limit of tokens, and then the summary."""
    left = limit
    for document in documents:
        short = document
        if left is not None:
            short = Document(document.ids[:left], document.mask[:left])
            left -= len(document.ids)
        most = len(short.ids) if block_length is None else min(len(short.ids), block_length)
        counts.cut += most < len(document.ids)
        yield short
        if left is not None and left <= 0:
            break
    counts.tell(
        f"the chat template of {vocabulary.folder} ends no answer with a token at which replies "
        "end, so that a model does not learn from it to stop"
    )


def _documents(
    rows: Iterator[Row], vocabulary: Vocabulary, counts: RowCounts, skip: bool
) -> Iterator[Document]:
    for row in counts.records(rows, skip=skip):
        documents: Iterable[Document] = ()
        with counts.passing_over(row, skip=skip):
            documents = _documents_of_row(row, vocabulary, counts)
        yield from documents


def _documents_of_row(row: Row, vocabulary: Vocabulary, counts: RowCounts) -> list[Document]:
    content = content_of_row(row)
    talk = content.says
    if isinstance(talk, str):
        check_characters(talk, row.origin)
        counts.unread.update(content.unread)
        if talk.strip():
            return [_plain(talk, vocabulary, row.ends)]
        counts.pass_over(row, NO_TEXT)
        return []
    check_turns(talk, row.origin)
    try:
        documents = conversation_documents(talk, vocabulary)
    except TextError as error:
        raise TextError(f"{row.origin}: {error}") from error
    if not documents:
        counts.pass_over(row, "no turn of the row is to be learned")
    counts.unread.update(content.unread)
    counts.unwritten.update(_unwritten_columns(talk, vocabulary))
    learned = [document for document in documents if document.mask.any()]
    counts.answers += bool(learned)
    counts.endings += any(
        np.isin(document.ids[document.mask], vocabulary.end_ids).any() for document in learned
    )
    return documents


def _unwritten_columns(talk: Conversation, vocabulary: Vocabulary) -> list[str]:
    """Which of tools and documents a template leaves out."""
    joined = talk.joined()
    without = {
        "tools": None if talk.tools is None else replace(joined, tools=None),
        "documents": None if talk.documents is None else replace(joined, documents=None),
    }
    return [
        name
        for name, other in without.items()
        if other is not None and _render(other, vocabulary) == _render(joined, vocabulary)
    ]


def _render(talk: Conversation, vocabulary: Vocabulary) -> str | TextError:
    try:
        return talk.render(vocabulary)
    except TextError as error:
        return error


def _plain(text: str, vocabulary: Vocabulary, ends: bool) -> Document:
    ids = _begun_and_ended(vocabulary.encode(text), vocabulary, ends)
    mask = np.ones(len(ids), bool)
    mask[:1] = False
    return Document(np.array(ids, np.int64), mask)


def _begun_and_ended(ids: list[int], vocabulary: Vocabulary, ends: bool) -> list[int]:
    """Plain text with the tokens that its tokenizer adds, unless it brings them itself."""
    begin, end = vocabulary.bos_id, vocabulary.eos_id
    if vocabulary.adds_bos and begin is not None and ids[:1] != [begin]:
        ids = [begin, *ids]
    if ends and vocabulary.adds_eos and end is not None and ids[-1:] != [end]:
        ids = [*ids, end]
    return ids


def _rendered(row: Row, vocabulary: Vocabulary, counts: RowCounts) -> tuple[str, bool]:
    """The text of a row, as one text of perplexity is made of, and whether marks in it hide."""
    content = content_of_row(row)
    counts.unread.update(content.unread)
    if isinstance(content.says, str):
        return content.says, False
    typed = in_template_form(content.says, vocabulary)
    try:
        talk = with_typed_marks_hidden(typed, vocabulary)
        text = talk.render(vocabulary)
        refuse_unwritten(talk, vocabulary)
    except TextError as error:
        raise TextError(f"{row.origin}: {error}") from error
    counts.unwritten.update(_unwritten_columns(talk, vocabulary))
    return text, talk is not typed


# --- prompts ------------------------------------------------------------------------------------


def read_prompts(prompts: Texts, *, skip_bad_rows: bool = False) -> list[list[Message]]:
    """Read the prompts that a teacher answers, as turns alone.

    Args:
        prompts: A .txt file with a prompt on each line, or rows with ``prompt``, ``instruction``
            (and ``input``), ``question``, or a conversation, whose last answer is left out.
        skip_bad_rows: Whether a row that cannot be read is passed over and counted.

    Returns:
        Turns that end with the user's, in their order.

    Raises:
        TextError: If there are none, or one cannot be read or has tools or documents, for which
            there is ``read_prompt_conversations``.
    """
    conversations = read_prompt_conversations(prompts, skip_bad_rows=skip_bad_rows)
    for talk in conversations:
        if talk.tools or talk.documents or talk.variables:
            raise TextError(
                "a prompt has tools, documents or variables of the chat template beside its turns; "
                "read it by read_prompt_conversations"
            )
    return [list(talk.messages) for talk in conversations]


def read_prompt_conversations(prompts: Texts, *, skip_bad_rows: bool = False) -> list[Conversation]:
    """Read the prompts that a teacher answers, with all that stands beside their turns.

    Args:
        prompts: As for ``read_prompts``.
        skip_bad_rows: Whether a row that cannot be read is passed over and counted.

    Returns:
        Conversations that end with the turn of the user or of a tool, in their order.

    Raises:
        TextError: If there are none, or one cannot be read.
    """
    counts = RowCounts(sources_of(prompts))
    conversations: list[Conversation] = []
    for source in sources_of(prompts):
        path = find_file(source)
        if path is not None and suffix_of(path) == ".txt":
            lines = [line.strip() for line in read_lines(path)]
            texts = [line for line in lines if line]
            counts.rows += len(texts)
            conversations += [Conversation(({"role": "user", "content": text},)) for text in texts]
            continue
        for row in counts.records(first_row(source), skip=skip_bad_rows):
            with counts.passing_over(row, skip=skip_bad_rows):
                content = prompt_of_row(row)
                counts.unread.update(content.unread)
                assert isinstance(content.says, Conversation), "a prompt is a conversation"
                conversations.append(content.says.joined())
    if not conversations:
        raise counts.nothing_read("there are no prompts")
    if counts.passed_over or counts.unread:
        counts.tell("")
    return conversations
