"""From the messages and prompts of a request to token ids.

Roles come from a closed list, contents are text, and special tokens that somebody typed in a
message are text too. Long texts are refused by their bytes before they are tokenized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mistill.errors import SettingsError, TextError, VocabularyError
from mistill.folders.json_text import parse_json
from mistill.serve.refusals import RefusalError, bad_request
from mistill.serve.requests import ChatMessage, ChatRequest
from mistill.serve.settings import Limits
from mistill.text.answers import prompt_ids
from mistill.text.conversation import SYSTEMS, Conversation
from mistill.text.vocabulary import Vocabulary

_ROLES = ("system", "developer", "user", "assistant", "tool")
# Bytes that are tokenized at once where a text may be too long; a few milliseconds of work.
_PIECE = 16 << 10


class Prompts:
    """Makes prompts of requests, for one model."""

    def __init__(self, vocabulary: Vocabulary, context_length: int, limits: Limits) -> None:
        """Look at the model's template and tokens.

        Args:
            vocabulary: Of the model.
            context_length: Positions that the model holds.
            limits: Bounds on what a request may hold.
        """
        self.context_length = context_length
        self.takes_tools = "tools" in (vocabulary.tool_template or "")
        self._vocabulary = vocabulary
        self._limits = limits
        self._longest = max(len(vocabulary.token_bytes(token)) for token in range(vocabulary.size))

    def of_chat(self, request: ChatRequest) -> list[int]:
        """The prompt of a conversation.

        Args:
            request: The conversation, and what stands beside it.

        Returns:
            Token ids up to where the reply begins.

        Raises:
            RefusalError: If the conversation is none, or does not fit into the context.
        """
        self._check_ending(request)
        tools = None
        if request.tools and request.tool_choice != "none":
            tools = [
                {
                    "type": "function",
                    "function": {
                        "name": tool.function.name,
                        "description": tool.function.description or "",
                        "parameters": tool.function.parameters
                        or {"type": "object", "properties": {}},
                    },
                }
                for tool in request.tools
            ]
        talk = self.conversation(request.messages, tools)
        if not request.continue_final_message:
            return self._fitting(self.rendered(talk))
        begun = str(talk.messages[-1]["content"])
        ids = self.rendered(talk.until(len(talk.messages) - 1))
        return self._fitting([*ids, *self._vocabulary.encode_as_text(begun).ids.tolist()])

    def conversation(
        self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] | None = None
    ) -> Conversation:
        """The messages as a conversation, if they are one.

        Args:
            messages: The messages.
            tools: Tools that the assistant may call.

        Returns:
            The conversation.

        Raises:
            RefusalError: If there is no message, or one is not as it should be.
        """
        if not messages:
            raise bad_request("messages should hold at least one message", "messages")
        turns = tuple(self._turn(number, message) for number, message in enumerate(messages))
        systems = [number for number, turn in enumerate(turns) if turn["role"] == "system"]
        if len(systems) > 1:
            raise bad_request(
                f"messages[{systems[1]}] is a second system message; join it with the first",
                f"messages[{systems[1]}].role",
            )
        size = sum(len(turn["content"].encode()) for turn in turns)
        self.refuse_long([turn["content"] for turn in turns], size, "messages")
        return Conversation(turns, tools=tools)

    def rendered(self, talk: Conversation, *, reply_begins: bool = True) -> list[int]:
        """The tokens of a conversation.

        Args:
            talk: The conversation.
            reply_begins: Whether they end where the assistant's next turn begins.

        Returns:
            Token ids.

        Raises:
            RefusalError: If the template refuses the conversation.
        """
        try:
            ids = prompt_ids(talk, self._vocabulary, reply_begins=reply_begins)
        except TextError as error:
            raise bad_request(str(error), "messages") from None
        except VocabularyError:
            # Its message names the folder, which is nobody's business.
            raise RefusalError(
                500, "the chat template of this model cannot render a conversation"
            ) from None
        if not ids:
            raise bad_request("the chat template writes nothing of these messages", "messages")
        return ids

    def of_completion(self, prompt: Any, *, add_special_tokens: bool) -> list[list[int]]:
        """The prompts of a request for completions.

        Args:
            prompt: A text, token ids, or a list of either.
            add_special_tokens: Whether a text begins with the model's own first token.

        Returns:
            Token ids of each.

        Raises:
            RefusalError: If it is something else, empty, or longer than the context.
        """
        single = isinstance(prompt, str) or (
            isinstance(prompt, list) and bool(prompt) and _is_id(prompt[0])
        )
        prompts = [prompt] if single else prompt
        if not prompts:
            raise bad_request("prompt should hold at least one prompt", "prompt")
        if len(prompts) > self._limits.prompts:
            raise bad_request(
                f"prompt holds {len(prompts)} prompts; at most {self._limits.prompts} are read",
                "prompt",
            )
        return [
            self._prompt(one, "prompt" if single else f"prompt[{number}]", add_special_tokens)
            for number, one in enumerate(prompts)
        ]

    def text_ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a text; special tokens that are written out in it are tokens.

        Args:
            text: The text.
            add_special_tokens: Whether to begin with the model's own first token.

        Returns:
            Token ids.

        Raises:
            RefusalError: If it holds a token for which the model has no row.
        """
        try:
            ids = self._vocabulary.encode(text)
        except (TextError, VocabularyError, SettingsError):
            raise bad_request(
                "the prompt holds a token that the model does not have", "prompt"
            ) from None
        if add_special_tokens and self._vocabulary.adds_bos and self._vocabulary.bos_id is not None:
            return [self._vocabulary.bos_id, *ids]
        return ids

    def refuse_long(self, texts: Sequence[str], size: int, param: str) -> None:
        """Refuse texts that cannot fit into the context, without tokenizing all of them.

        Args:
            texts: The texts.
            size: Their bytes together.
            param: The field that holds them.

        Raises:
            RefusalError: If they are longer than the context for certain.
        """
        least = -(-size // self._longest)
        if least >= self.context_length:
            raise self.too_long(least, param, "at least ")
        if size <= _PIECE * 4:
            return
        tokens = 0
        for text in texts:
            for start in range(0, len(text), _PIECE):
                # A cut may make a few tokens more of a word; half of them are surely there.
                piece = text[start : start + _PIECE]
                tokens += len(self._vocabulary.encode(piece)) - 16
                if tokens > self.context_length:
                    raise self.too_long(tokens, param, "more than ")

    def _fitting(self, ids: list[int]) -> list[int]:
        if len(ids) >= self.context_length:
            raise self.too_long(len(ids), "messages")
        return ids

    def too_long(self, tokens: int, param: str, about: str = "") -> RefusalError:
        """A prompt that leaves no room for a reply.

        Args:
            tokens: Its tokens.
            param: The field that holds it.
            about: ``at least `` or ``more than `` where it was not counted to the end.

        Returns:
            The refusal to raise.
        """
        return RefusalError(
            400,
            f"the prompt has {about}{tokens} tokens and the context holds {self.context_length}, "
            "the reply included; shorten it or leave out the oldest turns",
            param=param,
            code="context_length_exceeded",
            details={"n_prompt_tokens": tokens, "n_ctx": self.context_length},
        )

    def _prompt(self, prompt: Any, place: str, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            self.refuse_long([prompt], len(prompt.encode()), place)
            ids = self.text_ids(prompt, add_special_tokens=add_special_tokens)
        elif isinstance(prompt, list) and all(map(_is_id, prompt)):
            ids = prompt
            size = self._vocabulary.size
            if not all(0 <= token < size for token in ids):
                raise bad_request(f"{place} holds an id that is not from 0 to {size - 1}", place)
        else:
            raise bad_request(
                f"{place} should be a text or a list of token ids, or a list of either", place
            )
        if not ids:
            raise bad_request(f"{place} is empty; give at least one token", place)
        if len(ids) > self.context_length:
            raise self.too_long(len(ids), place)
        return ids

    def _check_ending(self, request: ChatRequest) -> None:
        if request.continue_final_message:
            last = request.messages[-1] if request.messages else None
            if last is None or last.role != "assistant" or last.tool_calls or not last.content:
                raise bad_request(
                    "continue_final_message goes on with the last message, which should be a text "
                    "of the assistant's",
                    "continue_final_message",
                )
        begins = request.add_generation_prompt
        if begins is not None and begins is request.continue_final_message:
            raise bad_request(
                "add_generation_prompt and continue_final_message are opposites; give one",
                "add_generation_prompt",
            )

    def _turn(self, number: int, message: ChatMessage) -> dict[str, Any]:
        place = f"messages[{number}]"
        if message.role not in _ROLES:
            raise bad_request(f"{place}.role should be one of {', '.join(_ROLES)}", f"{place}.role")
        role = "system" if message.role in SYSTEMS else message.role
        if role == "tool":
            if not self.takes_tools:
                raise bad_request(
                    f"{place} has the role tool, and this model's chat template knows no tools",
                    f"{place}.role",
                )
            if not message.tool_call_id:
                raise bad_request(
                    f"{place} has the role tool and should name its call in tool_call_id",
                    f"{place}.tool_call_id",
                )
        turn: dict[str, Any] = {"role": role, "content": self._content(message, place)}
        if message.name is not None:
            turn["name"] = message.name
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            turn["tool_calls"] = self._calls(message, place)
        return turn

    def _content(self, message: ChatMessage, place: str) -> str:
        content = message.content
        if content is None:
            if message.role == "assistant" and message.tool_calls:
                return ""
            raise bad_request(f"{place}.content should be text, not null", f"{place}.content")
        if isinstance(content, str):
            return content
        texts = []
        for part_number, part in enumerate(content):
            text = part.get("text")
            if part.get("type") != "text" or not isinstance(text, str):
                raise bad_request(
                    f"{place}.content[{part_number}] should be a part of the type text; the model "
                    "reads text only",
                    f"{place}.content[{part_number}]",
                )
            texts.append(text)
        return "".join(texts)

    def _calls(self, message: ChatMessage, place: str) -> list[dict[str, Any]]:
        if message.role != "assistant" or not self.takes_tools:
            raise bad_request(
                f"{place}.tool_calls belongs to a turn of the assistant's, and to a model whose "
                "chat template knows tools",
                f"{place}.tool_calls",
            )
        calls = []
        for number, call in enumerate(message.tool_calls or ()):
            where = f"{place}.tool_calls[{number}]"
            try:
                arguments = parse_json(call.function.arguments, "it", SettingsError)
            except SettingsError:
                arguments = None
            if not isinstance(arguments, dict):
                raise bad_request(
                    f"{where}.function.arguments should be a JSON object in a text",
                    f"{where}.function.arguments",
                )
            function = {"name": call.function.name, "arguments": arguments}
            calls.append({"type": "function", "id": call.id or "", "function": function})
        return calls


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
