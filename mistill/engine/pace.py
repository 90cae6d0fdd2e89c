"""How many draft tokens a step checks, by what steps and draft tokens have cost and saved so far.

Reading several positions at once takes longer than reading one, and saves time if enough draft
tokens are accepted. Both depend on the machine, the model and the text, and are measured while
writing. The possible loss is bounded: draft tokens are proposed only if their whole cost is covered
by the time that earlier ones have saved, or by a small share of all time spent. However short a
reply and however bad the draft, drafting takes no more than that share of the time, as long as
steps take the time that they took before.
"""

from __future__ import annotations

from collections import deque
from statistics import median

LONGEST = 7
"""The most draft tokens of a step; CPU kernels get slow beyond eight positions."""

# The share of all time that drafting may lose.
_SHARE = 0.02
# Number of recent measurements whose median counts.
_REMEMBERED = 9
# A draft token costs at least this share of a step, whatever a disturbed measurement says.
_LEAST = 0.03
# Assumed cost of a draft token before it is measured: that of a plain step.
_UNKNOWN = 1.0
# A step with draft tokens that took this many times the expected time was disturbed.
_DISTURBED = 2.0
# Weight of one more draft token in the share that is accepted.
_WEIGHT = 0.06
# The most saved time that is remembered, in steps, so that it is not spent elsewhere at once.
_MEMORY = 3.0
_MEASURE_AGAIN = 24
_WAIT = 16
_LONGEST_WAIT = 512
_PAYS = 1.04


class Pace:
    """Decides how many draft tokens the next step checks.

    Attributes:
        tried: Draft tokens that were checked.
        right: Draft tokens that were accepted.
    """

    tried: int
    right: int

    def __init__(self, share: float = _UNKNOWN) -> None:
        """Begin without experience.

        Args:
            share: Time that a draft token adds to a step, as a share of that step.
        """
        self.tried = 0
        self.right = 0
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._step = 0.0
        # Time that each draft token added to a step, as a share of that step.
        self._shares = deque([share], maxlen=_REMEMBERED)
        self._share = max(_LEAST, share)
        self._acceptance = 0.75
        self._trials = 0
        self._elapsed = 0.0
        self._balance = 0.0
        self._since_step = 0
        self._wait = _WAIT
        self._waited = _WAIT

    def length(self, ahead_seconds: float = 0.0) -> int:
        """The number of draft tokens for the next step.

        Args:
            ahead_seconds: Time that the draft needs before it can propose any.

        Returns:
            A number of draft tokens; 0 for a plain step.
        """
        if len(self._steps) < 3 or self._since_step >= _MEASURE_AGAIN:
            return 0
        best = max(range(1, LONGEST + 1), key=self._speed_up)
        if not self.tried:
            best = 1  # the cost of more is not known yet
        elif self._speed_up(best) < _PAYS:
            if self._waited < self._wait:
                return 0
            best = 2
        loss = (self._cost(best) - 1) * self._step + ahead_seconds
        allowed_loss = self._balance + _SHARE * (self._elapsed + self._step)
        return best if loss <= allowed_loss else 0

    def note(self, drafted: int, accepted: int, seconds: float) -> None:
        """Record a step.

        Args:
            drafted: Number of draft tokens.
            accepted: How many of them were accepted, from the first on.
            seconds: Time of drafting and checking them.
        """
        self._elapsed += seconds
        if not drafted:
            self._since_step = 0
            self._waited += 1
            self._steps.append(seconds)
            self._step = median(self._steps)
            return
        self._since_step += 1
        self.tried += drafted
        self.right += accepted
        self._shares.append((seconds / self._step - 1) / drafted)
        self._share = max(_LEAST, median(self._shares))
        for index in range(min(accepted + 1, drafted)):
            self._trials += 1
            weight = max(_WEIGHT, 1 / (self._trials + 3))
            self._acceptance += weight * (float(index < accepted) - self._acceptance)
        # A disturbance of this step is not the fault of its draft tokens.
        cost = self._cost(drafted)
        cost = max(cost, min(seconds / self._step, _DISTURBED * cost))
        saved = (1 + accepted - cost) * self._step
        self._balance = min(self._balance + saved, _MEMORY * self._step)
        if self._speed_up(max(range(1, LONGEST + 1), key=self._speed_up)) >= _PAYS:
            self._wait = _WAIT
        else:
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self._waited = 0

    def _speed_up(self, drafted: int) -> float:
        """Expected tokens of a step with draft tokens in the time of a plain step."""
        tokens = sum(self._acceptance**count for count in range(drafted + 1))
        return tokens / self._cost(drafted)

    def _cost(self, drafted: int) -> float:
        """Time of a step with draft tokens, in plain steps."""
        return 1 + self._share * drafted
