"""/v1/completions: texts continued as they are, without a chat template.

Special tokens that are written out in a prompt of text are tokens here, as in every completion API:
whoever asks writes the model's raw text, and may give token ids instead. With ``echo`` and
``logprobs`` the answer says how probable the prompt is, which is how evaluations score answers.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from mistill.engine.log_probabilities import TokenScore
from mistill.serve.generation import Served
from mistill.serve.http.exchange import Exchange
from mistill.serve.refusals import bad_request
from mistill.serve.replies import Event, Inbox, Piece, Reply
from mistill.serve.requests import CompletionRequest, read_request
from mistill.serve.streaming import Answer, respond
from mistill.text.vocabulary import Vocabulary

_DEFAULT_TOKENS = 16
_LEAST = -9999.0


async def complete(served: Served, exchange: Exchange) -> None:
    """Answer prompts.

    Args:
        served: The model.
        exchange: The request.

    Raises:
        RefusalError: If they cannot be answered.
        ClientGoneError: If the client leaves.
    """
    await respond(served, exchange, _prepare)


def _prepare(served: Served, content: bytes, inbox: Inbox, owner: str) -> _Answer:
    """All that is done before the engine writes; in a thread of its own."""
    request, ignored = read_request(content, CompletionRequest, served.limits)
    served.check_model(request.model)
    echo, scored = bool(request.echo), request.logprobs is not None
    if echo and scored and request.streams:
        raise bad_request("echo with logprobs is not streamed; leave out stream", "stream")
    asked = _DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    constraint = served.constraint(request)
    prompts = served.prompts.of_completion(
        request.prompt, add_special_tokens=request.add_special_tokens
    )
    longest = max(len(prompt) for prompt in prompts)
    if asked and longest >= served.context_length:
        raise served.prompts.too_long(longest, "prompt")
    replies = served.replies(
        request,
        prompts,
        inbox,
        owner=owner,
        max_new_tokens=asked,
        top=request.logprobs,
        prompt_scores=echo and scored,
        constraint=constraint,
        every_byte=True,
    )
    return _Answer(served, request, replies, ignored)


class _Text:
    """The text of one choice, growing."""

    def __init__(self) -> None:
        self.text = ""
        self.reason: str | None = None
        self.scores: list[TokenScore] = []

    def take(self, happened: Event) -> tuple[str, TokenScore | None]:
        """What an event adds: text, and how probable its token was."""
        text, score = getattr(happened, "text", ""), None
        if isinstance(happened, Piece):
            score = happened.score
        else:
            self.reason = getattr(happened, "reason", "stop")
        self.text += text
        if score is not None:
            self.scores.append(score)
        return text, score


class _Answer(Answer):
    """The answer to prompts."""

    def __init__(
        self,
        served: Served,
        request: CompletionRequest,
        replies: Sequence[Reply],
        ignored: Sequence[str],
    ) -> None:
        kind = "text_completion"
        super().__init__(served.name, request, replies, ignored, kind=kind, part_kind=kind)
        self._vocabulary = served.vocabulary
        self._prompt = request.prompt
        self._echoed, self._scored = bool(request.echo), request.logprobs is not None
        self._texts = [_Text() for _ in replies]
        self._offsets = [Offsets() for _ in self.replies]
        self._echoes = [self._echo(reply) for reply in self.replies]

    def opening(self) -> bytes:
        return b"".join(self._piece(index, echo) for index, echo in enumerate(self._echoes) if echo)

    def part(self, reply: Reply, happened: Sequence[Event]) -> bytes:
        state = self._texts[reply.index]
        taken = [state.take(one) for one in happened]
        text = "".join(text for text, _ in taken)
        scores = [score for _, score in taken if score is not None]
        if not (text or scores or state.reason is not None):
            return b""
        logprobs = None
        if scores:
            logprobs = legacy_logprobs(scores, self._vocabulary, self._offsets[reply.index])
        return self._piece(reply.index, text, logprobs, state.reason)

    def choices(self) -> list[dict[str, Any]]:
        return [
            {
                "index": reply.index,
                "text": echo + text.text,
                "logprobs": self._logprobs(reply, text) if self._scored else None,
                "finish_reason": text.reason,
            }
            for reply, echo, text in zip(self.replies, self._echoes, self._texts, strict=True)
        ]

    def _logprobs(self, reply: Reply, text: _Text) -> dict[str, Any]:
        if not self._echoed:
            return legacy_logprobs(text.scores, self._vocabulary)
        first = TokenScore(reply.prompt[0], 0.0, ())  # nothing is said of it
        scores = [first, *reply.prompt_scores, *text.scores]
        logprobs = legacy_logprobs(scores, self._vocabulary)
        logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None
        return logprobs

    def _echo(self, reply: Reply) -> str:
        """The prompt as the answer begins with it, if it does."""
        if not self._echoed:
            return ""
        given = self._prompt
        if not isinstance(given, str):
            given = given[reply.index // self.request.choices]
        return given if isinstance(given, str) else self._vocabulary.decode(reply.prompt)

    def _piece(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> bytes:
        return self.chunk(
            {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        )


class Offsets:
    """Where each token of a text begins, in characters."""

    def __init__(self) -> None:
        """Begin a text."""
        self._next = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of(self, spelled: bytes) -> int:
        """Where the next token begins.

        Args:
            spelled: Its bytes, which may end within a character; that counts to the token that
                completes it.

        Returns:
            Characters before it.
        """
        offset = self._next
        self._next += len(self._decoder.decode(spelled))
        return offset


def legacy_logprobs(
    scores: Sequence[TokenScore], vocabulary: Vocabulary, places: Offsets | None = None
) -> dict[str, Any]:
    """How probable tokens are, as clients of completions read it.

    Args:
        scores: The tokens, each with the most probable ones.
        vocabulary: Of the model.
        places: Where the text before them ended; None if they begin it.

    Returns:
        ``tokens``, ``token_logprobs``, ``top_logprobs`` and ``text_offset``. Where two tokens
        spell the same text, the more probable one stands for both.
    """
    tokens, values, tops, offsets = [], [], [], []
    places = places or Offsets()
    for score in scores:
        tokens.append(token_text(score.token, vocabulary))
        values.append(max(score.log_probability, _LEAST))
        top = {tokens[-1]: values[-1]}
        for token, value in score.top:
            text = token_text(token, vocabulary)
            top[text] = max(value, top.get(text, _LEAST))
        tops.append(top)
        offsets.append(places.of(vocabulary.token_bytes(score.token)))
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def token_text(token: int, vocabulary: Vocabulary) -> str:
    """What a token spells; one that is a part of a character as ``bytes:`` and its bytes.

    Args:
        token: Its id.
        vocabulary: Of the model.

    Returns:
        Its text.
    """
    spelled = vocabulary.token_bytes(token)
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
