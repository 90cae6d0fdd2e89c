"""A folder of the road as lm-evaluation-harness wants a model (``lm_eval.api.model.TemplateLM``).

Importing this module needs the extra ``eval``. Requests are answered one forward pass at a time:
answers of one token to the same question share a pass, as most multiple-choice tasks have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from benchmarks.figures.perplexity import log_normalizers
from mistill.engine.opening import open_model
from mistill.engine.sampling import Sampler, SamplingSettings
from mistill.errors import SettingsError
from mistill.progress import track
from mistill.text.vocabulary import load_vocabulary

_DEFAULT_NEW_TOKENS = 256
_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Pair = tuple[Any, list[int], list[int]]


@register_model("mistill")
class MistillLM(TemplateLM):
    """Any folder of the road: float, GPTQ, NF4 or ONNX.

    After ``import benchmarks.harness_model`` lm-evaluation-harness knows it as ``mistill``, with
    ``model_args="folder=PATH"``.
    """

    def __init__(
        self, folder: str | Path, threads: int | None = None, seed: int = 0, **_: Any
    ) -> None:
        """Open a folder.

        What lm-evaluation-harness gives every model besides, such as a device and a batch size,
        has no meaning here.

        Args:
            folder: The folder.
            threads: Threads to compute with; None counts the processors that may be used.
            seed: Of the draws, where a task asks for sampled text.
        """
        super().__init__()
        self.model = open_model(folder, threads=int(threads) if threads else None)
        self.vocabulary = load_vocabulary(folder)
        self._name = str(folder)
        self._generator = np.random.default_rng(int(seed))

    @property
    def max_length(self) -> int:
        """Positions that the model holds."""
        return self.model.context_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.vocabulary.end_ids[0] if self.vocabulary.end_ids else 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the token for the beginning, or else the end.

        As for models of transformers there, it need not be one that the tokenizer writes.
        """
        begin = self.vocabulary.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer and template from others, for caches of requests."""
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
        """Write a conversation as the model was taught to read it.

        Args:
            chat_history: Turns.
            add_generation_prompt: Whether the assistant's turn begins at the end.

        Returns:
            The text.
        """
        if add_generation_prompt or chat_history[-1]["role"] != "assistant":
            return self.vocabulary.render(chat_history, add_generation_prompt)
        # The last turn is begun and to be continued: nothing may follow what it says.
        begun = self.vocabulary.render(chat_history[:-1], add_generation_prompt=True)
        return begun + chat_history[-1]["content"]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Turn text into tokens, with one for the beginning where the tokenizer writes it.

        Args:
            string: The text.
            add_special_tokens: False leaves the token for the beginning out.

        Returns:
            Token ids.
        """
        ids = self.vocabulary.encode(string)
        begin = self.vocabulary.bos_id
        wanted = self.vocabulary.adds_bos and add_special_tokens is not False
        if not wanted or begin is None or ids[:1] == [begin]:
            return ids
        return [begin, *ids]

    # --- probabilities --------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of what follows, and whether the model would have written it.

        Args:
            requests: Anything, tokens of the context, tokens of what follows.
            disable_tqdm: Has no meaning here.

        Returns:
            One pair for each request.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        longest = max((len(after) for _, _, after in requests), default=0)
        if longest > self.max_length:
            raise SettingsError(
                f"an answer of the task has {longest} tokens, and the model holds "
                f"{self.max_length} positions; leave the task out"
            )
        with track("scoring", len(requests), "answers") as tracker:
            for ids, places in _by_input(requests):
                logits = self._logits(ids)
                normalizers = log_normalizers(logits[-self._longest(requests, places) :])
                for place in places:
                    targets = np.array(requests[place][2])
                    rows = logits[-len(targets) :]
                    chosen = rows[np.arange(len(targets)), targets].astype(np.float64)
                    total = float((chosen - normalizers[-len(targets) :]).sum())
                    found[place] = total, bool((rows.argmax(axis=1) == targets).all())
                    name = requests[place][0]
                    if isinstance(name, tuple):
                        self.cache_hook.add_partial("loglikelihood", name, found[place])
                    tracker.advance()
        return found

    @staticmethod
    def _longest(requests: Sequence[Pair], places: Sequence[int]) -> int:
        return max(len(requests[place][2]) for place in places)

    def _logits(self, ids: Sequence[int]) -> Any:
        """Shape (T, V), of as many of the last tokens as the model holds."""
        kept = np.array(ids[-self.max_length :], np.int64)
        return self.model.logits(kept[None])[0]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows as long as the model holds.

        Args:
            requests: Texts.
            disable_tqdm: Has no meaning here.

        Returns:
            One number for each text.
        """
        found = []
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
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    # --- text -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts until a stop string, the end of a turn, or a number of tokens.

        Args:
            requests: Texts, each with what is to be done.
            disable_tqdm: Has no meaning here.

        Returns:
            What was written, without the stop string.
        """
        found = []
        with track("writing", len(requests), "replies") as tracker:
            for request in requests:
                context, options = request.args
                found.append(self._reply(context, options))
                self.cache_hook.add_partial("generate_until", (context, options), found[-1])
                tracker.advance()
        return found

    def _reply(self, context: str, options: dict[str, Any]) -> str:
        wanted = normalize_gen_kwargs(options, _DEFAULT_NEW_TOKENS)
        most, stops = int(wanted["max_gen_toks"]), [stop for stop in wanted["until"] if stop]
        if most >= self.max_length:
            raise SettingsError(
                f"the task asks for {most} new tokens, and the model holds {self.max_length} "
                "positions; ask for fewer"
            )
        # As for models of transformers there: with a tokenizer that writes no token for the
        # beginning, a text that holds none gets none.
        prompt = self.tok_encode(context)[-(self.max_length - most) :]
        ids: list[int] = []
        text = ""
        for token in self.model.stream(prompt or [self.prefix_token_id], self._choice(wanted)):
            if token in self.vocabulary.end_ids:
                break
            ids.append(token)
            text = self.vocabulary.decode([i for i in ids if not self.vocabulary.is_special(i)])
            if len(ids) == most or any(stop in text for stop in stops):
                break
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)

    def _choice(self, wanted: dict[str, Any]) -> Sampler:
        sampled = {name: wanted[name] for name in _SAMPLED if wanted.get(name) is not None}
        if not wanted.get("do_sample"):
            sampled = {"temperature": 0.0}
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return Sampler(SamplingSettings(**{**neutral, **sampled}), self._generator)


def _by_input(requests: Sequence[Pair]) -> Iterator[tuple[list[int], list[int]]]:
    """What the model has to read, and the requests that this answers; the longest first."""
    inputs: dict[tuple[int, ...], list[int]] = {}
    for place, (_, before, after) in enumerate(requests):
        inputs.setdefault((*before, *after[:-1]), []).append(place)
    for ids, places in sorted(inputs.items(), key=lambda item: -len(item[0])):
        yield list(ids), places
