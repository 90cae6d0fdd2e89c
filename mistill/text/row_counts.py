"""How many rows were read, cut and passed over, and why: one line at the end of a reading."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from mistill.errors import TextError
from mistill.text.rows import Row

_log = logging.getLogger(__name__)

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
        self._passed_over: dict[str, list[str]] = {}

    @property
    def passed_over(self) -> int:
        """Rows that were passed over."""
        return sum(map(len, self._passed_over.values()))

    def pass_over(self, row: Row, reason: TextError | str) -> None:
        """Count a row that was passed over.

        Args:
            row: The row.
            reason: What was wrong with it.
        """
        words = str(reason).replace(f"{row.origin}: ", "").replace(row.origin, "the row")
        place = row.origin.rpartition(", ")[2]
        self._passed_over.setdefault(words, []).append(place)

    def reasons(self) -> str:
        """Why rows were passed over, with the first lines of each reason."""
        return "; ".join(f"{words} ({_few(places)})" for words, places in self._passed_over.items())

    def tell(self, end: str) -> None:
        """Log the summary of a reading, and warn of what was left out.

        Args:
            end: What the reading says of the ends of answers; empty for nothing.
        """
        rows = f"{self.rows} row{'' if self.rows == 1 else 's'}"
        summary = f"{self._name}: {rows} read, {self.cut} cut, {self.passed_over} passed over"
        if self.passed_over:
            _log.warning("%s: %s", summary, self.reasons())
        else:
            _log.info("%s", summary)
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


def _few(places: Sequence[str]) -> str:
    named = ", ".join(places[:_NAMED])
    more = len(places) - _NAMED
    return f"{named} and {more} more" if more > 0 else named
