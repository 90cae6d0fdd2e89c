"""What was served, in numbers: for /metrics in vLLM's words, for the log, for Retry-After.

No word of any conversation is counted or kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

from mistill.engine.scheduler import Job, Scheduler
from mistill.serve.http.exchange import Exchange
from mistill.serve.replies import Reply

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_REASONS = {
    "end of turn": "stop",
    "stopped": "stop",
    "max_new_tokens": "length",
    "context": "length",
    "cancelled": "abort",
    "failed": "error",
}


class Histogram:
    """How often something took how long."""

    def __init__(self, name: str, meaning: str, bounds: Sequence[float]) -> None:
        """Begin to count.

        Args:
            name: Name of the metric, without the prefix.
            meaning: What it measures.
            bounds: Upper bounds of the buckets, ascending.
        """
        self._name = name
        self._meaning = meaning
        self._bounds = bounds
        self._buckets = [0] * len(bounds)
        self._sum = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        """Count a value.

        Args:
            value: The value.
        """
        self._sum += value
        self._count += 1
        for number, bound in enumerate(self._bounds):
            if value <= bound:
                self._buckets[number] += 1

    def lines(self) -> Iterable[str]:
        """Prometheus' text format.

        Yields:
            Its lines.
        """
        name = f"mistill_{self._name}"
        yield f"# HELP {name} {self._meaning}"
        yield f"# TYPE {name} histogram"
        for bound, count in zip(self._bounds, self._buckets, strict=True):
            yield f'{name}_bucket{{le="{bound:g}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self._count}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {self._count}"


class Counts:
    """What was served since the start."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Begin to count.

        Args:
            scheduler: The engine, which is asked for what runs and waits.
        """
        self._scheduler = scheduler
        self._began = time.monotonic()
        self._statuses: Counter[int] = Counter()
        self._reply_seconds = 2.0
        self._first = Histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _SECONDS
        )
        self._between = Histogram(
            "request_time_per_output_token_seconds", "Per token after the first.", _TOKEN_SECONDS
        )
        self._whole = Histogram(
            "e2e_request_latency_seconds", "From the request to its end.", _SECONDS
        )
        self._queued = Histogram(
            "request_queue_time_seconds", "From the request to its slot.", _SECONDS
        )
        self._prefill = Histogram(
            "request_prefill_time_seconds", "From the slot to the first token.", _SECONDS
        )
        self._decode = Histogram(
            "request_decode_time_seconds", "From the first token to the end.", _SECONDS
        )

    @property
    def retry_seconds(self) -> float:
        """After how long a full queue has room, by the speed of the last replies."""
        return self._reply_seconds / max(1, self._scheduler.slots)

    def answered(self, status: int) -> None:
        """Count an answer.

        Args:
            status: Its status.
        """
        self._statuses[status] += 1

    def ended(self, exchange: Exchange, replies: Sequence[Reply]) -> None:
        """Count the replies of a request that has ended.

        Args:
            exchange: The request, in which the numbers for the log are noted.
            replies: Its replies.
        """
        jobs = [reply.job for reply in replies]
        read = sum(len(job.prompt) for job in jobs if job.started is not None)
        cached = sum(job.cached_tokens for job in jobs)
        written = sum(job.new_tokens for job in jobs)
        exchange.facts |= {"prompt": read, "cached": cached, "written": written}
        for job in jobs:
            self._count_times(job)

    def _count_times(self, job: Job) -> None:
        if job.started is None or job.first_token is None or job.ended is None:
            return
        self._queued.add(job.started - job.submitted)
        self._prefill.add(job.first_token - job.started)
        self._first.add(job.first_token - job.submitted)
        self._decode.add(job.ended - job.first_token)
        self._whole.add(job.ended - job.submitted)
        if job.new_tokens > 1:
            self._between.add((job.ended - job.first_token) / (job.new_tokens - 1))
        # A mean that forgets: what the last ten replies or so have taken.
        self._reply_seconds += 0.1 * (job.ended - job.started - self._reply_seconds)

    def text(self) -> str:
        """All of it in Prometheus' text format."""
        health = self._scheduler.health()
        lines = [
            *_metric("num_requests_running", "gauge", "Replies that are written.", health.running),
            *_metric("num_requests_waiting", "gauge", "Replies that wait.", health.waiting),
            *_metric("slots", "gauge", "Replies that are written at once.", health.slots),
            *_metric(
                "uptime_seconds", "counter", "Since the start.", time.monotonic() - self._began
            ),
        ]
        done = self._scheduler.statistics()
        lines += [
            *_metric("prompt_tokens_total", "counter", "Tokens of prompts.", done.prompt_tokens),
            *_metric("generation_tokens_total", "counter", "Tokens written.", done.new_tokens),
            *_metric(
                "prefix_cache_queries_total", "counter", "Tokens looked for.", done.prompt_tokens
            ),
            *_metric(
                "prefix_cache_hits_total", "counter", "Tokens not read again.", done.cached_tokens
            ),
            *_metric("kv_cache_bytes", "gauge", "Keys and values in use.", done.text_bytes),
            *_metric("prefix_cache_bytes", "gauge", "Those of texts before.", done.store_bytes),
        ]
        endings: Counter[str] = Counter()
        for ending, count in done.endings.items():
            endings[_REASONS.get(ending, ending)] += count
        lines += [
            "# HELP mistill_request_success_total Replies by the reason of their end.",
            "# TYPE mistill_request_success_total counter",
            *(
                f'mistill_request_success_total{{finished_reason="{reason}"}} {count}'
                for reason, count in sorted(endings.items())
            ),
            "# HELP mistill_http_requests_total Answers by their status.",
            "# TYPE mistill_http_requests_total counter",
            *(
                f'mistill_http_requests_total{{status="{status}"}} {count}'
                for status, count in sorted(self._statuses.items())
            ),
        ]
        lines += _metric(
            "admission_rejections_total",
            "counter",
            "Refused for a full queue.",
            self._statuses[429],
        )
        for histogram in (
            *(self._first, self._between, self._whole),
            *(self._queued, self._prefill, self._decode),
        ):
            lines += histogram.lines()
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, meaning: str, value: float) -> list[str]:
    return [
        f"# HELP mistill_{name} {meaning}",
        f"# TYPE mistill_{name} {kind}",
        f"mistill_{name} {value:g}" if isinstance(value, float) else f"mistill_{name} {value}",
    ]
