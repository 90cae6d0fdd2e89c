"""How many rows were read, cut and passed over, and why: one line at the end of a reading."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from mistill.errors import TextError
from mistill.text.rows import Row

_log = logging.getLogger(__name__)

# The reason for which a row is passed over without being asked to.
NO_TEXT = "the row holds no text"

# Lines that are named for one reason; more are counted.
_NAMED = 5


class RowCounts:
    """Counts of one reading, for its summary and its warnings.

    Attributes:
        rows: Rows read, those that were passed over included.
        cut: Documents that are longer than a block or than the limit, and were cut.
        answers: Conversations with an answer to learn.
        endings: Those of them in which an answer ends with a token at which replies end.
        unread: Rows in which a column is left out, by the column.
        unwritten: Rows with tools or documents that the chat template does not write.
    """

    rows: int
    cut: int
    answers: int
    endings: int
    unread: Counter[str]
    unwritten: Counter[str]

    def __init__(self, sources: Sequence[str]) -> None:
        """Begin.

        Args:
            sources: Names of the texts.
        """
        self.rows = self.cut = self.answers = self.endings = 0
        self.unread, self.unwritten = Counter(), Counter()
        self._name = ", ".join(sources)
        self._passed_over: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {}

    @property
    def passed_over(self) -> int:
        """Rows that were passed over."""
        return self._passed_over.total()

    def pass_over(self, row: Row, reason: TextError | str) -> None:
        """Count a row that was passed over.

        Args:
            row: The row.
            reason: What was wrong with it.
        """
        words = str(reason).replace(f"{row.origin}: ", "").replace(row.origin, "the row")
        self._passed_over[words] += 1
        places = self._places.setdefault(words, [])
        if len(places) < _NAMED:
            places.append(row.origin.rpartition(", ")[2])

    def records(self, rows: Iterable[Row], *, skip: bool) -> Iterator[Row]:
        """Count rows, and leave out those that are no records.

        Args:
            rows: Rows as they stand in the text.
            skip: Whether such a row is passed over and counted, instead of refused.

        Yields:
            The records.

        Raises:
            TextError: If a row is no record and ``skip`` is False.
        """
        for row in rows:
            self.rows += 1
            if row.problem is None:
                yield row
                continue
            with self.passing_over(row, skip=skip):
                raise row.problem

    @contextmanager
    def passing_over(self, row: Row, *, skip: bool) -> Iterator[None]:
        """Pass over and count a row that the body refuses, where that is asked for.

        Args:
            row: The row.
            skip: Whether it is passed over, instead of refused.

        Yields:
            Nothing.

        Raises:
            TextError: If the body raises it and ``skip`` is False.
        """
        try:
            yield
        except TextError as error:
            if not skip:
                raise
            self.pass_over(row, error)

    def nothing_read(self, nothing: str) -> TextError:
        """The error for texts in which nothing was found.

        Args:
            nothing: Such as "there is no text".

        Returns:
            The error to raise, which names the texts and why rows were passed over.
        """
        reasons = f"; passed over: {self.reasons()}" if self.passed_over else ""
        return TextError(f"{nothing} in {self._name}{reasons}")

    def reasons(self) -> str:
        """Why rows were passed over, with the first lines of each reason."""
        return "; ".join(
            f"{words} ({_few(self._places[words], count)})"
            for words, count in self._passed_over.items()
        )

    def tell(self, end: str) -> None:
        """Log the summary of a reading, and warn of what was left out.

        Args:
            end: What the reading says of the ends of answers; empty for nothing.
        """
        rows = f"{self.rows} row{'' if self.rows == 1 else 's'}"
        summary = f"{self._name}: {rows} read, {self.cut} cut, {self.passed_over} passed over"
        if self._passed_over.keys() - {NO_TEXT}:
            _log.warning("%s: %s", summary, self.reasons())
        else:
            _log.info("%s%s", summary, f": {self.reasons()}" if self.passed_over else "")
        for column, count in self.unread.items():
            _log.warning(
                "%s: the column %s is left out, in %d of %s", self._name, column, count, rows
            )
        for column, count in self.unwritten.items():
            _log.warning(
                "%s: the chat template does not write the %s of %d of %s",
                self._name,
                column,
                count,
                rows,
            )
        if end and self.answers and not self.endings:
            _log.warning("%s: %s", self._name, end)


def _few(places: Sequence[str], count: int) -> str:
    more = count - len(places)
    return ", ".join(places) + (f" and {more} more" if more else "")
