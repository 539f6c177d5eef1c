"""What devices are owed: acknowledgements of committed messages, one per device and second. Pure.

Rules, in order:

1. Only what is settled is noted: committed now, or counted before (its ack may have been lost).
2. A device gets at most one ack per `INTERVAL`; what comes meanwhile is put into the next one.
3. A nonce is echoed once, in the ack of the batch that committed the message that carried it.
4. Two boots of a device share no ack; the one that was noted first goes first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from device_agent import protocol

INTERVAL = 1.0  # seconds
MAX_RANGES = 256

_encode = msgspec.json.Encoder().encode  # `protocol.encode(Ack(…))` says the same, slower


@dataclass(slots=True)
class _Owed:
    numbers: set[int] = field(default_factory=set)
    nonce: str | None = None


class Acks:
    def __init__(self, interval: float = INTERVAL) -> None:
        self._interval = interval
        self._owed: dict[str, dict[str, _Owed]] = {}  # device → boot → what is owed
        self._sent: dict[str, float] = {}

    def note(self, device: str, boot: str, seq: int, nonce: str | None = None) -> None:
        owed = self._of(device, boot)
        owed.numbers.add(seq)
        if nonce is not None:
            owed.nonce = nonce

    def numbers(self, device: str, boot: str) -> set[int]:
        """What is owed for a boot until the next `due`: add to it instead of noting one by one."""
        return self._of(device, boot).numbers

    def due(self, now: float) -> list[tuple[str, bytes]]:
        """(topic, payload) of every ack that may leave now."""
        # A clock that was set back must not keep devices waiting: a future `sent` counts as past.
        recent = {d: at for d, at in self._sent.items() if 0 <= now - at < self._interval}
        messages = [self._take(device) for device in self._owed if device not in recent]
        self._sent = recent
        for device, _topic, _payload in messages:
            self._sent[device] = now
            if not self._owed[device]:
                del self._owed[device]
        return [(topic, payload) for _device, topic, payload in messages]

    def waiting(self) -> bool:
        return bool(self._owed)

    def _of(self, device: str, boot: str) -> _Owed:
        boots = self._owed.get(device)
        if boots is None:
            boots = self._owed[device] = {}
        owed = boots.get(boot)
        if owed is None:
            owed = boots[boot] = _Owed()
        return owed

    def _take(self, device: str) -> tuple[str, str, bytes]:
        boots = self._owed[device]
        boot = next(iter(boots))
        owed = boots[boot]
        spans = ranges(owed.numbers)
        ack: dict[str, object] = {"v": protocol.VERSION, "boot": boot, "ranges": spans[:MAX_RANGES]}
        if owed.nonce is not None:
            ack["nonce"] = owed.nonce
        left = {n for first, last in spans[MAX_RANGES:] for n in range(first, last + 1)}
        if left:
            boots[boot] = _Owed(left)
        else:
            del boots[boot]
        return device, f"bw/v1/{device}/ack", _encode(ack)


def ranges(numbers: set[int]) -> list[tuple[int, int]]:
    """{1, 2, 3, 7} → [(1, 3), (7, 7)]."""
    spans: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return spans
