"""A conversation with a model: its history, and replies that are streamed as they are written.

It works with model folders of every form. An ONNX folder needs neither PyTorch nor transformers.
"""

from __future__ import annotations

import inspect
import json
import logging
import threading
import time
import weakref
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from mistill.chat.stream_text import TextStream
from mistill.constraints import ConstrainedChoice, Constraint, ConstraintTokens
from mistill.engine.language_model import LOOK_UP, Choose, LanguageModel, Provider
from mistill.engine.log_probabilities import Scored, TokenScore
from mistill.engine.opening import open_model
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.errors import ContextError, FolderError, VocabularyError
from mistill.folders.json_text import parse_json
from mistill.settings import require, require_choice, require_range, settings_from
from mistill.sources.source import resolve_model
from mistill.text.answers import prompt_ids, unwritten_turn
from mistill.text.conversation import Conversation
from mistill.text.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from mistill.engine.onnx_model import OnnxModel

_log = logging.getLogger(__name__)

Overflow = Literal["refuse", "slide"]
Ending = Literal["end of turn", "stop string", "max_new_tokens", "context", "interrupted"]
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ChatSettings(SamplingSettings):
    """How replies are sampled, and when they end.

    Attributes:
        max_new_tokens: The most tokens of one reply.
        stop: Strings that end a reply and are not part of it.
        overflow: What happens when the conversation no longer fits into the model's context:
            ``refuse`` ends with an error, ``slide`` leaves out the oldest turns.
    """

    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    overflow: Overflow = "refuse"

    def __post_init__(self) -> None:
        """Refuse settings out of their ranges."""
        super().__post_init__()
        require_range("max_new_tokens", self.max_new_tokens, 1)
        require(
            not isinstance(self.stop, str), f"stop must be a list of strings, not {self.stop!r}"
        )
        require("" not in self.stop, "an empty stop string would end every reply; leave it out")
        require_choice("overflow", self.overflow, get_args(Overflow))


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a reply was.

    Attributes:
        prompt_tokens: Tokens of the whole conversation up to the reply, whether the model read
            them anew or had them in its cache.
        first_token_seconds: From the question to the reply's first token.
        new_tokens: Tokens of the reply, the one that ends the turn included.
        tokens_per_second: Speed of decoding, after the first token; 0 if there was only one.
    """

    prompt_tokens: int
    first_token_seconds: float
    new_tokens: int
    tokens_per_second: float


class ChatBot:
    """A model to talk to.

    Attributes:
        history: The conversation so far: messages with ``role`` and ``content``, the system's
            first if there is one. It may be changed between replies.
        settings: How replies are sampled, and when they end.
        last_speed: Speed of the last reply; None before the first one.
        last_ending: Reason for the end of the last reply; None before the first one.
        last_scores: How probable each token of the last reply was, the one that ends the turn
            included; empty if that was not asked for.
    """

    history: list[Message]
    settings: ChatSettings
    last_speed: Speed | None
    last_ending: Ending | None
    last_scores: list[TokenScore]

    def __init__(
        self,
        folder: str | Path,
        *,
        system: str | None = None,
        settings: ChatSettings | None = None,
        model: LanguageModel | None = None,
        threads: int | None = None,
        provider: Provider = "cpu",
        draft: str | Path | None = None,
        exact: bool = True,
        constraint: Constraint | None = None,
        **options: Any,
    ) -> None:
        """Open a folder to chat with.

        Args:
            folder: An ONNX folder, or where PyTorch is installed a model folder or whatever else
                names a model.
            system: The system prompt of the conversation.
            settings: How replies are sampled, and when they end; or give the fields as options.
            model: The folder as a running model, if it is open already; for a draft model, opened
                with ``alone=False``.
            threads: Number of threads; None takes one for each processor that may be used.
            provider: Execution provider of an ONNX folder: ``cpu``, ``cuda`` or ``tensorrt``.
            draft: Source of draft tokens for speculative decoding of an ONNX folder: ``lookup``,
                or the ONNX folder of a draft model with the same vocabulary.
            exact: Whether greedy replies must be, token for token, what they are without a draft;
                speculative decoding is off for a model that cannot guarantee that.
            constraint: The constraint on every reply, for constrained decoding.
            **options: Fields of ``ChatSettings``.

        Raises:
            MissingExtraError: If the folder needs a library that is not installed.
            VocabularyError: If the folder has no chat template, or the draft model has another
                vocabulary.
            ContextError: If the system prompt leaves no room for a message.
            TextError: If the system prompt is no UTF-8 text, or the template refuses it.
        """
        self.settings = settings_from(ChatSettings, settings, options)
        folder = resolve_model(folder)
        self._vocabulary = load_vocabulary(folder)
        if self._vocabulary.chat_template is None:
            raise VocabularyError(
                f"{folder} has no chat template, so it cannot hold a conversation; use a chat "
                "model, or write a template to chat_template.jinja"
            )
        self._constraint = constraint
        self._constraint_tokens: ConstraintTokens | None = None
        if model is None:
            alone = draft is None or str(draft) == LOOK_UP
            model = open_model(folder, threads=threads, provider=provider, alone=alone)
        self._model = model
        if draft is not None:
            from mistill.engine.speculation import with_draft

            self._model = with_draft(self._model, draft, exact=exact)
        self._end_ids = frozenset(self._vocabulary.end_ids)
        self._system = system
        # Weak, so that a reply that nobody reads any more ends by itself.
        self._reply: weakref.ref[Generator[str, None, None]] | None = None
        self._reader: threading.Thread | None = None
        self._turns = threading.RLock()
        self.last_speed = None
        self.last_ending = None
        self.last_scores = []
        self.reset()
        self._check_system(folder)

    def reset(self, *, system: str | None = None) -> None:
        """Remove the conversation from the history.

        Args:
            system: Another system prompt; None keeps the present one.
        """
        self.end_reply()
        if system is not None:
            self._system = system
        self.history = [] if self._system is None else [_message("system", self._system)]
        self._forgotten = 0
        self._generator = np.random.default_rng(self.settings.seed)

    def reply(
        self,
        text: str,
        *,
        constraint: Constraint | None = None,
        log_probabilities: int | None = None,
    ) -> Generator[str, None, None]:
        """Stream the reply to a message.

        The turn is added to the history when the reply ends. Of a reply that is closed or
        interrupted, the text so far is added; if there is none, the turn is not added.

        Args:
            text: Message of the user.
            constraint: Constraint on this reply; None takes the constraint on every reply.
            log_probabilities: How many of the most probable tokens to keep for each position in
                ``last_scores``; 0 keeps the written token's alone, None keeps nothing.

        Returns:
            A generator of parts of the reply, none of which is empty or breaks a character.

        Raises:
            ContextError: If the conversation has become longer than the model's context.
            SettingsError: If another thread is reading a reply.
        """
        with self._turns:
            self.end_reply()
            started = time.perf_counter()
            require(
                log_probabilities is None or log_probabilities >= 0,
                f"log_probabilities must be 0 or more, not {log_probabilities}",
            )
            question = _message("user", text)
            prompt = self._prompt(question)
            choose: Choose = Sampler(self.settings, self._generator, seen=prompt)
            form = constraint or self._constraint
            if form is not None:
                choose = ConstrainedChoice(form, self._tokens_of_forms(), choose)
            self.last_scores = []
            if log_probabilities is not None:
                choose = Scored(choose, log_probabilities)
                self.last_scores = choose.scores
            stream = TextStream(self._vocabulary, self.settings.stop, every_byte=form is not None)
            reply = self._answer(question, prompt, choose, stream, time.perf_counter() - started)
            self._reply, self._reader = weakref.ref(reply), threading.current_thread()
            return reply

    def end_reply(self) -> None:
        """End the reply that is being read, if there is one, as closing it does.

        Raises:
            SettingsError: If another thread is reading it.
        """
        with self._turns:
            reply = None if self._reply is None else self._reply()
            if reply is not None and inspect.getgeneratorstate(reply) != inspect.GEN_CLOSED:
                reader = self._reader
                require(
                    reader is None or reader is threading.current_thread() or not reader.is_alive(),
                    "another thread is reading a reply of this chatbot; wait for its end, or open "
                    "a ChatBot for each thread",
                )
                reply.close()
            self._reply = None

    def save(self, file: str | Path) -> Path:
        """Save the conversation and its KV cache.

        Args:
            file: A safetensors file to write; replaced if it exists.

        Returns:
            The file.

        Raises:
            SettingsError: If the model does not run in ONNX Runtime.
        """
        self.end_reply()
        state = {"history": self.history, "forgotten": self._forgotten}
        return self._engine().save_cache(file, conversation=json.dumps(state, ensure_ascii=False))

    def restore(self, file: str | Path) -> None:
        """Continue a conversation that ``save`` wrote; nothing of it is read again.

        A system prompt that this chatbot was given takes the place of the saved one; the
        conversation is then read anew.

        Args:
            file: Path of the file.

        Raises:
            FolderError: If it is damaged, was written by another model or holds no conversation.
            SettingsError: If the model does not run in ONNX Runtime.
        """
        self.end_reply()
        notes = self._engine().restore_cache(file)
        if "conversation" not in notes:
            raise FolderError(f"{file} holds no conversation; make one with ChatBot.save")
        history, self._forgotten = _conversation(notes["conversation"], file)
        if self._system is not None:
            others = (message for message in history if message["role"] != "system")
            history = [_message("system", self._system), *others]
        self.history = history

    def _engine(self) -> OnnxModel:
        from mistill.engine.onnx_model import OnnxModel

        model = getattr(self._model, "model", self._model)
        require(
            isinstance(model, OnnxModel),
            "only a conversation with an ONNX folder can be saved; export the model",
        )
        assert isinstance(model, OnnxModel)
        return model

    def _tokens_of_forms(self) -> ConstraintTokens:
        if self._constraint_tokens is None:
            self._constraint_tokens = ConstraintTokens(self._vocabulary)
        return self._constraint_tokens

    def _answer(
        self,
        question: Message,
        prompt: list[int],
        choose: Choose,
        text: TextStream,
        seconds_before: float,
    ) -> Generator[str, None, None]:
        tokens = self._model.stream(prompt, choose)
        pieces: list[str] = []
        seconds: list[float] = []
        ending: Ending | None = None
        try:
            while ending is None:
                before = time.perf_counter()
                token = next(tokens, None)
                if token is None:
                    ending = "context"
                    break
                seconds.append(time.perf_counter() - before)
                if token in self._end_ids:
                    ending = "end of turn"
                    break
                pieces.append(text.add(token))
                if text.stopped:
                    ending = "stop string"
                elif len(seconds) == self.settings.max_new_tokens:
                    ending = "max_new_tokens"
                if pieces[-1]:
                    yield pieces[-1]
            pieces.append(text.finish())
            if pieces[-1]:
                yield pieces[-1]
        finally:
            self.last_ending = ending or "interrupted"
            self.last_speed = _speed(len(prompt), seconds_before, seconds)
            if ending is not None or any(pieces):
                self.history += [question, _message("assistant", "".join(pieces))]

    def _prompt(self, question: Message) -> list[int]:
        """The tokens of the conversation, with the oldest turns left out if necessary."""
        context = self._model.context_length
        forgotten = self._forgotten
        prompt = self._tokens(forgotten, question)
        if self.settings.overflow == "slide":
            room = min(self.settings.max_new_tokens, context // 4)
            turns = iter(self._turns_after(forgotten))
            # Half of the context is freed at once, because the remaining turns must be read again.
            limit = context - room
            while len(prompt) > limit and (turn := next(turns, None)) is not None:
                limit = context // 2
                forgotten = turn
                prompt = self._tokens(forgotten, question)
        if len(prompt) >= context:
            alone = self._tokens(len(self.history) - self._first_turn(), _message("user", "?"))
            if len(alone) >= context:
                raise ContextError(self._too_long_a_system(len(alone)))
            raise ContextError(
                f"the conversation has {len(prompt)} tokens and the model's context holds "
                f"{context}, the reply included; {self._advice(forgotten)}"
            )
        self._forgotten = forgotten
        return prompt

    def _check_system(self, folder: Path) -> None:
        """Refuse a system prompt that fills the context, and warn of one that is not written."""
        if not self.history:
            return
        asked = Conversation((*self.history, _message("user", "?")))
        if unwritten_turn(asked, self._vocabulary) == 0:
            _log.warning("the chat template of %s does not write the system prompt", folder)
        tokens = len(self._tokens(0, _message("user", "?")))
        if tokens >= self._model.context_length:
            raise ContextError(self._too_long_a_system(tokens))

    def _too_long_a_system(self, tokens: int) -> str:
        return (
            f"the system prompt takes {tokens} tokens and the model's context holds "
            f"{self._model.context_length}, the message and the reply included; shorten the "
            "system prompt"
        )

    def _tokens(self, forgotten: int, question: Message) -> list[int]:
        first = self._first_turn()
        messages = [*self.history[:first], *self.history[first + forgotten :], question]
        ids = prompt_ids(Conversation(tuple(messages)), self._vocabulary)
        if not ids:
            raise VocabularyError(f"the chat template of {self._vocabulary!r} writes nothing")
        return ids

    def _first_turn(self) -> int:
        """Index of the first message after the system prompt."""
        roles = [message["role"] for message in self.history]
        return next((index for index, role in enumerate(roles) if role != "system"), len(roles))

    def _turns_after(self, forgotten: int) -> list[int]:
        """Numbers of messages that can be left out so that a turn begins after them, ascending."""
        turns = self.history[self._first_turn() :]
        starts = [index for index, message in enumerate(turns) if message["role"] == "user"]
        return [index for index in [*starts, len(turns)] if index > forgotten]

    def _advice(self, forgotten: int) -> str:
        if len(self.history) - self._first_turn() <= forgotten:
            return "shorten the message"
        return "start a new conversation, or set overflow to slide to leave out the oldest turns"


def _conversation(text: str, file: str | Path) -> tuple[list[Message], int]:
    """The history and the number of messages left out, as ``save`` wrote them."""
    try:
        state = parse_json(text, str(file))
        history = [_message(one["role"], one["content"]) for one in state["history"]]
        words = [word for message in history for word in message.values()]
        forgotten = state["forgotten"]
        sound = all(isinstance(word, str) for word in words) and type(forgotten) is int
    except (FolderError, KeyError, TypeError):
        sound = False
    if not sound or not 0 <= forgotten <= len(history):
        raise FolderError(f"the conversation in {file} is damaged; give another file")
    return history, forgotten


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _speed(prompt_tokens: int, seconds_before: float, seconds: list[float]) -> Speed:
    """Speed from the time that each token of a reply took."""
    later = sum(seconds[1:])
    return Speed(
        prompt_tokens=prompt_tokens,
        first_token_seconds=seconds_before + sum(seconds[:1]),
        new_tokens=len(seconds),
        tokens_per_second=(len(seconds) - 1) / later if later else 0.0,
    )
