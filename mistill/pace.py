"""When guessing ahead pays: decided by what steps and guesses have taken and won so far.

Reading several positions at once costs more than one and is worth it if enough of the guesses are
right. Both depend on the machine, the model and the text, so both are measured while writing. What
guessing may lose is bounded: a guess is risked only if what it would cost, were it all wrong, is
covered by what guesses have won, and else by a small share of the time spent.
"""

from __future__ import annotations

LONGEST = 7
"""Most tokens that are guessed at once; CPU kernels get slow beyond eight positions."""

# What guesses may lose of all time, and of a single step before there is any.
_SHARE = 0.012
_START = 0.6
# How much one new measurement changes an average.
_WEIGHT = 0.15
_WEIGHT_OF_A_GUESS = 0.06
# Won time that is remembered, in steps: what is won in one place is not lost in another.
_MEMORY = 3.0
_MEASURE_AGAIN = 24
_WAIT = 16
_LONGEST_WAIT = 512
_PAYS = 1.04


class Pace:
    """How many tokens to guess next.

    Attributes:
        tried: Guesses that were read.
        right: Guesses that were right.
    """

    tried: int
    right: int

    def __init__(self) -> None:
        self.tried = 0
        self.right = 0
        self._step: float | None = None
        self._steps = 0
        self._costs: dict[int, float] = {}
        self._hit = 0.75
        self._trials = 0
        self._elapsed = 0.0
        self._balance = 0.0
        self._since_step = 0
        self._wait = _WAIT
        self._waited = _WAIT

    def length(self, ahead_seconds: float = 0.0) -> int:
        """How many tokens to guess before the next step.

        Args:
            ahead_seconds: What has to be done before anything can be guessed.

        Returns:
            A number of tokens; 0 for a plain step.
        """
        if self._step is None or self._steps < 2 or self._since_step >= _MEASURE_AGAIN:
            return 0
        best = max(range(1, LONGEST + 1), key=self._speed_up)
        if not self._costs:
            best = 1  # what more would cost is not known
        elif self._speed_up(best) < _PAYS:
            if self._waited < self._wait:
                return 0
            best = 2
        loss = (self._cost(best) - 1) * self._step + ahead_seconds
        purse = self._balance + _SHARE * self._elapsed + _START * self._step
        return best if loss <= purse else 0

    def note(self, guessed: int, right: int, seconds: float) -> None:
        """Learn from a step.

        Args:
            guessed: How many tokens were guessed.
            right: How many of them were right, from the first on.
            seconds: What guessing and reading them took.
        """
        self._elapsed += seconds
        if not guessed:
            self._steps += 1
            self._since_step = 0
            self._waited += 1
            # One step that the system interrupted says nothing about the next.
            seconds = seconds if self._step is None else min(seconds, 1.5 * self._step)
            self._step = _moved(self._step, seconds)
            return
        assert self._step is not None
        self._since_step += 1
        self.tried += guessed
        self.right += right
        self._costs[guessed] = _moved(self._costs.get(guessed), seconds / self._step)
        for place in range(min(right + 1, guessed)):
            self._trials += 1
            weight = max(_WEIGHT_OF_A_GUESS, 1 / (self._trials + 3))
            self._hit += weight * (float(place < right) - self._hit)
        won = (1 + right) * self._step - seconds
        self._balance = min(self._balance + won, _MEMORY * self._step)
        if self._speed_up(max(range(1, LONGEST + 1), key=self._speed_up)) >= _PAYS:
            self._wait = _WAIT
        else:
            self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self._waited = 0

    def _speed_up(self, guessed: int) -> float:
        """Tokens that a step with guesses writes in the time in which plain ones write one."""
        written = sum(self._hit**place for place in range(guessed + 1))
        return written / self._cost(guessed)

    def _cost(self, guessed: int) -> float:
        """What a step with guesses takes, in plain steps; in proportion to a known number."""
        if not self._costs:
            return 1 + 0.15 * guessed
        known = min(self._costs, key=lambda number: abs(number - guessed))
        return 1 + max(0.0, self._costs[known] - 1) * guessed / known


def _moved(average: float | None, value: float) -> float:
    return value if average is None else average + _WEIGHT * (value - average)
