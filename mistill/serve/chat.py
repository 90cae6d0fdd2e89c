"""/v1/chat/completions: a conversation, and the assistant's next turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mistill.constraints import Constraint
from mistill.engine.log_probabilities import TokenScore
from mistill.serve.generation import Served
from mistill.serve.http.exchange import Exchange
from mistill.serve.refusals import bad_request
from mistill.serve.replies import Event, Inbox, Piece, Reply
from mistill.serve.requests import ChatRequest, read_request
from mistill.serve.streaming import Answer, respond
from mistill.serve.tool_calls import (
    Call,
    CallReader,
    Form,
    end_of_call,
    form_of,
    grammar_of_calls,
    mark_ids,
)
from mistill.text.vocabulary import Vocabulary


async def chat(served: Served, exchange: Exchange) -> None:
    """Answer a conversation.

    Args:
        served: The model.
        exchange: The request.

    Raises:
        RefusalError: If it cannot be answered.
        ClientGoneError: If the client leaves.
    """
    await respond(served, exchange, _prepare)


def _prepare(served: Served, content: bytes, inbox: Inbox, owner: str) -> _Answer:
    """All that is done before the engine writes; in a thread of its own."""
    request, ignored = read_request(content, ChatRequest, served.limits)
    served.check_model(request.model)
    if request.max_tokens == 0:
        raise bad_request("max_tokens should be a whole number of at least 1, not 0", "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    constraint = served.constraint(request)
    form = _tools_form(served, request, constraint)
    if form is not None and constraint is None:
        constraint = _demanded_calls(served, request, form)
    prompt = served.prompts.of_chat(request)
    asked = request.max_completion_tokens or request.max_tokens or served.settings.max_new_tokens
    replies = served.replies(
        request,
        [prompt],
        inbox,
        owner=owner,
        max_new_tokens=min(asked, served.context_length - len(prompt)),
        top=(request.top_logprobs or 0) if request.logprobs else None,
        constraint=constraint,
        shown_tokens=() if form is None else mark_ids(form, served.vocabulary),
        urgent=None if form is None else end_of_call(form),
        every_byte=request.continue_final_message,
    )
    return _Answer(served, request, replies, form, ignored)


def _tools_form(served: Served, request: ChatRequest, constraint: Constraint | None) -> Form | None:
    """How the reply may call tools; None where it may not."""
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice needs tools", "tool_choice")
        return None
    if len(request.tools) > served.limits.tools:
        raise bad_request(f"tools holds more than {served.limits.tools}", "tools")
    for number, tool in enumerate(request.tools):
        if tool.type != "function":
            raise bad_request(f"tools[{number}].type should be function", f"tools[{number}].type")
    form = form_of(served.vocabulary)
    if form is None:
        raise bad_request(
            "this model's chat template knows no tools, or writes calls in a form that mistill "
            "does not read",
            "tools",
        )
    if choice == "none":
        return None
    if constraint is not None:
        raise bad_request("give either tools or a response_format", "response_format")
    return form


def _demanded_calls(served: Served, request: ChatRequest, form: Form) -> Constraint | None:
    """The constraint of a reply that must call a tool; None where it need not."""
    choice = request.tool_choice
    if choice in (None, "auto"):
        return None
    tools = [
        {"name": tool.function.name, "parameters": tool.function.parameters or {"type": "object"}}
        for tool in request.tools or ()
    ]
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        tools = [tool for tool in tools if tool["name"] == name]
    if not tools or not (isinstance(choice, dict) or choice == "required"):
        raise bad_request(
            'tool_choice should be none, auto, required, or {"type": "function", "function": '
            '{"name": one of tools}}',
            "tool_choice",
        )
    several = request.parallel_tool_calls is not False and not isinstance(choice, dict)
    return served.lark_constraint(
        grammar_of_calls(form, tools, served.vocabulary, several=several), "tools"
    )


class _Turn:
    """The assistant's turn of one choice, growing."""

    def __init__(self, vocabulary: Vocabulary, form: Form | None) -> None:
        self.text = ""
        self.reason: str | None = None
        self.scores: list[dict[str, Any]] = []
        self.calls: list[Call] = []
        self._vocabulary = vocabulary
        self._reader = None if form is None else CallReader(form)

    def take(self, happened: Event) -> tuple[str, list[Call], list[dict[str, Any]]]:
        """What an event adds: text, calls after it, log-probabilities."""
        text = getattr(happened, "text", "")
        scores = []
        if self._reader is not None:
            text = self._reader.add(text)
        if isinstance(happened, Piece):
            if happened.score is not None and not happened.ends:
                scores = [score_entry(happened.score, self._vocabulary)]
        else:
            if self._reader is not None:
                text += self._reader.finish()
            self.reason = getattr(happened, "reason", "stop")
        calls = [] if self._reader is None else self._reader.calls[len(self.calls) :]
        self.calls += calls
        if self.reason == "stop" and self.calls:
            self.reason = "tool_calls"
        self.text += text
        self.scores += scores
        return text, calls, scores


class _Answer(Answer):
    """The answer to a conversation."""

    def __init__(
        self,
        served: Served,
        request: ChatRequest,
        replies: Sequence[Reply],
        form: Form | None,
        ignored: Sequence[str],
    ) -> None:
        super().__init__(
            served.name,
            request,
            replies,
            ignored,
            kind="chat.completion",
            part_kind="chat.completion.chunk",
        )
        self._scored = bool(request.logprobs)
        self._turns = [_Turn(served.vocabulary, form) for _ in replies]

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._delta(index, delta) for index in range(len(self._turns)))

    def part(self, reply: Reply, happened: Sequence[Event]) -> bytes:
        turn = self._turns[reply.index]
        parts: list[bytes] = []
        text = ""
        scores: list[dict[str, Any]] = []

        def flush() -> None:
            nonlocal text, scores
            if text or scores:
                parts.append(self._delta(reply.index, {"content": text}, scores))
                text, scores = "", []

        for one in happened:
            numbered = len(turn.calls)
            more, calls, more_scores = turn.take(one)
            text += more
            scores += more_scores
            for number, call in enumerate(calls, numbered):
                flush()
                entry = {"index": number, **_call(call)}
                parts.append(self._delta(reply.index, {"tool_calls": [entry]}))
        flush()
        if turn.reason is not None:
            parts.append(self._delta(reply.index, {}, reason=turn.reason))
        return b"".join(parts)

    def choices(self) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": _message(turn),
                "logprobs": _logprobs(turn.scores) if self._scored else None,
                "finish_reason": turn.reason,
            }
            for index, turn in enumerate(self._turns)
        ]

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        scores: list[dict[str, Any]] | None = None,
        reason: str | None = None,
    ) -> bytes:
        logprobs = _logprobs(scores) if scores else None
        return self.chunk(
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        )


def _logprobs(scores: list[dict[str, Any]]) -> dict[str, Any]:
    return {"content": scores, "refusal": None}


def _message(turn: _Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.text, "refusal": None}
    if turn.calls:
        message["content"] = turn.text.strip() or None
        message["tool_calls"] = [_call(call) for call in turn.calls]
    return message


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def score_entry(score: TokenScore, vocabulary: Vocabulary) -> dict[str, Any]:
    """How probable a token was, as chat clients read it.

    Args:
        score: The token, and the most probable ones.
        vocabulary: Of the model.

    Returns:
        The entry; a token may be a part of a character, and its bytes say which.
    """

    def entry(token: int, log_probability: float) -> dict[str, Any]:
        spelled = vocabulary.token_bytes(token)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": max(log_probability, -9999.0),
            "bytes": list(spelled),
        }

    return {
        **entry(score.token, score.log_probability),
        "top_logprobs": [entry(token, value) for token, value in score.top],
    }
