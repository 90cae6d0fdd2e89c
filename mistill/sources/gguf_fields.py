"""The fields and tensors of a GGUF file, in one or several pieces, read as checked types.

Anybody may have written a file: a count may be larger than the file, a number may be a text. Counts
are compared with the bytes that are there before the ``gguf`` library reads the file, and each
field is read as the type that it should have, or refused by name.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mistill.errors import ArchitectureError, FolderError
from mistill.shown import one_line

_PIECE = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)

# Bytes of the values of each type by its number; a text and an array say their own length.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9

ItemT = TypeVar("ItemT", str, int, float)
_ITEMS: dict[type, str] = {str: "texts", int: "whole numbers", float: "numbers"}


class GgufFile:
    """What a GGUF file says, and its tensors.

    ``name`` is the name of the file, and ``tensors`` maps the names of tensors to what the ``gguf``
    library read of each.

    Args:
        name: Name of the file.
        fields: Fields by their names, as the library read them.
        tensors: Tensors by their names.
    """

    def __init__(self, name: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self.name = name
        self.tensors = dict(tensors)
        self._fields = fields

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def whole(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """A whole number.

        Args:
            key: Name of the field.
            default: What a missing field means; None if it must be there.
            low: The smallest number that is allowed.

        Returns:
            The number.

        Raises:
            ArchitectureError: If the field is missing.
            FolderError: If it is of another type, or below ``low``.
        """
        value = self._value(key, default)
        if type(value) is not int or value < low:
            raise self._wrong(key, f"a whole number of at least {low}", value)
        return value

    def token(self, key: str, count: int) -> int | None:
        """The id of a token.

        Args:
            key: Name of the field.
            count: How many tokens there are.

        Returns:
            The id; None if the field is missing or names no token, as -1 does.

        Raises:
            FolderError: If the field is not a number.
        """
        value = self._value(key, -1)
        if type(value) is not int:
            raise self._wrong(key, "the number of a token", value)
        return value if 0 <= value < count else None

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number of at least 0.

        Args:
            key: Name of the field.
            default: What a missing field means; None if it must be there.

        Returns:
            The number.

        Raises:
            ArchitectureError: If the field is missing.
            FolderError: If it is no such number.
        """
        value = self._value(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise self._wrong(key, "a number", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A field that is true or false.

        Args:
            key: Name of the field.
            default: What a missing field means.

        Returns:
            Its value.

        Raises:
            FolderError: If the field is of another type.
        """
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def text(self, key: str) -> str | None:
        """A text.

        Args:
            key: Name of the field.

        Returns:
            The text; None if the field is missing.

        Raises:
            FolderError: If the field is of another type, or not UTF-8.
        """
        value = self._value(key, "") if key in self._fields else None
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "text", value)
        return value

    def items(self, key: str, kind: type[ItemT]) -> list[ItemT]:
        """A list of texts, whole numbers or numbers.

        Args:
            key: Name of the field.
            kind: str, int or float.

        Returns:
            The items; none if the field is an empty list.

        Raises:
            ArchitectureError: If the field is missing.
            FolderError: If it holds something else.
        """
        value = self._value(key, None)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self._wrong(key, f"a list of {_ITEMS[kind]}", value)
        return value

    def _value(self, key: str, default: Any) -> Any:
        if key not in self._fields:
            if default is None:
                raise ArchitectureError(f"{self.name} lacks the field {key}")
            return default
        try:
            return self._fields[key].contents()
        except UnicodeDecodeError as error:
            raise FolderError(f"{key} of {self.name} is not UTF-8 text") from error

    def _wrong(self, key: str, wanted: str, value: Any) -> FolderError:
        return FolderError(f"{key} of {self.name} should be {wanted}, not {value!r:.80}")


def pieces_of(file: Path) -> list[Path]:
    """The files of a model that is published in several.

    Args:
        file: A GGUF file.

    Returns:
        The file, or all pieces that lie beside it if it is named as the first of some.
    """
    match = _PIECE.fullmatch(file.name)
    if match is None or int(match[2]) != 1:
        return [file]
    count = min(int(match[3]), 99_999)
    names = [f"{match[1]}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    present = [file.with_name(name) for name in names[1:] if file.with_name(name).is_file()]
    return [file, *present]


def open_gguf(file: Path) -> GgufFile:
    """Read the fields of a GGUF file, and where its tensors lie.

    Args:
        file: The file; of a model in several, the first.

    Returns:
        The file, with the tensors of all its pieces.

    Raises:
        FolderError: If it is damaged, or not the first of pieces that are all there.
    """
    first = _read(file)
    count = first.whole("split.count", 1, low=0)
    if count <= 1:
        return first
    number = first.whole("split.no", 0, low=0)
    pieces = pieces_of(file)
    match = _PIECE.fullmatch(file.name)
    if number != 0 or match is None or int(match[3]) != count or len(pieces) != count:
        raise FolderError(
            f"{file.name} is piece {number + 1} of the {count} of a model; give the first piece, "
            f"under the name that ends in -00001-of-{count:05}.gguf and with all others beside it, "
            "or join them first with: llama-gguf-split --merge"
        )
    for place, piece in enumerate(pieces[1:], 1):
        other = _read(piece)
        if (other.whole("split.no", 0, low=0), other.whole("split.count", 1, low=0)) != (
            place,
            count,
        ):
            raise FolderError(f"{piece.name} does not say that it is piece {place + 1} of {count}")
        repeated = sorted(first.tensors.keys() & other.tensors.keys())
        if repeated:
            raise FolderError(f"{piece.name} repeats the tensor {repeated[0]} of another piece")
        first.tensors.update(other.tensors)
    tensors = first.whole("split.tensors.count", len(first.tensors), low=0)
    if tensors != len(first.tensors):
        raise FolderError(
            f"the pieces of {file.name} hold {len(first.tensors)} tensors, not the {tensors} "
            "that they should"
        )
    return first


def _read(file: Path) -> GgufFile:
    from gguf import GGUFReader

    try:
        _check_counts(file)
        reader = GGUFReader(file)
    except Exception as error:  # gguf raises whatever numpy raises on a broken file
        raise FolderError(
            f"{file} is not a GGUF file, or is damaged: {one_line(error, 200)}"
        ) from error
    return GgufFile(file.name, reader.fields, {one.name: one for one in reader.tensors})


def _check_counts(file: Path) -> None:
    """Walk over the header, and refuse a count that the file has no bytes for."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        (version,) = struct.unpack_from("<I", data, 4)
        walk = _Walk(data, "<" if version < 1 << 16 else ">")
        tensors, fields = walk.numbers("QQ")
        for _ in range(fields):
            walk.text()
            walk.value(*walk.numbers("I"))
        for _ in range(tensors):
            walk.text()
            (axes,) = walk.numbers("I")
            walk.skip(8 * axes + 4 + 8)


class _Walk:
    """A position in the header of a file, which never leaves it."""

    def __init__(self, data: mmap.mmap, order: str) -> None:
        self._held, self._order, self._place = data, order, 8

    def numbers(self, format_letters: str) -> Sequence[int]:
        layout = self._order + format_letters
        values = struct.unpack_from(layout, self._held, self._place)
        self._place += struct.calcsize(layout)
        return values

    def skip(self, size: int) -> None:
        self._place += size
        if self._place > len(self._held):
            raise ValueError("its header says that it goes on after the end of the file")

    def text(self) -> None:
        self.skip(*self.numbers("Q"))

    def value(self, kind: int) -> None:
        if kind == _TEXT:
            self.text()
        elif kind != _ARRAY:
            self.skip(_SIZES[kind])
        else:
            inner, count = self.numbers("IQ")
            if inner == _TEXT:
                for _ in range(count):
                    self.text()
            else:
                self.skip(_SIZES[inner] * count)
