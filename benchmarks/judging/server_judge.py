"""A judge behind a server, which says which of two replies is better.

Where the server tells how probable the tokens were that its answer might have begun with
(``top_logprobs``), the probabilities of the two letters are read there, as of a judge in this
process; every token that is the letter but for white space counts to it. Where it does not, the
letter that it writes at temperature 0 is taken.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from benchmarks.judging.letters import LETTERS, NO_LETTER, Letters, judge_prompt
from mistill.errors import TextError
from mistill.remote.chat_server import ChatServer
from mistill.shown import visible
from mistill.text.conversation import Conversation

_log = logging.getLogger(__name__)

# The most that OpenAI's servers list.
_TOP = 20
# A letter may come after a line break or a space, as tokens of their own.
_TOKENS = 3
_WRITTEN = re.compile(r"\W*([AB])\b")


class ServerJudge:
    """A chat model of a server that says which reply is better.

    ``written`` says whether it is asked for a written letter, as the server tells no probabilities,
    and ``last_unclear`` holds the last of its answers that was no letter.
    """

    def __init__(self, server: ChatServer) -> None:
        """Take a model.

        Args:
            server: It was asked whether it has the model.
        """
        self.server = server
        self.written, self.last_unclear = False, ""

    def __call__(self, prompt: Conversation, first: str, second: str) -> Letters | None:
        """See ``LetterJudge``."""
        asked = judge_prompt(prompt, first, second)
        try:
            answer = self._asked(asked)
        except TextError as error:
            if "context" in str(error).lower():
                return None
            raise
        said = _text_of(answer)
        if not self.written:
            listed = _first_listed(answer)
            if listed is not None:
                letters = letters_among(listed)
                return self._not_clear(said) if letters is None else letters
            self._take_written("tells no probabilities of tokens")
        match = _WRITTEN.match(said)
        return self._not_clear(said) if match is None else _written_letter(match.group(1))

    def _asked(self, asked: Conversation) -> Any:
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": _TOKENS}
        if self.written:
            return self.server.complete(asked, settings)
        try:
            return self.server.complete(asked, {**settings, "logprobs": True, "top_logprobs": _TOP})
        except TextError as error:
            if "logprobs" not in str(error):
                raise
            self._take_written("takes no top_logprobs")
            return self.server.complete(asked, settings)

    def _take_written(self, why: str) -> None:
        self.written = True
        _log.warning(
            "%s %s; the letter that %s writes at temperature 0 is taken",
            self.server.place,
            why,
            self.server.model,
        )

    def _not_clear(self, said: str) -> Letters:
        self.last_unclear = visible(" ".join(said.split()))[:80]
        return NO_LETTER


def letters_among(listed: Mapping[str, float]) -> Letters | None:
    """The probabilities of both letters among those of the likeliest tokens.

    Args:
        listed: Log p of tokens, in nats, by their texts; all that were told.

    Returns:
        The letters; one that is not listed is at most as likely as the least likely token that is,
        and counts as that. None if neither is.
    """
    sums = {
        letter: sum(math.exp(value) for text, value in listed.items() if text.strip() == letter)
        for letter in LETTERS
    }
    if not any(sums.values()):
        return None
    least = min(listed.values())
    first, second = (math.log(one) if one else least for one in sums.values())
    return Letters(first, second)


def _written_letter(letter: str) -> Letters:
    """A letter without a probability: certain, and by the same in each order."""
    first, second = (0.0 if letter == one else -1.0 for one in LETTERS)
    return Letters(first, second, written=True)


def _choice(answer: Any) -> Any:
    try:
        return answer["choices"][0]
    except (KeyError, IndexError, TypeError):
        return None


def _text_of(answer: Any) -> str:
    choice = _choice(answer)
    message = choice.get("message") if isinstance(choice, dict) else None
    text = message.get("content") if isinstance(message, dict) else None
    return text if isinstance(text, str) else ""


def _first_listed(answer: Any) -> dict[str, float] | None:
    """Log p of the likeliest tokens where the first one stands that is no white space."""
    choice = _choice(answer)
    scores = choice.get("logprobs") if isinstance(choice, dict) else None
    content = scores.get("content") if isinstance(scores, dict) else None
    for token in content if isinstance(content, list) else []:
        try:
            listed = {
                str(one["token"]): float(one["logprob"])
                for one in token["top_logprobs"]
                if math.isfinite(float(one["logprob"]))
            }
            if listed and str(token["token"]).strip():
                return listed
        except (KeyError, TypeError, ValueError):
            return None
    return None
