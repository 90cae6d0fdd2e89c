"""A model folder as a model of lm-evaluation-harness (``lm_eval.api.model.TemplateLM``).

Importing this module needs the extra ``eval``. Probabilities are computed one forward pass at a
time: answers of one token to the same question, as in most multiple-choice tasks, share a pass.
Texts are written many at once by an ONNX folder, and one by one by others.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mistill.engine.log_probabilities import log_normalizers
from mistill.engine.onnx_model import OnnxModel
from mistill.engine.opening import open_model
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.engine.scheduler import Job, Reply, Scheduler
from mistill.errors import SettingsError
from mistill.progress import track
from mistill.text.vocabulary import Vocabulary, load_vocabulary

_DEFAULT_NEW_TOKENS = 256
_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Pair = tuple[Any, list[int], list[int]]


@register_model("mistill")
class MistillLM(TemplateLM):
    """Any model folder: float, GPTQ, NF4 or ONNX.

    After ``import benchmarks.harness_model`` lm-evaluation-harness knows it as ``mistill``, with
    ``model_args="folder=PATH"``.
    """

    def __init__(
        self, folder: str | Path, threads: int | None = None, seed: int = 0, **_: Any
    ) -> None:
        """Open a folder.

        Other arguments of lm-evaluation-harness, such as a device and a batch size, are ignored.

        Args:
            folder: The folder.
            threads: Threads to compute with; None counts the processors that may be used.
            seed: Random seed for tasks that sample text.
        """
        super().__init__()
        self.model = open_model(folder, threads=int(threads) if threads else None)
        self.vocabulary = load_vocabulary(folder)
        self._name = str(folder)
        self._generator = np.random.default_rng(int(seed))

    @property
    def max_length(self) -> int:
        """Context of the model in tokens."""
        return self.model.context_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.vocabulary.end_ids[0] if self.vocabulary.end_ids else 0

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: that of the beginning, or else of the end.

        As for the harness's own transformers models, the tokenizer itself need not write it.
        """
        begin = self.vocabulary.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Identifies tokenizer and chat template in the harness's cache of requests."""
        return f"mistill-{self.vocabulary.fingerprint()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template, for the record.

        Args:
            chat_template: Whether it is used.

        Returns:
            Its text; empty if it is not used or there is none.
        """
        return (self.vocabulary.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the chat template.

        Args:
            chat_history: Turns.
            add_generation_prompt: Whether the assistant's turn begins at the end.

        Returns:
            The text.
        """
        if add_generation_prompt or chat_history[-1]["role"] != "assistant":
            return self.vocabulary.render(chat_history, add_generation_prompt)
        # The last turn is unfinished and to be continued: no end of turn may follow it.
        begun = self.vocabulary.render(chat_history[:-1], add_generation_prompt=True)
        return begun + chat_history[-1]["content"]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode a text, with the token for the beginning where the tokenizer writes it.

        Args:
            string: The text.
            add_special_tokens: False leaves the token for the beginning out.

        Returns:
            Token ids.
        """
        ids = self.vocabulary.encode(string)
        begin = self.vocabulary.bos_id
        adds_begin = self.vocabulary.adds_bos and add_special_tokens is not False
        if not adds_begin or begin is None or ids[:1] == [begin]:
            return ids
        return [begin, *ids]

    # --- probabilities --------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would write it.

        Args:
            requests: Key, tokens of the context, tokens of the continuation.
            disable_tqdm: Ignored.

        Returns:
            One pair for each request.
        """
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        longest = max((len(after) for _, _, after in requests), default=0)
        if longest > self.max_length:
            raise SettingsError(
                f"an answer of the task has {longest} tokens, and the model has a context of "
                f"{self.max_length}; leave out the task"
            )
        with track("scoring", len(requests), "answers") as tracker:
            for ids, indices in _by_input(requests):
                logits = self._logits(ids)
                normalizers = log_normalizers(logits[-self._longest(requests, indices) :])
                for index in indices:
                    targets = np.array(requests[index][2])
                    rows = logits[-len(targets) :]
                    target_logits = rows[np.arange(len(targets)), targets].astype(np.float64)
                    total = float((target_logits - normalizers[-len(targets) :]).sum())
                    results[index] = total, bool((rows.argmax(axis=1) == targets).all())
                    name = requests[index][0]
                    if isinstance(name, tuple):
                        self.cache_hook.add_partial("loglikelihood", name, results[index])
                    tracker.advance()
        return results

    @staticmethod
    def _longest(requests: Sequence[Pair], indices: Sequence[int]) -> int:
        return max(len(requests[index][2]) for index in indices)

    def _logits(self, ids: Sequence[int]) -> Any:
        """Logits of the last tokens that fit into the context, shape (T, V)."""
        window = np.array(ids[-self.max_length :], np.int64)
        return self.model.logits(window[None])[0]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows as long as the context.

        Args:
            requests: Texts.
            disable_tqdm: Ignored.

        Returns:
            One number for each text.
        """
        totals = []
        for request in requests:
            (text,) = request.args
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            pairs: list[Pair] = [(None, before, after) for before, after in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    # --- text -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until a stop string, the end of a turn, or a number of tokens.

        Args:
            requests: Texts, each with generation options.
            disable_tqdm: Ignored.

        Returns:
            The continuations, without the stop string.
        """
        begun = (self._begun(*request.args) for request in requests)
        replies = []
        with track("writing", len(requests), "replies") as tracker:
            for request, text in zip(requests, self._texts(begun), strict=True):
                replies.append(text)
                self.cache_hook.add_partial("generate_until", request.args, text)
                tracker.advance()
        return replies

    def _begun(self, context: str, options: dict[str, Any]) -> _Continuation:
        generation = normalize_gen_kwargs(options, _DEFAULT_NEW_TOKENS)
        max_new_tokens = int(generation["max_gen_toks"])
        if max_new_tokens >= self.max_length:
            raise SettingsError(
                f"the task asks for {max_new_tokens} new tokens, and the model has a context of "
                f"{self.max_length}; set a smaller max_gen_toks"
            )
        # As for the harness's own transformers models, no token for the beginning is added where
        # the tokenizer writes none.
        prompt = self.tok_encode(context)[-(self.max_length - max_new_tokens) :]
        stops = [stop for stop in generation["until"] if stop]
        return _Continuation(
            prompt or [self.prefix_token_id],
            max_new_tokens,
            self._choice(generation),
            self.vocabulary,
            stops,
        )

    def _texts(self, begun: Iterable[_Continuation]) -> Iterator[str]:
        """The texts one by one, or of an ONNX folder many at once."""
        end_ids = self.vocabulary.end_ids
        if not isinstance(self.model, OnnxModel):
            for one in begun:
                for token in islice(self.model.stream(one.prompt, one.choose), one.most):
                    if token in end_ids:
                        break
                    one.ids.append(token)
                    if not one.goes_on(one.ids):
                        break
                yield one.text()
            return
        with Scheduler(self.model) as scheduler:
            # Each waits for a reply before its own, so that the queue is never full.
            waiting: deque[tuple[_Continuation, Reply]] = deque()
            for one in begun:
                if len(waiting) == scheduler.slots + scheduler.queue:
                    yield _finished(*waiting.popleft(), end_ids)
                reply = Reply(one.goes_on)
                scheduler.submit(
                    Job(
                        prompt=one.prompt,
                        max_new_tokens=one.most,
                        choose=one.choose,
                        end_ids=end_ids,
                        sink=reply,
                        repeatable=True,
                    )
                )
                waiting.append((one, reply))
            for one, reply in waiting:
                yield _finished(one, reply, end_ids)

    def _choice(self, generation: dict[str, Any]) -> Sampler:
        sampling = {name: generation[name] for name in _SAMPLED if generation.get(name) is not None}
        if not generation.get("do_sample"):
            sampling = {"temperature": 0.0}
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        # Each text draws from a generator of its own, whatever else is written beside it.
        generator = self._generator.spawn(1)[0]
        return Sampler(SamplingSettings(**{**neutral, **sampling}), generator)


class _Continuation:
    """A text that is being continued.

    Attributes:
        prompt: Token ids.
        most: Most tokens to write.
        choose: Picks them.
        ids: Those that were written, without the one that ends the turn.
    """

    prompt: list[int]
    most: int
    choose: Sampler
    ids: list[int]

    def __init__(
        self,
        prompt: list[int],
        most: int,
        choose: Sampler,
        vocabulary: Vocabulary,
        stops: Sequence[str],
    ) -> None:
        """Begin.

        Args:
            prompt: Token ids.
            most: Most tokens to write.
            choose: Picks them.
            vocabulary: Vocabulary of the model.
            stops: Texts that end it, none empty.
        """
        self.prompt = prompt
        self.most = most
        self.choose = choose
        self.ids = []
        self._vocabulary = vocabulary
        self._stops = stops

    def goes_on(self, ids: list[int]) -> bool:
        """Whether no stop string was written.

        Args:
            ids: The tokens so far.

        Returns:
            False if one of them was.
        """
        text = self._decoded(ids)
        return not any(stop in text for stop in self._stops)

    def text(self) -> str:
        """What was written, up to a stop string.

        Returns:
            The text; of one that was cut off within a character, without the beginning of that, as
            a server leaves it out.
        """
        text = self._decoded(self.ids)
        if len(self.ids) == self.most and self._ends_within_a_character():
            text = text.removesuffix("\ufffd")
        return min((text.split(stop)[0] for stop in self._stops), key=len, default=text)

    def _ends_within_a_character(self) -> bool:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(b"".join(map(self._vocabulary.token_bytes, self.ids)))
        return bool(decoder.getstate()[0])

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._vocabulary.decode([i for i in ids if not self._vocabulary.is_special(i)])


def _finished(one: _Continuation, reply: Reply, end_ids: Collection[int]) -> str:
    one.ids = [token for token in reply.wait() if token not in end_ids]
    return one.text()


def _by_input(requests: Sequence[Pair]) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs of forward passes with the requests that each answers, the longest first."""
    inputs: dict[tuple[int, ...], list[int]] = {}
    for index, (_, before, after) in enumerate(requests):
        inputs.setdefault((*before, *after[:-1]), []).append(index)
    for ids, indices in sorted(inputs.items(), key=lambda item: -len(item[0])):
        yield list(ids), indices
