"""The choices for every matrix that lower KL most within a number of bytes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mistill.weights.gptq_layout import ModuleFormat


@dataclass(frozen=True)
class Choice:
    """A way to store a matrix.

    Attributes:
        form: Its grid; None for leaving it as it is.
        size: Bytes in the file.
        cost: Estimated KL per token, in nats.
    """

    form: ModuleFormat | None
    size: int
    cost: float


def fill_budget(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """Lower the total cost as far as the bytes go.

    Args:
        choices: Ways to store each matrix, by name.
        budget: Bytes for all of them; at least what the smallest choices take.

    Returns:
        One choice for each.
    """
    hulls = {name: lower_hull(options) for name, options in choices.items()}
    places = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].size for hull in hulls.values())
    queue: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        hull, place = hulls[name], places[name]
        if place + 1 < len(hull):
            now, then = hull[place], hull[place + 1]
            heapq.heappush(queue, ((then.cost - now.cost) / (then.size - now.size), name))

    for name in hulls:
        offer(name)
    while queue:
        _, name = heapq.heappop(queue)
        hull, place = hulls[name], places[name]
        more = hull[place + 1].size - hull[place].size
        if more > left:
            continue  # it stays as it is; smaller changes of others may still fit
        left -= more
        places[name] += 1
        offer(name)
    return {name: hulls[name][place] for name, place in places.items()}


def lower_hull(options: Sequence[Choice]) -> list[Choice]:
    """The choices of which none mixes two others at a lower cost, from few bytes to many.

    Args:
        options: At least one.

    Returns:
        Choices whose cost falls, and falls less and less for each byte.
    """
    hull: list[Choice] = []
    for option in sorted(options, key=lambda o: (o.size, o.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(small: Choice, large: Choice) -> float:
    return (large.cost - small.cost) / (large.size - small.size)
