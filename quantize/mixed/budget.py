"""Choose how every matrix is stored so that KL is lowest within a number of bytes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mistill.weights.gptq_layout import ModuleFormat


@dataclass(frozen=True)
class Choice:
    """A way to store a matrix.

    Attributes:
        form: Its format; None if it stays float.
        size: Bytes in the file.
        cost: Estimated KL per token, in nats.
    """

    form: ModuleFormat | None
    size: int
    cost: float


def fill_budget(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """Choose the lowest total cost that fits into a number of bytes.

    Args:
        choices: Ways to store each matrix, by name.
        budget: Bytes for all of them; at least what the smallest choices take.

    Returns:
        One choice for each.
    """
    hulls = {name: lower_hull(options) for name, options in choices.items()}
    chosen = dict.fromkeys(hulls, 0)
    bytes_left = budget - sum(hull[0].size for hull in hulls.values())
    queue: list[tuple[float, str]] = []

    def push(name: str) -> None:
        hull, index = hulls[name], chosen[name]
        if index + 1 < len(hull):
            heapq.heappush(queue, (_slope(hull[index], hull[index + 1]), name))

    for name in hulls:
        push(name)
    while queue:
        _, name = heapq.heappop(queue)
        hull, index = hulls[name], chosen[name]
        more = hull[index + 1].size - hull[index].size
        if more > bytes_left:
            continue  # this matrix keeps its choice; smaller changes of others may still fit
        bytes_left -= more
        chosen[name] += 1
        push(name)
    return {name: hulls[name][index] for name, index in chosen.items()}


def fill_budget_alike(
    choices: Mapping[str, Sequence[Choice]], group_of: Callable[[str], str], budget: int
) -> dict[str, Choice]:
    """Like ``fill_budget``, with one format for all matrices of a group.

    Args:
        choices: Ways to store each matrix, by name; a format that not all of a group have is not
            considered.
        group_of: The group that a matrix belongs to.
        budget: Bytes for all of them; at least what the smallest common choices take.

    Returns:
        One choice for each matrix.
    """
    groups: dict[str, list[str]] = {}
    for name in choices:
        groups.setdefault(group_of(name), []).append(name)
    by_form = {name: {one.form: one for one in options} for name, options in choices.items()}
    together = {
        group: [
            Choice(
                form,
                sum(by_form[name][form].size for name in names),
                sum(by_form[name][form].cost for name in names),
            )
            for form in by_form[names[0]]
            if all(form in by_form[name] for name in names)
        ]
        for group, names in groups.items()
    }
    chosen = fill_budget(together, budget)
    return {name: by_form[name][chosen[group_of(name)].form] for name in choices}


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
