"""Clients that each ask for one reply after another: a closed loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.serving.processes import Usage, usage_of
from benchmarks.serving.prompts import Prompts
from benchmarks.serving.streams import Server, StreamTimes
from mistill.errors import ServerError


@dataclass(frozen=True, kw_only=True)
class Level:
    """What a number of clients got.

    Attributes:
        clients: Clients at once.
        replies: Replies that they got.
        failures: Requests that were refused or broke off.
        new_tokens: Tokens of all replies.
        tokens_per_second: Tokens of all replies for each second of the level.
        first_token_seconds: Times to the first token, one for each reply.
        gap_seconds: Times between one event and the next, of all replies.
        tokens_per_event: Tokens that an event held, on average.
        prompt_tokens: Tokens of a prompt, on average.
        processor_seconds: Processor time of the server; None where it is not known.
        peak_bytes: The most memory that the server has held so far; None where it is not known.
    """

    clients: int
    replies: int
    failures: int
    new_tokens: int
    tokens_per_second: float
    first_token_seconds: tuple[float, ...]
    gap_seconds: tuple[float, ...]
    tokens_per_event: float
    prompt_tokens: float
    processor_seconds: float | None
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """The level as JSON values, quantiles in the place of every single time.

        Returns:
            Figures by name.
        """
        values = asdict(self)
        for name in ("first_token_seconds", "gap_seconds"):
            values[name] = quantiles(values[name])
        return values


def quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """The middle and the end of many times.

    Args:
        seconds: The times.

    Returns:
        The median as ``p50``, and ``p99``; None where there is no time, as there is no gap in
        replies of one token.
    """
    if not seconds:
        return {"p50": None, "p99": None}
    middle, end = np.quantile(np.asarray(seconds), (0.5, 0.99))
    return {"p50": float(middle), "p99": float(end)}


def run_level(
    server: Server,
    prompts: Prompts,
    *,
    clients: int,
    requests: int,
    new_tokens: int,
    process: int | None = None,
) -> Level:
    """Let some clients ask for one reply after another.

    Args:
        server: Whom they ask.
        prompts: What they ask.
        clients: Their number.
        requests: Replies that each asks for.
        new_tokens: Tokens of each reply; a server that does not know ``ignore_eos`` writes fewer.
        process: Number of the server's process, if it runs here.

    Returns:
        What they got.

    Raises:
        ServerError: If none got a reply.
    """
    times: list[StreamTimes] = []
    failures: list[ServerError] = []
    asked = [[prompts.next() for _ in range(requests)] for _ in range(clients)]

    def ask(conversations: list[list[dict[str, str]]]) -> None:
        for messages in conversations:
            try:
                reply = server.reply(
                    messages, max_tokens=new_tokens, temperature=0, ignore_eos=True
                )
            except ServerError as error:
                failures.append(error)
            else:
                times.append(reply)

    before = usage_of(process)
    started = time.perf_counter()
    threads = [threading.Thread(target=ask, args=(share,), daemon=True) for share in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    after = usage_of(process)
    if not times:
        raise failures[0]
    new_tokens_of_all = sum(one.new_tokens for one in times)
    return Level(
        clients=clients,
        replies=len(times),
        failures=len(failures),
        new_tokens=new_tokens_of_all,
        tokens_per_second=new_tokens_of_all / seconds,
        first_token_seconds=tuple(one.first_token_seconds for one in times),
        gap_seconds=tuple(gap for one in times for gap in one.gap_seconds),
        tokens_per_event=new_tokens_of_all / sum(one.events for one in times),
        prompt_tokens=float(np.mean([one.prompt_tokens for one in times])),
        processor_seconds=_between(before, after),
        peak_bytes=None if after is None else after.peak_bytes,
    )


def _between(before: Usage | None, after: Usage | None) -> float | None:
    if before is None or after is None:
        return None
    return after.processor_seconds - before.processor_seconds
