"""What clients send, as types with bounds.

A body is parsed once, held against the bounds, and never read as something else: no number from
text, no true for 1. What mistill cannot do is refused by name, whatever else the request asks for;
fields that nobody knows are ignored, and named in the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from mistill.errors import MistillError
from mistill.folders.json_text import expectation, items_of, parse_message, place_of, value_at
from mistill.serve.refusals import RefusalError, bad_request
from mistill.serve.settings import Limits

_MOST = 2**31 - 1
_Count = Annotated[int, Meta(ge=0, le=_MOST)]
_Positive = Annotated[int, Meta(ge=1, le=_MOST)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class StreamOptions(Struct, kw_only=True):
    """What a stream tells besides the reply.

    Attributes:
        include_usage: Whether the last event counts the tokens.
        continuous_usage_stats: Whether every event does.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


class NamedSchema(Struct, kw_only=True):
    """A JSON schema that a reply must fit.

    Attributes:
        schema: The schema.
        name: What the client calls it.
        strict: Whether the reply must fit exactly; it always does.
        description: What it is for.
    """

    schema: dict[str, Any] | bool = True
    name: str = ""
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct, kw_only=True):
    """The form of a reply.

    Attributes:
        type: ``text``, ``json_object``, ``json_schema``, ``regex`` or ``lark``.
        json_schema: The schema, for ``json_schema``.
        regex: The regular expression, for ``regex``; mistill's own.
        lark: The grammar, for ``lark``; mistill's own.
    """

    type: str
    json_schema: NamedSchema | None = None
    regex: str | None = None
    lark: str | None = None


class Generation(Struct, kw_only=True):
    """What both ways of asking for a reply share.

    Attributes:
        model: Name of the model.
        temperature: Divisor of the logits; 0 decodes greedily.
        top_p: Sample among the fewest tokens whose probabilities reach this sum.
        top_k: Sample among this many of the most probable tokens; 0 or -1 keeps all.
        min_p: Drop tokens less probable than this share of the most probable one.
        repetition_penalty: Makes tokens of the prompt and the reply less probable.
        dry_multiplier: Makes tokens less probable that would repeat a run of tokens of the reply.
        dry_allowed_length: Runs of fewer tokens are repeated without a penalty.
        presence_penalty: Taken from the logit of every token that the reply holds already.
        frequency_penalty: Taken from it once for each time.
        logit_bias: Added to the logits of tokens, by their ids.
        seed: Seed of the random numbers.
        stop: Strings that end the reply and are not part of it.
        n: Number of replies to each prompt.
        stream: Whether to send the reply as it is written.
        stream_options: What a stream tells besides.
        response_format: The form of the reply.
        max_tokens: The most tokens of a reply.
        ignore_eos: Whether to go on after the end of a turn, for benchmarks.
    """

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_MOST)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    dry_multiplier: Annotated[float, Meta(ge=0, le=100)] | None = None
    dry_allowed_length: Annotated[int, Meta(ge=1, le=_MOST)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Meta(ge=1, le=_MOST)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    max_tokens: _Count | None = None
    ignore_eos: bool = False

    @property
    def streams(self) -> bool:
        """Whether the reply is sent as it is written."""
        return bool(self.stream)

    @property
    def choices(self) -> int:
        """Number of replies to each prompt."""
        return self.n or 1


class FunctionCall(Struct, kw_only=True):
    """A call of a tool in the conversation so far.

    Attributes:
        name: Name of the tool.
        arguments: Its arguments, as JSON in a text.
    """

    name: _Name
    arguments: str


class ToolCall(Struct, kw_only=True):
    """A call of a tool in the conversation so far.

    Attributes:
        function: What was called.
        id: Name of the call.
        type: ``function``.
    """

    function: FunctionCall
    id: str | None = None
    type: str = "function"


class ChatMessage(Struct, kw_only=True):
    """A turn.

    Attributes:
        role: Who speaks.
        content: A text, or parts of the type text.
        name: Name of who speaks, or of the tool.
        tool_calls: What the assistant called.
        tool_call_id: Which call a tool answers.
    """

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: _Name | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionTool(Struct, kw_only=True):
    """A function that the assistant may call.

    Attributes:
        name: Its name.
        description: What it does.
        parameters: JSON schema of its arguments.
        strict: Whether the arguments must fit the schema exactly.
    """

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True):
    """A tool that the assistant may call.

    Attributes:
        function: The function.
        type: ``function``.
    """

    function: FunctionTool
    type: str = "function"


class ChatRequest(Generation, kw_only=True):
    """A conversation to be continued.

    Attributes:
        messages: The turns.
        max_completion_tokens: The most tokens of a reply; the newer name.
        logprobs: Whether to tell how probable each token was.
        top_logprobs: How many of the most probable tokens to list at each position.
        tools: Tools that the assistant may call.
        tool_choice: ``none``, ``auto``, ``required``, or one tool by name.
        parallel_tool_calls: Whether the reply may call several.
        continue_final_message: Whether to go on with the last turn, one of the assistant's.
        add_generation_prompt: Whether to begin a turn of the assistant's; the opposite.
    """

    messages: list[ChatMessage]
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None


class CompletionRequest(Generation, kw_only=True):
    """A text, or several, to be continued as they are.

    Attributes:
        prompt: A text, token ids, or a list of either.
        echo: Whether the answer begins with the prompt.
        logprobs: How many of the most probable tokens to list at each position.
        add_special_tokens: Whether a prompt of text begins with the model's own first token.
    """

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_special_tokens: bool = True


class TokenizeRequest(Struct, kw_only=True):
    """A text or a conversation whose tokens are asked for.

    Attributes:
        model: Name of the model.
        prompt: The text.
        messages: The conversation.
        add_special_tokens: Whether a text begins with the model's own first token.
        add_generation_prompt: Whether a conversation ends where the assistant's turn begins.
        return_token_strs: Whether to say what each token spells.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """Tokens whose text is asked for.

    Attributes:
        tokens: Their ids.
        model: Name of the model.
    """

    tokens: list[int]
    model: str | None = None


# What is taken and changes nothing: who asks, what for, and how others may store or think.
_HARMLESS = frozenset(
    (
        *("metadata", "store", "user", "safety_identifier", "prompt_cache_key", "service_tier"),
        *("prompt_cache_options", "prompt_cache_retention", "verbosity", "reasoning_effort"),
        *("thinking", "stream_response", "timeout"),
    )
)
# What asks for something that there is not, and the value that asks for nothing.
_UNSUPPORTED: dict[str, tuple[str, Any]] = {
    "audio": ("the model writes text only", None),
    "modalities": ("the model writes text only", ["text"]),
    "web_search_options": ("the server reaches no network", None),
    "functions": ("use tools", None),
    "function_call": ("use tool_choice", "none"),
    "prediction": ("the server takes no predicted text", None),
    "moderation": ("the server moderates nothing", None),
    "chat_template": ("the template is that of the model", None),
    "chat_template_kwargs": ("the template takes no variables from a request", {}),
    "documents": ("write the documents into a message", []),
    "suffix": ("the model does not fill in", ""),
    "best_of": ("ask for n choices", 1),
    "use_beam_search": ("the server samples", False),
    "length_penalty": ("it belongs to beam search", 1.0),
    "early_stopping": ("it belongs to beam search", False),
    "min_tokens": ("use logit_bias", 0),
    "stop_token_ids": ("use stop", []),
    "bad_words": ("use logit_bias", []),
    "prompt_embeds": ("give text or token ids", None),
    "truncate_prompt_tokens": ("the server leaves nothing of a prompt out", None),
    "prompt_logprobs": ("use /v1/completions with echo and logprobs", None),
    "guided_json": ("use response_format", None),
    "guided_regex": ("use response_format with the type regex", None),
    "guided_grammar": ("use response_format with the type lark", None),
    "guided_choice": ("use response_format with the type regex", None),
    "structured_outputs": ("use response_format", None),
    "grammar": ("use response_format with the type lark", None),
    "json_schema": ("use response_format", None),
    "previous_response_id": ("the server keeps no conversation", None),
    "conversation": ("the server keeps no conversation", None),
    "images": ("the model reads text only", []),
    "dimensions": ("the model writes text and has no embeddings", None),
}
_SHOWN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_SHOWN = 10

RequestT = TypeVar("RequestT", bound=Struct)


class _BodyError(MistillError):
    """The body of a request cannot be read."""


def read_request(
    content: bytes, form: type[RequestT], limits: Limits
) -> tuple[RequestT, tuple[str, ...]]:
    """Read the body of a request.

    Args:
        content: The body.
        form: What it should hold.
        limits: Bounds on it.

    Returns:
        The request, and the names of fields that were ignored.

    Raises:
        RefusalError: If it is no JSON, lacks a field, or a field is out of its bounds; it names
            the field, and holds nothing that was written in it.
    """
    try:
        value = parse_message(content, limits.depth, _BodyError)
    except _BodyError as error:
        raise bad_request(str(error)) from None
    if not isinstance(value, dict):
        raise bad_request('the body should be a JSON object such as {"model": ...}')
    messages = value.get("messages")
    if isinstance(messages, list) and len(messages) > limits.messages:
        raise bad_request(
            f"messages holds {len(messages)}; at most {limits.messages} are read", "messages"
        )
    known = _names_of(form)
    for name, (instead, nothing) in _UNSUPPORTED.items():
        if name in value and name not in known and value[name] not in (None, nothing):
            raise bad_request(f"{name} is not supported: {instead}", name)
    _refuse_odd_numbers(value)
    try:
        request = msgspec.convert(value, form, strict=True)
    except msgspec.ValidationError as problem:
        raise _complaint(value, problem) from None
    unknown = [name for name in value if name not in known and name not in _HARMLESS]
    shown = [name for name in unknown if _SHOWN_NAME.fullmatch(name) and name not in _UNSUPPORTED]
    return request, tuple(shown[:_MOST_SHOWN])


@cache
def _names_of(form: type[Struct]) -> frozenset[str]:
    """The fields of a form; to find them out takes a third of a millisecond."""
    return frozenset(field.encode_name for field in msgspec.structs.fields(form))


def _refuse_odd_numbers(document: Mapping[str, Any]) -> None:
    """Refuse what is no plain number anywhere in a body: not finite, or zero with a sign."""
    for name, value in document.items():
        level = [value]
        while level:
            for number in level:
                if type(number) is float and (
                    not math.isfinite(number) or (number == 0 and math.copysign(1, number) < 0)
                ):
                    raise bad_request(f"{name} should be a plain number, not {number}", name)
            level = [inner for outer in level for inner in items_of(outer)]


def _complaint(value: Any, problem: msgspec.ValidationError) -> RefusalError:
    """A complaint of msgspec without what the client wrote, but for numbers."""
    reason, place = str(problem).partition(" - at `$")[0], place_of(problem)
    lacking = re.search(r"missing required field `([^`]*)`", reason)
    if lacking is not None:
        place = f"{place}.{lacking[1]}".lstrip(".")
        return bad_request(f"{place} is missing", place)
    words = expectation(problem)
    where = place or "the body"
    if words is None:
        if "matching regex" in reason:
            reason = "should be 1 to 64 letters, digits, _ or -"
            return bad_request(f"{where} {reason}", place or None)
        return bad_request(f"{where} is not as it should be", place or None)
    known, actual = value_at(value, place)
    number = known and isinstance(actual, int | float) and not isinstance(actual, bool)
    shown = f"{actual!r:.40}" if number else words[1]
    return bad_request(f"{where} should be {words[0]}, not {shown}", place or None)
