"""The table of a server under load; ``benchmarks.suite.tables`` lists it."""

from __future__ import annotations

from benchmarks.suite.cells import Found, number, spread, table

_OURS = "mistill"


def serving(found: Found) -> list[str]:
    """Tokens a second by the number of clients, over other servers; and what else was watched."""
    ours = found["totals"][_OURS]
    rivals = {name: of for name, of in found["totals"].items() if name != _OURS}
    # Earlier documents do not tell it.
    counted = all("tokens_per_event" in one for one in ours.values())
    rows = [
        [
            clients,
            number(one["tokens_per_second"]),
            _range(one["over_one_client"]),
            *(_range(of[clients]["ours_over_it"]) for of in rivals.values()),
            _milliseconds(one["first_token"]),
            *(_milliseconds(of[clients]["first_token"]) for of in rivals.values()),
            _milliseconds(one["gap"]),
            *([number(one["tokens_per_event"])] if counted else []),
        ]
        for clients, one in ours.items()
    ]
    heads = ["clients", "mistill, tokens/s", "over one client"]
    heads += [f"over {name}" for name in rivals]
    heads += ["first token, ms", *(f"{name}'s" for name in rivals), "gap, ms"]
    heads += ["tokens an event"] if counted else []
    peaks = [
        f"{name} {max(one['peak_bytes'] for one in of.values()) / 1e6:,.0f} MB"
        for name, of in found["totals"].items()
        if all("peak_bytes" in one for one in of.values())
    ]
    return [
        *table(heads, rows),
        "",
        "Ratios as medians of turns, with the lowest and the highest; first tokens and gaps, which "
        "lie between two events of mistill's, as medians and 99th percentiles. Peak memory: "
        f"{', '.join(peaks)}.",
        "",
        *_watched(found),
    ]


def _watched(found: Found) -> list[str]:
    alone, later, many = found["alone"], found["later_turn"], found["many"]
    first, growth = alone["first_token_milliseconds_over_engine"], many["growth"]
    lines = [
        f"- One client writes {spread(alone['tokens_per_second_over_chatbot'], 2)} times as fast "
        f"as `ChatBot` in the same process would; its first token comes "
        f"{number(first['median'])} ms later than the engine's alone.",
    ]
    lines += [
        f"- While a prompt of 512 tokens joins {writers} that "
        f"{'is' if writers == '1' else 'are'} being answered, the 99th percentile of the gaps is "
        f"{spread(one['multiple'], 2)} times their median before; its own first token comes after "
        f"{number(one['first_token_seconds']['median'])} s."
        for writers, one in found["joining"].items()
    ]
    return [
        *lines,
        f"- The next turn of a conversation of {later['prompt_tokens']:,.0f} tokens begins after "
        f"{1000 * later['first_token_seconds']['median']:.0f} ms.",
        f"- {many['requests']:,} requests, a tenth of them left by their clients: "
        f"{many['wrong']} wrong replies, {growth:+.1%} of resident memory{_kept(many)}, "
        f"{many['descriptors'][1] - many['descriptors'][0]:+d} open descriptors.",
        f"- Idle, it took {found['idle']['processor_seconds']:g} seconds of processor time in "
        f"{found['idle']['seconds']:g}.",
    ]


def _kept(many: Found) -> str:
    """What of the growth are texts that a server keeps; earlier results do not tell."""
    if "kept_bytes" not in many:
        return ""
    (before, after), (kept_before, kept_after) = many["resident_bytes"], many["kept_bytes"]
    rest = (after - kept_after) / (before - kept_before) - 1
    return (
        f" ({(kept_after - kept_before) / 1e6:+.0f} MB of texts that it keeps within a bound, "
        f"and {rest:+.1%} of the rest)"
    )


def _range(ratios: list[float]) -> str:
    low, middle, high = ratios
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _milliseconds(quantiles: Found) -> str:
    return f"{1000 * quantiles['p50']:.0f}, {1000 * quantiles['p99']:.0f}"
