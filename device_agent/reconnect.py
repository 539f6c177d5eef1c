"""When to connect again, so that a fleet that lost its broker at once does not return as one wave.

A device cannot know whether it alone was cut off, so it always behaves as if all were:

1. The pause is drawn evenly from [0, highest]: full jitter. Half of a fixed wait plus jitter would
   leave the wave in one piece, only later.
2. `highest` is `FIRST` after a connection that served, and doubles with every attempt since that
   found no broker or was refused, up to `LONGEST`: that is how a broker that admits only so many
   a second slows down those who wait.
"""

from __future__ import annotations

import os

FIRST = 4.0  # seconds: 10,000 devices come at 2,500 a second
LONGEST = 60.0


def pause(failures: int, dice: float, *, first: float = FIRST, longest: float = LONGEST) -> float:
    """Seconds to wait: `failures` attempts in a row did not serve; `dice` is uniform in [0, 1)."""
    return dice * min(longest, first * 2.0 ** min(failures, 16))


def dice() -> float:
    """Uniform in [0, 1), without the half MiB of `random`."""
    return int.from_bytes(os.urandom(6), "big") / (1 << 48)
