"""Text for a terminal, with lines that break between words while they are being written."""

from __future__ import annotations

from rich.cells import cell_len


class WholeWords:
    """Breaks the lines of a text between words, while the text is being written."""

    def __init__(self, width: int) -> None:
        """Begin at the start of a line.

        Args:
            width: Columns of the terminal.
        """
        self._width = width
        self._column = 0
        self._word = ""

    def add(self, text: str) -> str:
        """Take more text.

        Args:
            text: The next part.

        Returns:
            What can be written of it: all but the word that may go on, which is held back unless
            it is as long as a line.
        """
        words = []
        for letter in text:
            if letter in " \n\t":
                words.append(self._placed() + self._space(letter))
            else:
                self._word += letter
                if cell_len(self._word) >= self._width:
                    words.append(self._placed())
        return "".join(words)

    def finish(self) -> str:
        """End the text.

        Returns:
            What was held back.
        """
        return self._placed()

    def _placed(self) -> str:
        word, self._word = self._word, ""
        length = cell_len(word)
        begin = ""
        if self._column and self._column + length > self._width:
            begin, self._column = "\n", 0
        self._column = (
            (self._column + length) % self._width
            if length >= self._width
            else (self._column + length)
        )
        return begin + word

    def _space(self, letter: str) -> str:
        if letter == "\n":
            self._column = 0
        elif self._column < self._width:
            self._column += 1
        else:
            return ""
        return letter
