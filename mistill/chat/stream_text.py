"""Streamed text of a reply: without broken characters, and without a part of a stop string.

A token is a run of bytes, and a character outside ASCII may be spread over several tokens. A stop
string may be spread over several too. Text that is not certain yet is held back.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from mistill.text.vocabulary import Vocabulary


class TextStream:
    """The text of one reply, growing token by token.

    Attributes:
        stopped: Whether a stop string has been found; nothing can be added after it.
    """

    stopped: bool

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: Sequence[str] = (),
        *,
        every_byte: bool = False,
        shown: Collection[int] = (),
    ) -> None:
        """Begin a reply.

        Args:
            vocabulary: Vocabulary of the model.
            stop: Strings that end the text and are not part of it.
            every_byte: Whether to show the space too with which SentencePiece marks the start of
                a text; where the form of the text counts, it is part of it.
            shown: Special tokens that are text here, such as the one that opens a call of a tool.
        """
        self.stopped = False
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = StopStrings(stop)
        self._empty = not every_byte
        self._shown = frozenset(shown)

    def add(self, token: int) -> str:
        """Add a token.

        Args:
            token: Its id; special tokens are marks and add no text.

        Returns:
            The text that can be shown now and could not before; often a word, sometimes nothing.
        """
        if self._vocabulary.is_special(token) and token not in self._shown:
            return ""
        return self._show(self._decoder.decode(self._spell(token)))

    def finish(self, *, cut_off: bool = False) -> str:
        """End the reply.

        Args:
            cut_off: Whether it ended for want of room, and not where the model ended it: the
                rest of an incomplete character would have followed, which is then left out.

        Returns:
            The text that was held back; an incomplete character becomes U+FFFD.
        """
        if self.stopped:
            return ""
        if cut_off:
            self._decoder.reset()
        shown = self._show(self._decoder.decode(b"", final=True))
        return shown if self.stopped else shown + self._stop.rest()

    def _show(self, text: str) -> str:
        shown = self._stop.add(text)
        self.stopped = self._stop.found
        return shown

    def _spell(self, token: int) -> bytes:
        """A token's bytes; SentencePiece marks the start of a text with a space, not part of it."""
        spelled = self._vocabulary.token_bytes(token)
        if self._empty and spelled:
            self._empty = False
            if spelled.startswith(b" ") and not self._vocabulary.decode([token]).startswith(" "):
                return spelled[1:]
        return spelled


class StopStrings:
    """Text up to the first stop string, however the text is cut into pieces.

    The stop string that is complete first counts; of several that end at the same position, the
    one that began first.

    Attributes:
        found: Whether one has been found.
    """

    found: bool

    def __init__(self, stop: Sequence[str]) -> None:
        """Begin a text.

        Args:
            stop: The strings, none of them empty.
        """
        self.found = False
        self._stop = [string for string in stop if string]
        self._held = ""

    def add(self, text: str) -> str:
        """Add a piece of text.

        Args:
            text: Text that follows.

        Returns:
            The text that cannot be part of a stop string.
        """
        self._held += text
        ends = [
            (self._held.index(string) + len(string), -len(string))
            for string in self._stop
            if string in self._held
        ]
        if ends:
            self.found = True
            end, minus_length = min(ends)
            return self._take(end + minus_length)
        return self._take(len(self._held) - self._begun())

    def rest(self) -> str:
        """End the text without a stop string.

        Returns:
            The text that was held back.
        """
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _begun(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(self._held)), longest, -1):
                if self._held.endswith(string[:length]):
                    longest = length
                    break
        return longest
