"""A conversation with a model: its history, and replies that are streamed as they are written.

Several replies may be written at once, in turns, in threads or in tasks of asyncio.

It works with model folders of every form. An ONNX folder needs neither PyTorch nor transformers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from mistill.chat.kept_conversation import Message, read_conversation
from mistill.chat.reply import Ending, Reply, Speed, WrittenReply, write_reply
from mistill.chat.settings import ChatSettings
from mistill.chat.stream_text import TextStream
from mistill.constraints import ConstrainedChoice, Constraint, ConstraintTokens
from mistill.engine.language_model import LOOK_UP, Choose, LanguageModel, Provider
from mistill.engine.log_probabilities import Scored, TokenScore
from mistill.engine.opening import open_model
from mistill.engine.sampling import (
    Sampler,
    SamplingSettings,
    own_sampling,
)
from mistill.errors import ContextError, FolderError, VocabularyError
from mistill.settings import (
    require,
    settings_from,
    settings_with,
)
from mistill.sources.source import resolve_model
from mistill.text.answers import prompt_ids, unwritten_turn
from mistill.text.conversation import Conversation
from mistill.text.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from mistill.chat.options import ChatOptions
    from mistill.engine.onnx_model import OnnxModel

_log = logging.getLogger(__name__)


class ChatBot:
    """A model to talk to.

    Attributes:
        history: The conversation so far: messages with ``role`` and ``content``, the system's
            first if there is one. It may be changed between replies.
        settings: How replies are sampled, and when they end.
        last_speed: Speed of the reply that ended last; None before the first one.
        last_ending: Reason for the end of that reply; None before the first one.
        last_scores: How probable each token of the reply that was begun last was, the one that
            ends the turn included; empty if that was not asked for.
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
        **options: Unpack[ChatOptions],
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
            provider: Execution provider of an ONNX folder: ``cpu``, ``cuda``, ``tensorrt``,
                ``coreml`` or ``directml``.
            draft: Source of draft tokens for speculative decoding of an ONNX folder: ``lookup``,
                or the ONNX folder of a draft model with the same vocabulary.
            exact: Whether a greedy reply, and one with a seed, must depend on the conversation
                alone: not on a draft, whose speculative decoding is off for a model that cannot
                guarantee that, and not on what the model read before. Earlier replies are read
                again for that, because ONNX Runtime rounds otherwise where it writes.
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
        self._own_sampling = own_sampling(folder)
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
        self._exact = exact
        # Weak, so that a reply that nobody reads any more ends by itself.
        self._replies: weakref.WeakSet[Reply] = weakref.WeakSet()
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
        with self._turns:
            if system is not None:
                self._system = system
            self.history = [] if self._system is None else [_message("system", self._system)]
            self._forgotten = 0
            self._asked: Counter[int] = Counter()
            # Replies that were begun before do not join the history.
            self._talk = object()
        self.end_reply()

    def reply(
        self,
        text: str,
        *,
        constraint: Constraint | None = None,
        log_probabilities: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> Reply:
        """Stream the reply to a message.

        The turn is added to the history when the reply ends. Of a reply that is closed or
        interrupted, the text so far is added; if there is none, the turn is not added. Each of
        several replies at once continues the history as it was when it was asked for.

        Args:
            text: Message of the user.
            constraint: Constraint on this reply; None takes the constraint on every reply.
            log_probabilities: How many of the most probable tokens to keep for each position in
                ``last_scores``; 0 keeps the written token's alone, None keeps nothing.
            **options: Fields of ``ChatSettings`` that this reply has otherwise.

        Returns:
            A generator of parts of the reply, none of which is empty or breaks a character.

        Raises:
            ContextError: If the conversation has become longer than the model's context.
            SettingsError: If an option is not known or out of range.
        """
        started = time.perf_counter()
        settings = settings_with(self.settings, options)
        sampling = settings.sampling(self._own_sampling)
        require(
            log_probabilities is None or log_probabilities >= 0,
            f"log_probabilities must be 0 or more, not {log_probabilities}",
        )
        with self._turns:
            question = _message("user", text)
            prompt = self._prompt(question, settings)
            choose: Choose = Sampler(sampling, self._random(sampling, prompt), seen=prompt)
            form = constraint or self._constraint
            if form is not None:
                choose = ConstrainedChoice(form, self._tokens_of_forms(), choose)
            self.last_scores = []
            if log_probabilities is not None:
                choose = Scored(choose, log_probabilities)
                self.last_scores = choose.scores
            written = WrittenReply(
                prompt_tokens=len(prompt), seconds_before=0.0, scores=self.last_scores
            )
            talk = self._talk
            parts = write_reply(
                written,
                self._written_tokens(prompt, choose, sampling),
                TextStream(self._vocabulary, settings.stop, every_byte=form is not None),
                end_ids=self._end_ids,
                max_new_tokens=settings.max_new_tokens,
                ended=lambda written: self._ended(talk, question, written),
            )
            written.seconds_before = time.perf_counter() - started
            reply = Reply(written, parts)
            self._replies.add(reply)
            return reply

    async def stream(
        self,
        text: str,
        *,
        constraint: Constraint | None = None,
        log_probabilities: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncIterator[str]:
        """Stream the reply to a message in a program of asyncio, which goes on meanwhile.

        Args:
            text: Message of the user.
            constraint: As for ``reply``.
            log_probabilities: As for ``reply``.
            **options: Fields of ``ChatSettings`` that this reply has otherwise.

        Yields:
            Parts of the reply, none of which is empty or breaks a character.
        """
        reply = await asyncio.to_thread(
            self.reply,
            text,
            constraint=constraint,
            log_probabilities=log_probabilities,
            **options,
        )
        try:
            while (part := await asyncio.to_thread(next, reply, None)) is not None:
                yield part
        finally:
            await asyncio.to_thread(reply.close)

    def end_reply(self) -> None:
        """End the replies that are not read to their end, as closing them does.

        One of which another thread is reading a part goes on.
        """
        with self._turns:
            replies = list(self._replies)
        for reply in replies:
            reply.close_if_idle()

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
        """Continue a conversation that ``save`` wrote, without reading it again.

        At temperature 0 and with a seed, its replies are read again; see ``exact``.

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
        history, self._forgotten = read_conversation(notes["conversation"], file)
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

    def _random(self, settings: SamplingSettings, prompt: list[int]) -> np.random.Generator:
        """Random numbers of one reply: with a seed the same whenever the same is asked anew."""
        if settings.seed is None:
            return np.random.default_rng()
        key = hash(tuple(prompt))
        number = len(self.history) - self._first_turn(), self._asked[key]
        self._asked[key] += 1
        return np.random.default_rng(
            settings.seed if number == (0, 0) else (settings.seed, *number)
        )

    def _written_tokens(
        self, prompt: list[int], choose: Choose, settings: SamplingSettings
    ) -> Iterator[int]:
        from mistill.engine.onnx_model import OnnxModel
        from mistill.engine.speculation import SpeculativeModel

        repeatable = self._exact and (settings.temperature == 0 or settings.seed is not None)
        if isinstance(self._model, OnnxModel | SpeculativeModel):
            return self._model.stream(prompt, choose, repeatable=repeatable)
        return self._model.stream(prompt, choose)

    def _ended(self, talk: object, question: Message, written: WrittenReply) -> None:
        with self._turns:
            self.last_ending, self.last_speed = written.ending, written.speed
            has_reply = written.text or written.ending != "interrupted"
            if has_reply and talk is self._talk:
                self.history += [question, _message("assistant", written.text)]

    def _prompt(self, question: Message, settings: ChatSettings) -> list[int]:
        """The tokens of the conversation, with the oldest turns left out if necessary."""
        context = self._model.context_length
        forgotten = self._forgotten
        prompt = self._tokens(forgotten, question)
        if settings.overflow == "slide":
            room = min(settings.max_new_tokens, context // 4)
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
        probe = Conversation((*self.history, _message("user", "?")))
        if unwritten_turn(probe, self._vocabulary) == 0:
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


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
