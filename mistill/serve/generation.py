"""From a request to the jobs that write its replies: sampling, bounds, forms."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import numpy as np

from mistill import constraints
from mistill.chat.stream_text import TextStream
from mistill.constraints import ConstrainedChoice, Constraint, ConstraintTokens
from mistill.engine.language_model import Choose
from mistill.engine.log_probabilities import Scored
from mistill.engine.sampling import ChangedLogits, Sampler, SamplingSettings
from mistill.engine.scheduler import Job, Scheduler
from mistill.errors import MissingExtraError, SettingsError
from mistill.serve.counts import Counts
from mistill.serve.prompts import Prompts
from mistill.serve.refusals import RefusalError, bad_request, busy
from mistill.serve.replies import DueInboxes, Inbox, Reply
from mistill.serve.requests import ChatRequest, Generation
from mistill.serve.settings import Limits, ServeSettings
from mistill.text.vocabulary import Vocabulary

ResultT = TypeVar("ResultT")
ParametersT = ParamSpec("ParametersT")
_MOST_CONSTRAINTS = 64
_WAITING_FOR_EACH = 16


class Served:
    """A model that is served.

    Attributes:
        name: What clients call it.
        vocabulary: Its vocabulary.
        prompts: Makes prompts of requests.
        scheduler: Writes the replies.
        settings: The settings of the server.
        sampling: How replies are sampled that do not say how.
        limits: Bounds on what a request may ask for.
        context_length: Positions that a conversation may have.
        end_ids: Tokens that end a turn.
        workers: Threads that read and render requests.
        counts: What was served.
        due: The inboxes in which something is due.
    """

    name: str
    vocabulary: Vocabulary
    prompts: Prompts
    scheduler: Scheduler
    settings: ServeSettings
    sampling: SamplingSettings
    limits: Limits
    context_length: int
    end_ids: frozenset[int]
    workers: Workers
    counts: Counts
    due: DueInboxes

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        scheduler: Scheduler,
        settings: ServeSettings,
        sampling: SamplingSettings,
        limits: Limits,
        due: DueInboxes,
    ) -> None:
        """Take a model that runs.

        Args:
            name: What clients call it.
            vocabulary: Its vocabulary.
            scheduler: Writes the replies.
            settings: The settings of the server.
            sampling: How replies are sampled that do not say how.
            limits: Bounds on what a request may ask for.
            due: The inboxes in which something is due; the scheduler lets it tell after each step.
        """
        self.name = name
        self.vocabulary = vocabulary
        self.scheduler = scheduler
        self.settings = settings
        self.sampling = sampling
        self.limits = limits
        self.due = due
        self.context_length = scheduler.model.context_length
        self.prompts = Prompts(vocabulary, self.context_length, limits)
        self.end_ids = frozenset(vocabulary.end_ids)
        self.workers = Workers(limits.preparing)
        self.counts = Counts(scheduler)
        self._constraints: OrderedDict[str, Constraint] = OrderedDict()
        self._constraint_tokens: ConstraintTokens | None = None
        self._lock = threading.Lock()
        self._compiling = threading.BoundedSemaphore(max(1, limits.preparing // 2))

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Args:
            name: What the request calls it.

        Raises:
            RefusalError: If that is not its name, and not any name will do.
        """
        if name is not None and name != self.name and not self.settings.any_model:
            raise RefusalError(
                404,
                f"this server has the model {self.name} and no other",
                param="model",
                code="model_not_found",
            )

    def replies(
        self,
        request: Generation,
        prompts: Sequence[list[int]],
        inbox: Inbox,
        *,
        owner: str,
        max_new_tokens: int,
        top: int | None = None,
        prompt_scores: bool = False,
        constraint: Constraint | None = None,
        shown_tokens: Sequence[int] = (),
        every_byte: bool = False,
        urgent: str | None = None,
    ) -> list[Reply]:
        """The replies of a request, each with its job.

        Args:
            request: How they are sampled, and when they end.
            prompts: Token ids of each prompt.
            inbox: Where their events go.
            owner: Whose request it is.
            max_new_tokens: The most tokens of a reply; 0 only reads the prompts.
            top: How many of the most probable tokens to list; None records no probabilities.
            prompt_scores: Whether to record those of the prompts too.
            constraint: The form of the replies.
            shown_tokens: Special tokens that become text.
            every_byte: Whether a reply goes on with a text, whose next space belongs to it.
            urgent: Text after which the client is told at once.

        Returns:
            For each prompt as many as the request asks for.

        Raises:
            RefusalError: If a field of the request is out of its bounds.
        """
        settings = self._sampling(request)
        stop = self._stop(request)
        bias = self._bias(request.logit_bias)
        if request.choices > self.scheduler.slots:
            raise bad_request(
                f"n is {request.choices}, and the server writes at most {self.scheduler.slots} "
                "replies at once",
                "n",
            )
        if len(prompts) * request.choices > self.limits.prompts:
            raise bad_request(
                f"{len(prompts)} prompts with {request.choices} choices each are more than "
                f"{self.limits.prompts} replies",
                "n",
            )
        end_ids = frozenset() if request.ignore_eos else self.end_ids
        replies = []
        for number, prompt in enumerate(prompts):
            for choice in range(request.choices):
                choose: Choose = Sampler(settings, _generator(settings.seed, choice), seen=prompt)
                if bias or request.presence_penalty or request.frequency_penalty:
                    choose = ChangedLogits(
                        choose,
                        bias=bias,
                        presence_penalty=request.presence_penalty or 0.0,
                        frequency_penalty=request.frequency_penalty or 0.0,
                    )
                if constraint is not None:
                    choose = self._constrained(constraint, choose)
                scored = None if top is None else Scored(choose, top)
                text = TextStream(
                    self.vocabulary,
                    stop,
                    every_byte=every_byte or constraint is not None,
                    shown=shown_tokens,
                )
                reply = Reply(
                    number * request.choices + choice,
                    prompt,
                    inbox,
                    text,
                    end_ids,
                    scored,
                    urgent,
                )
                reply.job = Job(
                    prompt=list(prompt),
                    max_new_tokens=max_new_tokens,
                    choose=scored or choose,
                    end_ids=end_ids,
                    sink=reply,
                    owner=owner,
                    repeatable=settings.seed is not None or settings.temperature == 0,
                    prompt_scores=reply.scorer(top or 0) if prompt_scores else None,
                )
                replies.append(reply)
        return replies

    def constraint(self, request: Generation) -> Constraint | None:
        """The form that a request asks for.

        Args:
            request: The request.

        Returns:
            The constraint; None where any text will do.

        Raises:
            RefusalError: If there is no such form, or it cannot be kept to.
        """
        form = request.response_format
        if form is None or form.type == "text":
            return None
        schema: object = {"type": "object"}
        if form.type == "json_schema":
            if form.json_schema is None:
                raise bad_request(
                    "response_format.json_schema is missing", "response_format.json_schema"
                )
            schema = form.json_schema.schema
        if form.type in ("json_object", "json_schema"):
            return self.schema_constraint(schema, "response_format")
        if form.type == "regex" and form.regex is not None:
            return self._compiled("regex", form.regex, "response_format")
        if form.type == "lark" and form.lark is not None:
            return self._compiled("lark", form.lark, "response_format")
        raise bad_request(
            "response_format.type should be text, json_object, json_schema, or regex or lark with "
            "a field of that name",
            "response_format.type",
        )

    def schema_constraint(self, schema: object, param: str) -> Constraint:
        """A JSON schema as a constraint.

        Args:
            schema: The schema.
            param: The field that holds it, for the refusal.

        Returns:
            The constraint.

        Raises:
            RefusalError: If it is too large, is none, or cannot be kept to.
        """
        if not isinstance(schema, Mapping):
            schema = {} if schema is True else {"not": {}}
        return self._compiled("json_schema", json.dumps(schema), param)

    def lark_constraint(self, grammar: str, param: str) -> Constraint:
        """A grammar as a constraint.

        Args:
            grammar: The grammar.
            param: The field that led to it, for the refusal.

        Returns:
            The constraint.

        Raises:
            RefusalError: If it cannot be kept to.
        """
        return self._compiled("lark", grammar, param)

    def _compiled(self, kind: str, text: str, param: str) -> Constraint:
        if len(text.encode()) > self.limits.schema_bytes:
            raise bad_request(f"{param} has more than {self.limits.schema_bytes} bytes", param)
        key = hashlib.sha256(f"{kind}:{text}".encode()).hexdigest()
        with self._lock:
            if key in self._constraints:
                self._constraints.move_to_end(key)
                return self._constraints[key]
        # Threads that compile are some of those that read requests, and must not become all.
        if not self._compiling.acquire(blocking=False):
            raise busy("too many new forms of replies at once; try again later", 2)
        try:
            compiled: Constraint = getattr(constraints, kind)(text)
        except (SettingsError, MissingExtraError) as error:
            raise bad_request(str(error)[:500], param) from None
        finally:
            self._compiling.release()
        with self._lock:
            self._constraints[key] = compiled
            while len(self._constraints) > _MOST_CONSTRAINTS:
                self._constraints.popitem(last=False)
        return compiled

    def _constrained(self, constraint: Constraint, choose: Choose) -> Choose:
        with self._lock:
            if self._constraint_tokens is None:
                self._constraint_tokens = ConstraintTokens(self.vocabulary)
        try:
            return ConstrainedChoice(constraint, self._constraint_tokens, choose)
        except SettingsError as error:
            raise bad_request(str(error)[:500], "response_format") from None

    def _sampling(self, request: Generation) -> SamplingSettings:
        # How a chatbot is sampled says nothing about texts that it continues.
        ours = self.sampling if isinstance(request, ChatRequest) else self.settings.sampling({})
        top_k = ours.top_k if request.top_k is None else max(0, request.top_k)

        def either(name: str) -> float:
            value = getattr(request, name)
            return float(getattr(ours, name) if value is None else value)

        try:
            return SamplingSettings(
                temperature=either("temperature"),
                top_k=top_k,
                top_p=either("top_p"),
                min_p=either("min_p"),
                repetition_penalty=either("repetition_penalty"),
                dry_multiplier=either("dry_multiplier"),
                dry_allowed_length=int(either("dry_allowed_length")),
                seed=ours.seed if request.seed is None else request.seed,
            )
        except SettingsError as error:
            raise bad_request(str(error), str(error).partition(" ")[0]) from None

    def _stop(self, request: Generation) -> list[str]:
        stop = request.stop
        strings = [] if stop is None else [stop] if isinstance(stop, str) else stop
        if len(strings) > self.limits.stops:
            raise bad_request(
                f"stop holds {len(strings)} strings; at most {self.limits.stops} are taken", "stop"
            )
        for string in strings:
            size = len(string.encode())
            if not 0 < size <= self.limits.stop_bytes:
                raise bad_request(
                    f"a stop string has {size} bytes; 1 to {self.limits.stop_bytes} are taken",
                    "stop",
                )
        return strings

    def _bias(self, given: Mapping[str, float] | None) -> dict[int, float]:
        bias: dict[int, float] = {}
        if given is not None and len(given) > self.limits.biases:
            raise bad_request(
                f"logit_bias has {len(given)} entries; at most {self.limits.biases} are taken",
                "logit_bias",
            )
        for token, value in (given or {}).items():
            known = token.isascii() and token.isdecimal() and len(token) <= 10
            if not known or int(token) >= self.vocabulary.size:
                raise bad_request(
                    "logit_bias should name tokens by their ids, from 0 to "
                    f"{self.vocabulary.size - 1}",
                    "logit_bias",
                )
            bias[int(token)] = value
        return bias


class Workers:
    """A few threads for what would keep the server's loop waiting: JSON, templates, schemas.

    How many calls wait for one is bounded.
    """

    def __init__(self, threads: int) -> None:
        """Make the threads, which start when they are needed.

        Args:
            threads: Their number.
        """
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mistill serve")
        self._most = threads * _WAITING_FOR_EACH
        self._calls = 0

    async def run(
        self,
        function: Callable[ParametersT, ResultT],
        *arguments: ParametersT.args,
        **options: ParametersT.kwargs,
    ) -> ResultT:
        """Call a function in one of the threads.

        Args:
            function: The function.
            *arguments: What it is given.
            **options: What it is given by name.

        Returns:
            Its result.

        Raises:
            RefusalError: If too many calls wait.
        """
        if self._calls >= self._most:
            raise busy("too many requests are being read; try again later", 1)
        self._calls += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, lambda: function(*arguments, **options))
        finally:
            self._calls -= 1

    def close(self) -> None:
        """Start no more calls; those that run are left to end."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _generator(seed: int | None, choice: int) -> np.random.Generator:
    """Random numbers of a reply; the first with a seed are those of the chatbot with that seed."""
    if seed is None:
        return np.random.default_rng()
    return np.random.default_rng(seed if choice == 0 else (seed, choice))
