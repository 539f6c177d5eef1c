"""Which sequence numbers of one boot were counted already. Pure: numbers in, numbers out.

A boot is remembered by its highest number and a bitmap of what is missing below it: a device that
delivers in order costs no bits at all. Rules, in order:

1. above the highest: new; what it jumps over becomes missing;
2. the highest itself: a repeat;
3. more than `WINDOW` below the highest: late, whether or not it was counted once;
4. missing: new, and no longer missing;
5. else: a repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

WINDOW = 16_384  # numbers: eleven days of a device that sends one message a minute
_ALL = (1 << WINDOW) - 1


class Verdict(Enum):
    NEW = "new"
    REPEAT = "duplicate"
    LATE = "late"


@dataclass(slots=True, kw_only=True)
class Seen:
    """Bit k of `missing` is set when number `high` - 1 - k has not come yet."""

    boot_count: int
    high: int = -1
    missing: int = 0

    def take(self, seq: int) -> Verdict:
        """Is `seq` to be counted? Remembers it when it is."""
        ahead = seq - self.high
        if ahead == 1 and not self.missing:  # in order, as nearly all come
            self.high = seq
            return Verdict.NEW
        if ahead > 0:
            self._advance(ahead)
            self.high = seq
            return Verdict.NEW
        if ahead == 0:
            return Verdict.REPEAT
        bit = -ahead - 1
        if bit >= WINDOW:
            return Verdict.LATE
        if not self.missing >> bit & 1:
            return Verdict.REPEAT
        self.missing &= ~(1 << bit)
        return Verdict.NEW

    def _advance(self, ahead: int) -> None:
        if ahead > WINDOW:  # never shift by a number that a device chose
            self.missing = _ALL
            return
        skipped = (1 << (ahead - 1)) - 1
        self.missing = (self.missing << ahead | skipped) & _ALL


def pack(missing: int) -> bytes:
    return missing.to_bytes((missing.bit_length() + 7) // 8, "little")


def unpack(bits: bytes) -> int:
    return int.from_bytes(bits, "little")
