"""Rows of text from files, from the texts that mistill ships, and from the Hub."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from mistill.errors import TextError, missing_extra
from mistill.folders.json_text import parse_json
from mistill.shown import one_line
from mistill.sources.hub import hub_answers
from mistill.text.memory import (
    TextInMemory,
    dataset_in_memory,
    is_dataset,
    list_in_memory,
    refused,
)


class Dataset(Protocol):
    """A split of the library ``datasets``."""

    features: Any

    def __iter__(self) -> Iterator[Any]:
        """Read the rows from the first on."""


InMemory = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A text, a row, or the messages of a conversation."""

Texts = str | Path | Dataset | Sequence[str | Path | Dataset | InMemory]


SHIPPED = {
    "@demo-train": "demo-train.jsonl",
    "@demo-held-out": "demo-held-out.jsonl",
    "@demo-plain": "demo-plain.jsonl",
    "@demo-prompts": "demo-prompts.txt",
}


_DATA = Path(__file__).parent.parent / "data"


_FILES = (".txt", ".jsonl", ".json", ".csv", ".parquet")

# What any of them but Parquet, which compresses by itself, may be packed with.
_PACKED = (".gz", ".zst")


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[^:/]*){0,2}")


# Size at which a long .txt file is split into documents.
DOCUMENT_CHARACTERS = 2_000_000

# Characters of one line.
_LONGEST_LINE = 1 << 28

# Rows of a Parquet file that are in memory at once.
_BATCH_ROWS = 256


@dataclass(frozen=True)
class Row:
    """One record of a source.

    Attributes:
        value: Its columns.
        origin: File and line, for messages.
        problem: Why it is no record; None if it is one.
        ends: Whether its text ends here; False where a long file goes on in the next row.
    """

    value: Mapping[str, Any]
    origin: str
    problem: TextError | None = None
    ends: bool = True


def check_texts(texts: Texts, *, skip_bad_rows: bool = False) -> None:
    """Refuse texts that are missing, empty or of an unknown kind, reading their first row only.

    Args:
        texts: Texts as ``read_documents`` takes them.
        skip_bad_rows: Whether a row that is no record is passed over.

    Raises:
        TextError: If one of them cannot be read.
    """
    for source in sources_of(texts):
        row = next(first_row(source))
        if row.problem is not None and not skip_bad_rows:
            raise row.problem


def sources_of(texts: Texts) -> list[str]:
    """The names of the texts, one or several; those in memory have their rows with them.

    Args:
        texts: Texts as ``read_documents`` takes them.

    Returns:
        Names.

    Raises:
        TextError: If there is none, or something else.
    """
    if isinstance(texts, str | Path) or is_dataset(texts):
        texts = cast(Sequence[Any], [texts])
    if not isinstance(texts, Sequence):
        raise refused(texts)
    if not texts:
        raise TextError("no text was given; name a .txt, .jsonl or .parquet file or a Hub dataset")
    sources: list[str] = []
    for named, items in itertools.groupby(texts, lambda item: _is_name(item) or is_dataset(item)):
        if not named:
            sources.append(list_in_memory(list(items)))
            continue
        for item in items:
            if isinstance(item, TextInMemory):
                sources.append(item)
            else:
                sources.append(dataset_in_memory(item) if is_dataset(item) else str(item))
    return sources


def _is_name(item: Any) -> bool:
    """Whether an item of a list names a text; a string with several words that names none is one.

    A name with a known ending is one even if there is no such file, so that it can be said.
    """
    if not isinstance(item, str):
        return isinstance(item, Path)
    if isinstance(item, TextInMemory) or not any(letter.isspace() for letter in item):
        return True
    last = item.rpartition(".")[2].lower()
    if f".{last}" in (*_FILES, *_PACKED):
        return True
    try:
        return Path(item).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, or no name at all
        return False


def first_row(source: str) -> Iterator[Row]:
    """The rows of a source; the first is read at once, so that a missing source is an error now."""
    rows = read_rows(source)
    first = next(rows, None)
    if first is None:
        raise TextError(f"{source} holds no text")
    return itertools.chain([first], rows)


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a file, of a text that mistill ships, or of a dataset on the Hub."""
    if isinstance(source, TextInMemory):
        return _rows_in_memory(source)
    path = find_file(source)
    if path is None:
        return _hub_rows(source)
    readers = {
        ".txt": _txt_rows,
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    return readers[_kind_of(path)](path)


def _rows_in_memory(source: TextInMemory) -> Iterator[Row]:
    for number, value in enumerate(source.rows, 1):
        origin = f"{source}, row {number}"
        if source.tabular and isinstance(value, Mapping):
            yield Row(_of_table(value), origin)
        else:
            yield _record(value, origin)


def suffix_of(path: Path) -> str:
    """The ending that says what a file holds, without that of its compression.

    Args:
        path: The file.

    Returns:
        Such as ``.jsonl``, in small letters.
    """
    unpacked = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    suffix = unpacked.suffix.lower()
    return path.suffix.lower() if suffix == ".parquet" else suffix


def _kind_of(path: Path) -> str:
    """The ending that a file should have: some call JSON lines .json, or a list .jsonl."""
    suffix = suffix_of(path)
    if suffix not in (".json", ".jsonl"):
        return suffix
    lines = (line for line in read_lines(path) if line.strip())
    first, second = next(lines, "").strip(), next(lines, None)
    if suffix == ".jsonl" and first.startswith("["):
        raise TextError(f"{path} holds one JSON list and not an object on each line; name it .json")
    if suffix == ".json" and second is not None and first.startswith("{"):
        try:
            parse_json(first, str(path), TextError)
        except TextError:
            return suffix  # an object over several lines
        return ".jsonl"
    return suffix


def find_file(source: str) -> Path | None:
    """The file that a source names, or None for a dataset on the Hub or a text in memory."""
    if isinstance(source, TextInMemory):
        return None
    if source.startswith("@"):
        if source not in SHIPPED:
            raise TextError(f"mistill ships no text {source}; it ships {', '.join(SHIPPED)}")
        return _DATA / SHIPPED[source]
    path = Path(source).expanduser()
    kinds = f"{', '.join(_FILES[:-1])} and {_FILES[-1]}"
    if path.is_dir():
        raise TextError(f"{source} is a folder; name the {kinds} files in it")
    if path.is_file():
        if suffix_of(path) not in _FILES:
            raise TextError(
                f"{source} ends in {path.suffix or 'nothing'}; mistill reads {kinds}, and all but "
                "the last packed as .gz or .zst too"
            )
        return path
    if path.suffix.lower() in (*_FILES, *_PACKED) or not _HUB_ID.fullmatch(source):
        raise TextError(
            f"there is no file {source}; give a {kinds.replace(' and ', ' or ')} file, a Hub "
            f"dataset such as owner/name:config:split, or one of {', '.join(SHIPPED)}"
        )
    return None


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file, unpacked if need be; a file that is not UTF-8 text is refused."""
    try:
        with _opened(path) as opened:
            # An unpacked line has no bound: a few bytes may stand for gigabytes.
            while line := opened.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise TextError(f"{path} has a line of {_LONGEST_LINE:,} characters or more")
                yield line
    except UnicodeDecodeError as error:
        problem = f"{error.reason} at byte {error.start}; save it as UTF-8"
        raise TextError(f"{path} is not UTF-8 text: {problem}") from error
    except (EOFError, zlib.error) as error:
        raise TextError(f"{path} is damaged: {_reason(error)}") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror or _reason(error)}") from error


def _opened(path: Path) -> io.TextIOWrapper:
    # utf-8-sig, because a mark of the byte order is no text.
    packed = path.suffix.lower()
    if packed == ".gz":
        return io.TextIOWrapper(cast(Any, gzip.open(path)), encoding="utf-8-sig")
    if packed == ".zst":
        if find_spec("pyarrow") is None:
            raise missing_extra("pyarrow", "compress")
        from pyarrow import input_stream

        return io.TextIOWrapper(input_stream(str(path), compression="zstd"), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _csv_rows(path: Path) -> Iterator[Row]:
    """A header that names the columns, then a record a row."""
    csv.field_size_limit(_LONGEST_LINE)
    reader = csv.reader(read_lines(path), strict=True)
    try:
        names = next(reader, [])
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise TextError(f"{path} has the column {twice[0]!r:.80} twice")
        for values in reader:
            if not values:
                continue
            origin = f"{path}, line {reader.line_num}"
            problem = None
            if len(values) != len(names):
                problem = TextError(
                    f"{origin} has {len(values)} fields and the first line {len(names)}"
                )
            yield Row(dict(zip(names, values, strict=False)), origin, problem)
    except csv.Error as error:
        raise TextError(f"{path}, line {reader.line_num}, is no CSV: {error}") from error


def _txt_rows(path: Path) -> Iterator[Row]:
    """A file is one document; a long one is split at a line end every 2 million characters."""
    lines: list[str] = []
    size = 0
    for line in read_lines(path):
        if size >= DOCUMENT_CHARACTERS:
            yield Row({"text": "".join(lines)}, str(path), ends=False)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield Row({"text": "".join(lines)}, str(path))


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            origin = f"{path}, line {number}"
            try:
                value = parse_json(line, origin, TextError)
            except TextError as error:
                yield Row({}, origin, error)
            else:
                yield _record(value, origin)


def _json_rows(path: Path) -> Iterator[Row]:
    value = parse_json(_all_of(path) or "[]", str(path), TextError)
    if not isinstance(value, list):
        raise TextError(f"{path} should hold a list of objects, not {json_type(value)}")
    for number, item in enumerate(value, 1):
        yield _record(item, f"{path}, item {number}")


def _all_of(path: Path) -> str:
    """A whole file, if it holds no more characters than one line may."""
    parts, size = [], 0
    for line in read_lines(path):
        size += len(line)
        if size >= _LONGEST_LINE:
            raise TextError(f"{path} has more than {_LONGEST_LINE:,} characters; give JSON lines")
        parts.append(line)
    return "".join(parts)


def _record(value: Any, origin: str) -> Row:
    if isinstance(value, Mapping):
        return Row(value, origin)
    problem = TextError(f"{origin} should hold a JSON object, not {json_type(value)}")
    return Row({}, origin, problem)


def json_type(value: Any) -> str:
    """The type of a JSON value, as an error message names it."""
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list"}
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        keys = ", ".join(str(key) for key in itertools.islice(value, 5))
        return f"an object with the keys {keys:.80}" if keys else "an empty object"
    return names.get(type(value), f"a {type(value).__name__}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    # By pyarrow itself: datasets counts each use of its readers at a server.
    if find_spec("pyarrow") is None:
        raise missing_extra("pyarrow", "compress")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_BATCH_ROWS)
            values = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, value in enumerate(values, 1):
                yield Row(_of_table(value), f"{path}, row {number}")
    except (ArrowException, OSError, ValueError) as error:
        raise TextError(f"{path} cannot be read: {_reason(error)}") from error


def _of_table(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table, whose nested records have a null for every key that only others use."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def _hub_rows(source: str) -> Iterator[Row]:
    """Rows of ``owner/name``, ``owner/name:config`` or ``owner/name:config:split``."""
    name, config, split = (*source.split(":"), "", "")[:3]
    return _dataset_rows(source, name, config or None, split=split or "train")


def _dataset_rows(source: str, *arguments: str | None, **options: str) -> Iterator[Row]:
    if find_spec("datasets") is None:
        raise missing_extra("datasets", "compress")
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    out_of_reach = (
        f"there is no file {source}, and the Hub cannot be reached; connect to the network, "
        f"or use {next(iter(SHIPPED))}, which needs none"
    )
    if not hub_answers():
        raise TextError(out_of_reach)
    try:
        rows = load_dataset(*arguments, **options, streaming=True)
        for number, row in enumerate(rows, 1):
            yield Row(_of_table(row), f"{source}, row {number}")
    except TextError:
        raise
    except DatasetNotFoundError as error:
        raise TextError(
            f"there is no file {source}, and no dataset of that name on the Hub; log in with: hf "
            "auth login if it is private or gated"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise TextError(out_of_reach) from error
    except Exception as error:  # datasets raises whatever its readers raise
        raise TextError(f"{source} cannot be read: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return one_line(error) or type(error).__name__
