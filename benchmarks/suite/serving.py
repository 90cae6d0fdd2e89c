r"""mistill's server beside llama.cpp's and beside its own engine, in one run.

    python -m benchmarks.suite.serving CHATBOT --source FLOAT \
        --llama-cpp PLACE --llama-cpp-programs FOLDER --against q4_0 q4_k_m

All servers run at once and are loaded in turn, so that whatever else the machine does falls on all
alike; what is said of two is a ratio of the same turn. A folder of llama.cpp's programs with
``llama-server`` is taken before xllamacpp, which has the same server inside. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.figures.latency import SETTLE_SECONDS
from benchmarks.figures.machine import describe_machine
from benchmarks.rivals.contest import InstalledRival, find_rivals, make_files
from benchmarks.serving.load import Level, quantiles
from benchmarks.serving.processes import free_port, running, running_folder, usage_of
from benchmarks.serving.prompts import Prompts
from benchmarks.serving.serving_report import load_in_turns
from benchmarks.serving.streams import Server, StreamTimes
from benchmarks.settings import ServingSettings
from benchmarks.suite.places import add_options, places
from mistill.chat.bot import ChatBot
from mistill.engine.onnx_model import OnnxModel
from mistill.errors import ServerError
from mistill.folders.folder import open_folder
from mistill.text.answers import prompt_ids
from mistill.text.conversation import Conversation
from mistill.text.vocabulary import load_vocabulary

OURS = "mistill"
SLOTS = 16
CONTEXT = 2048
_XLLAMACPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port, params.n_parallel, params.n_ctx = (int(word) for word in sys.argv[2:5])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[5])
server = xllamacpp.Server(params)
while True:
    time.sleep(60)
"""


def main() -> None:
    """Measure, and print a JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chatbot", type=Path)
    parser.add_argument("--source", type=Path, help="the float folder that it was made of")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=3, help="of each client in a turn")
    parser.add_argument("--many", type=int, default=1000, help="requests of the longest run")
    add_options(parser, ())
    parser.set_defaults(prompt=64, new_tokens=64, rounds=5)
    given = parser.parse_args()
    with TemporaryDirectory() as scratch:
        print(json.dumps(run(given, Path(scratch))))


def run(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure all.

    Args:
        given: The command line.
        scratch: An empty folder.

    Returns:
        The JSON document.
    """
    settings = ServingSettings(
        clients=tuple(given.clients),
        requests=given.requests,
        rounds=given.rounds,
        prompt_tokens=given.prompt,
        new_tokens=given.new_tokens,
        threads=given.threads,
    )
    rivals = find_rivals((f"llama.cpp:{name}" for name in given.against), places(given))
    with ExitStack() as stack:
        options = ("--metrics", "--slots", str(SLOTS), "--context", str(CONTEXT))
        ours = stack.enter_context(running_folder(given.chatbot, *options, threads=given.threads))
        servers = {OURS: ours}
        for rival in rivals:
            servers[rival.choice.name] = stack.enter_context(
                _running_llama(rival, given.source, scratch, given.threads)
            )
        levels = load_in_turns(servers, settings)
        server, process = ours
        engine = OnnxModel(given.chatbot, threads=given.threads, context=CONTEXT)
        return {
            "benchmark": "serving",
            "machine": asdict(describe_machine(given.threads)),
            "settings": asdict(settings),
            "rivals": {
                rival.choice.name: {
                    "version": rival.environment.version,
                    "system": rival.environment.system,
                }
                for rival in rivals
            },
            "levels": {
                name: {clients: [one.to_dict() for one in rounds] for clients, rounds in of.items()}
                for name, of in levels.items()
            },
            "totals": totals(levels),
            "alone": beside_the_engine(server, given.chatbot, engine, given.rounds),
            "joining": {
                writers: joining(server, writers, rounds=max(2, given.rounds // 2))
                for writers in (1, 4)
            },
            "later_turn": later_turns(server, given.rounds),
            "many": many_requests(server, process, given.many),
            "idle": idle(process),
        }


def totals(levels: Mapping[str, Mapping[int, Sequence[Level]]]) -> dict[str, Any]:
    """Tokens per second: of each server over its own with one client, and ours over others'.

    Args:
        levels: By server and number of clients, a level for each round.

    Returns:
        Medians, and ratios of the same round as lowest, median and highest.
    """
    ours = levels[OURS]
    return {
        name: {
            str(clients): {
                "tokens_per_second": median(level.tokens_per_second for level in rounds),
                "over_one_client": _ratio(rounds, of[min(of)]),
                "ours_over_it": _ratio(ours[clients], rounds),
                "first_token": quantiles([s for one in rounds for s in one.first_token_seconds]),
                "gap": quantiles([s for one in rounds for s in one.gap_seconds]),
                "tokens_per_event": mean(one.tokens_per_event for one in rounds),
                **_taken(rounds),
            }
            for clients, rounds in of.items()
        }
        for name, of in levels.items()
    }


def _taken(rounds: Sequence[Level]) -> dict[str, float]:
    """What a server's process took, where the system tells."""
    peaks = [one.peak_bytes for one in rounds if one.peak_bytes is not None]
    seconds = [
        one.processor_seconds / one.new_tokens
        for one in rounds
        if one.processor_seconds is not None
    ]
    if not peaks or not seconds:
        return {}
    return {"peak_bytes": max(peaks), "processor_seconds_per_token": median(seconds)}


def _ratio(one: Sequence[Level], other: Sequence[Level]) -> list[float]:
    ratios = sorted(
        a.tokens_per_second / b.tokens_per_second for a, b in zip(one, other, strict=True)
    )
    return [ratios[0], median(ratios), ratios[-1]]


def beside_the_engine(
    server: Server, chatbot: Path, engine: OnnxModel, rounds: int
) -> dict[str, Any]:
    """One client beside the same model in this process, taking turns.

    Args:
        server: Ours.
        chatbot: The folder.
        engine: The folder as a running model.
        rounds: Turns.

    Returns:
        Ratios of tokens per second, and milliseconds that the first token of a prompt of 128 tokens
        takes longer than in the engine alone.
    """
    vocabulary = load_vocabulary(chatbot)
    prompts = Prompts(server, 128, seed=1)
    speeds, first = [], []
    for _ in range(2 * rounds):
        messages = prompts.next()
        bot = ChatBot(chatbot, model=engine, temperature=0, max_new_tokens=64)
        time.sleep(SETTLE_SECONDS)
        list(bot.reply(messages[0]["content"]))
        time.sleep(SETTLE_SECONDS)
        theirs = server.reply(prompts.next(), max_tokens=64, temperature=0)
        assert bot.last_speed is not None
        assert theirs.tokens_per_second is not None
        speeds.append(theirs.tokens_per_second / bot.last_speed.tokens_per_second)
        ids = prompt_ids(Conversation(tuple(prompts.next())), vocabulary)
        time.sleep(SETTLE_SECONDS)
        started = time.perf_counter()
        next(engine.stream(ids))
        seconds = time.perf_counter() - started
        time.sleep(SETTLE_SECONDS)
        reply = server.reply(prompts.next(), max_tokens=2, temperature=0)
        first.append(1000 * (reply.first_token_seconds - seconds))
    return {
        "tokens_per_second_over_chatbot": _spread(speeds),
        "first_token_milliseconds_over_engine": _spread(first),
    }


def joining(server: Server, writers: int, rounds: int) -> dict[str, Any]:
    """What those who are being answered notice of a prompt of 512 tokens that joins them.

    Args:
        server: Ours.
        writers: How many are being answered.
        rounds: How often.

    Returns:
        Median gap between events before it came, the 99th percentile while its prompt was read,
        that as a multiple, tokens of an event on average, and when its first token came, in
        seconds.
    """
    short, long = (Prompts(server, count, seed=10 * writers + count) for count in (40, 512))
    before, during, multiples, first, tokens = [], [], [], [], []

    def write(replies: list[StreamTimes]) -> None:
        replies.append(server.reply(short.next(), max_tokens=400, temperature=0, ignore_eos=True))

    for _ in range(rounds):
        replies: list[StreamTimes] = []
        threads = [threading.Thread(target=write, args=(replies,)) for _ in range(writers)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        joiner = server.reply(long.next(), max_tokens=2, temperature=0)
        for thread in threads:
            thread.join()
        begin, end = joiner.began, joiner.began + joiner.first_token_seconds
        earlier, meanwhile = [], []
        for reply in replies:
            moments = reply.began + reply.first_token_seconds + np.cumsum((0, *reply.gap_seconds))
            for moment, gap in zip(moments, reply.gap_seconds, strict=False):
                if moment + gap < begin:
                    earlier.append(gap)
                elif moment < end:
                    meanwhile.append(gap)
        if not earlier or not meanwhile:
            raise ServerError("the long prompt joined when nobody was being answered; ask for more")
        before.append(median(earlier))
        during.append(float(np.quantile(meanwhile, 0.99)))
        multiples.append(during[-1] / before[-1])
        first.append(joiner.first_token_seconds)
        tokens += [reply.new_tokens / reply.events for reply in replies]
    return {
        "median_gap_before": median(before),
        "p99_gap_while_it_joins": median(during),
        "multiple": _spread(multiples),
        "tokens_per_event": mean(tokens),
        "first_token_seconds": _spread(first),
    }


def later_turns(server: Server, rounds: int) -> dict[str, Any]:
    """The next turn of a conversation of about 1,000 tokens.

    Args:
        server: Ours.
        rounds: How often.

    Returns:
        Seconds to the first token; tokens of the prompt and those that were not read again.
    """
    prompts = Prompts(server, 900, seed=4)
    seconds, cached, tokens = [], [], []
    for _ in range(rounds):
        messages = prompts.next()
        reply = server.reply(messages, max_tokens=100)
        messages += [
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": "And then?"},
        ]
        turn = server.reply(messages, max_tokens=2)
        seconds.append(turn.first_token_seconds)
        cached.append(turn.cached_tokens)
        tokens.append(turn.prompt_tokens)
    return {
        "first_token_seconds": _spread(seconds),
        "prompt_tokens": median(tokens),
        "cached_tokens": median(cached),
    }


def many_requests(server: Server, process: int, count: int, clients: int = 8) -> dict[str, Any]:
    """Many requests, a tenth of which are left before their end.

    Args:
        server: Ours.
        process: Number of its process.
        count: Requests; a third as many come before, so that what is kept of prompts is full.
        clients: Clients at once.

    Returns:
        Replies that were not those of the same prompt alone; memory, what of it are keys and values
        of texts that may go on, and open descriptors, before and after.
    """
    prompts = Prompts(server, 60, seed=5)
    asked = [prompts.next() for _ in range(30)]
    options = {"temperature": 0, "seed": 0, "max_tokens": 16}
    alone = [server.reply(messages, **options).text for messages in asked]
    wrong = 0

    def ask(number: int) -> None:
        nonlocal wrong
        chance = random.Random(number)
        which = chance.randrange(len(asked))
        if number % 10 == 0:
            server.leave(asked[which], pieces=chance.randrange(4), **options)
        elif server.reply(asked[which], **options).text != alone[which]:
            wrong += 1

    _at_once(ask, range(count, count + max(count // 3, 1)), clients)
    time.sleep(1.0)
    before, kept = usage_of(process), [kept_bytes(server)]
    _at_once(ask, range(count), clients)
    time.sleep(2.0)
    after = usage_of(process)
    kept.append(kept_bytes(server))
    assert before is not None
    assert after is not None
    return {
        "requests": count,
        "wrong": wrong,
        "resident_bytes": [before.resident_bytes, after.resident_bytes],
        "kept_bytes": kept,
        "growth": after.resident_bytes / before.resident_bytes - 1,
        "descriptors": [before.descriptors, after.descriptors],
    }


def kept_bytes(server: Server) -> int:
    """Memory that a server of ours takes for keys and values, within a bound.

    Args:
        server: Ours, started with ``--metrics``.

    Returns:
        Bytes of the texts that are being written, and of those that may go on.
    """
    address = f"{server.url.removesuffix('/v1')}/metrics"
    with urllib.request.urlopen(address, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
    return int(values["mistill_kv_cache_bytes"]) + int(values["mistill_prefix_cache_bytes"])


def _at_once(ask: Callable[[int], None], numbers: Sequence[int], clients: int) -> None:
    failures: list[ServerError] = []

    def loop(share: Sequence[int]) -> None:
        try:
            for number in share:
                ask(number)
        except ServerError as error:
            failures.append(error)

    threads = [
        threading.Thread(target=loop, args=(numbers[start::clients],)) for start in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def idle(process: int, seconds: float = 10.0) -> dict[str, Any]:
    """What a server takes while nobody asks anything.

    Args:
        process: Number of its process.
        seconds: For how long it is watched.

    Returns:
        Processor seconds in that time.
    """
    time.sleep(2.0)
    before = usage_of(process)
    time.sleep(seconds)
    after = usage_of(process)
    assert before is not None
    assert after is not None
    return {
        "seconds": seconds,
        "processor_seconds": after.processor_seconds - before.processor_seconds,
    }


@contextmanager
def _running_llama(
    rival: InstalledRival, source: Path, scratch: Path, threads: int
) -> Iterator[tuple[Server, int]]:
    files = make_files(rival, open_folder(source), source.name, scratch)
    model, port = Path(files.note.folder) / "model.gguf", free_port()
    programs = rival.environment.programs
    if programs is not None and (programs / "llama-server").is_file():
        command = [
            *(str(programs / "llama-server"), "--model", str(model), "--port", str(port)),
            *("--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT)),
            *("--threads", str(threads), "--threads-batch", str(threads)),
        ]
    else:
        words = (model, port, SLOTS, SLOTS * CONTEXT, threads)
        command = [str(rival.environment.python), "-c", _XLLAMACPP, *map(str, words)]
    with running(command, f"http://127.0.0.1:{port}") as started:
        yield started


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


if __name__ == "__main__":
    main()
