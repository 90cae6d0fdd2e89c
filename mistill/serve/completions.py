"""/v1/completions: texts continued as they are, without a chat template.

Special tokens that are written out in a prompt of text are tokens here, as in every completion API:
whoever asks writes the model's raw text, and may give token ids instead. With ``echo`` and
``logprobs`` the answer says how probable the prompt is, which is how evaluations score answers.
"""

from __future__ import annotations

import asyncio
import codecs
import secrets
import time
from collections.abc import Sequence
from typing import Any

from mistill.engine.log_probabilities import TokenScore
from mistill.serve.chat import usage
from mistill.serve.generation import Served
from mistill.serve.http.exchange import Exchange
from mistill.serve.refusals import bad_request
from mistill.serve.replies import Event, Inbox, Piece, Replies, Reply
from mistill.serve.requests import CompletionRequest, read_request
from mistill.serve.streaming import event, raise_failure, stream_replies
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
    content = await exchange.body()
    inbox = Inbox(asyncio.get_running_loop())
    answer = await served.workers.run(_prepare, served, content, inbox, exchange.owner)
    replies = Replies(served.scheduler, answer.replies, inbox, served.settings.queue_seconds)
    try:
        replies.start(exchange)
        if answer.request.streams:
            await stream_replies(
                exchange,
                replies,
                headers=answer.headers,
                opening=answer.opening,
                part=answer.part,
                closing=answer.closing,
                ping_seconds=served.limits.ping_seconds,
            )
        else:
            while replies.unfinished:
                events = await replies.take()
                raise_failure(events)
                for reply, happened in events:
                    answer.texts[reply.index].take(happened)
            whole = await served.workers.run(answer.whole)
            await exchange.answer_json(whole, answer.headers)
    finally:
        replies.stop()
        served.counts.ended(exchange, answer.replies)


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


class _Answer:
    """The answer to prompts, whole or in parts."""

    def __init__(
        self,
        served: Served,
        request: CompletionRequest,
        replies: Sequence[Reply],
        ignored: Sequence[str],
    ) -> None:
        self.request = request
        self.replies = list(replies)
        self.texts = [_Text() for _ in replies]
        self.headers = {"X-Ignored-Fields": ", ".join(ignored)} if ignored else {}
        self._vocabulary = served.vocabulary
        self._offsets = [0] * len(self.replies)
        self._echoes: list[str] = [self._echo(index) for index in range(len(self.replies))]
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model = served.name
        options = request.stream_options
        self._usage = options is not None and options.include_usage
        self._usage_always = options is not None and options.continuous_usage_stats

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, text in enumerate(self.texts):
            reply = self.replies[index]
            logprobs = None
            if self.request.logprobs is not None:
                scores: list[TokenScore | None] = list(text.scores)
                if self.request.echo:
                    first = TokenScore(reply.prompt[0], 0.0, ())
                    before = [first, *reply.prompt_scores]
                    entry = legacy_logprobs([*before, *text.scores], self._vocabulary)
                    entry["token_logprobs"][0] = entry["top_logprobs"][0] = None
                    logprobs = entry
                else:
                    logprobs = legacy_logprobs(
                        [score for score in scores if score is not None], self._vocabulary
                    )
            choices.append(
                {
                    "index": index,
                    "text": self._echoes[index] + text.text,
                    "logprobs": logprobs,
                    "finish_reason": text.reason,
                }
            )
        return {**self._head(), "choices": choices, "usage": usage(self.replies)}

    def opening(self) -> bytes:
        return b"".join(self._chunk(index, echo) for index, echo in enumerate(self._echoes) if echo)

    def part(self, reply: Reply, happened: Event) -> bytes:
        state = self.texts[reply.index]
        text, score = state.take(happened)
        if not (text or score is not None or state.reason is not None):
            return b""
        logprobs = None
        if score is not None:
            logprobs = legacy_logprobs([score], self._vocabulary, self._offsets[reply.index])
            self._offsets[reply.index] += len(logprobs["tokens"][0])
        return self._chunk(reply.index, text, logprobs, state.reason)

    def closing(self) -> bytes:
        if not self._usage:
            return b""
        return event({**self._head(), "choices": [], "usage": usage(self.replies)})

    def _echo(self, index: int) -> str:
        """The prompt as the answer begins with it, if it does."""
        if not self.request.echo:
            return ""
        prompt = self.request.prompt
        number = index // self.request.choices
        given = prompt if isinstance(prompt, str) else prompt[number]
        if isinstance(given, str):
            return given
        return self._vocabulary.decode(self.replies[index].prompt)

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head(), "choices": [choice]}
        if self._usage:
            chunk["usage"] = usage(self.replies) if self._usage_always else None
        return event(chunk)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
        }


def legacy_logprobs(
    scores: Sequence[TokenScore], vocabulary: Vocabulary, offset: int = 0
) -> dict[str, Any]:
    """How probable tokens are, as clients of completions read it.

    Args:
        scores: The tokens, each with the most probable ones.
        vocabulary: Of the model.
        offset: Characters before the first.

    Returns:
        ``tokens``, ``token_logprobs``, ``top_logprobs`` and ``text_offset``. Where two tokens
        spell the same text, the more probable one stands for both.
    """
    tokens, values, tops, offsets = [], [], [], []
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for score in scores:
        tokens.append(token_text(score.token, vocabulary))
        values.append(max(score.log_probability, _LEAST))
        top = {tokens[-1]: values[-1]}
        for token, value in score.top:
            text = token_text(token, vocabulary)
            top[text] = max(value, top.get(text, _LEAST))
        tops.append(top)
        offsets.append(offset)
        offset += len(decoder.decode(vocabulary.token_bytes(score.token)))
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
