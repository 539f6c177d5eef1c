"""ULIDs: 26 characters that sort by the time of their making (https://github.com/ulid/spec).

`new` is pure: the moment and the randomness are arguments. `fresh` throws the dice.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's, in lower case: ids here are

chance: Callable[[int], bytes] = secrets.token_bytes  # the simulation's comes from its seed


def new(now: float, entropy: bytes) -> str:
    """The ULID of `now` (Unix seconds) with 10 bytes of entropy."""
    number = int(now * 1000) << 80 | int.from_bytes(entropy[:10])
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def fresh(now: float) -> str:
    """A ULID of this moment."""
    return new(now, chance(10))
