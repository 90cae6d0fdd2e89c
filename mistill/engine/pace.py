"""When guessing ahead pays: decided by what steps and guesses have taken and won so far.

Reading several positions at once costs more than one and is worth it if enough of the guesses are
right. Both depend on the machine, the model and the text, so both are measured while writing. What
guessing may lose is bounded: a guess is risked only if what it would cost, were it all wrong, is
covered by what guesses have won, and else by a small share of the time spent. So however short a
reply and however useless the guesses, they take no more than that share of its time, as far as
steps take what they took before.
"""

from __future__ import annotations

from collections import deque
from statistics import median

LONGEST = 7
"""Most tokens that are guessed at once; CPU kernels get slow beyond eight positions."""

# What guesses may lose of all time.
_SHARE = 0.02
# Measurements of one thing that are remembered; their median is what it takes.
_REMEMBERED = 9
# A guess costs at least this share of a step, whatever a disturbed measurement says.
_LEAST = 0.03
# Before it is known: reading two positions at once takes no longer than one after the other.
_UNKNOWN = 1.0
# A step with guesses that took longer than so many times what was expected was disturbed.
_DISTURBED = 2.0
# How much one more guess, right or wrong, changes the share that is right.
_WEIGHT = 0.06
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

    def __init__(self, share: float = _UNKNOWN) -> None:
        """Begin without experience.

        Args:
            share: What a guess adds to a step, as a share of it, as far as that is known.
        """
        self.tried = 0
        self.right = 0
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._step = 0.0
        # What each guess added to a step, as a share of it.
        self._shares = deque([share], maxlen=_REMEMBERED)
        self._share = max(_LEAST, share)
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
        if len(self._steps) < 3 or self._since_step >= _MEASURE_AGAIN:
            return 0
        best = max(range(1, LONGEST + 1), key=self._speed_up)
        if not self.tried:
            best = 1  # what more would cost is not known
        elif self._speed_up(best) < _PAYS:
            if self._waited < self._wait:
                return 0
            best = 2
        loss = (self._cost(best) - 1) * self._step + ahead_seconds
        purse = self._balance + _SHARE * (self._elapsed + self._step)
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
            self._since_step = 0
            self._waited += 1
            self._steps.append(seconds)
            self._step = median(self._steps)
            return
        self._since_step += 1
        self.tried += guessed
        self.right += right
        self._shares.append((seconds / self._step - 1) / guessed)
        self._share = max(_LEAST, median(self._shares))
        for place in range(min(right + 1, guessed)):
            self._trials += 1
            weight = max(_WEIGHT, 1 / (self._trials + 3))
            self._hit += weight * (float(place < right) - self._hit)
        # What disturbed this step has nothing to do with its guesses.
        cost = self._cost(guessed)
        cost = max(cost, min(seconds / self._step, _DISTURBED * cost))
        won = (1 + right - cost) * self._step
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
        """What a step with guesses takes, in plain steps."""
        return 1 + self._share * guessed
