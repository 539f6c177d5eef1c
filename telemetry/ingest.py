"""Topics and bytes in, one committed batch and its acknowledgements out. No clock, no network.

Every message is believed or refused, and every refusal is counted by its reason; none raises.
Rules, in order:

1. A topic must name a device and a channel that devices speak on.
2. The device must be in the registry and active: a retired or quarantined one is not heard.
3. A device has a token bucket; what exceeds it is refused before it is decoded, and not
   acknowledged: an honest device sends it again.
4. The bytes must decode strictly (`telemetry.decode`).
5. Acknowledged is what was committed, or counted before; nothing else, and never before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import structlog

from device_agent.protocol import (
    Channel,
    Health,
    Presence,
    ProtocolError,
    Reported,
    parse_topic,
)
from telemetry import metrics
from telemetry.acks import Acks
from telemetry.decode import Sample, decode, health
from telemetry.store.fold import Batch, Heard, Message, Written
from telemetry.store.reports import Unstorable
from telemetry.store.seen import Verdict

PROBE_TOPIC = "bw/service/probe"
ACTIVE = "active"
_NOBODY: set[int] = set()
TOPICS = 1_000_000  # remembered as read; a fleet has two or three a device

log = structlog.get_logger("bellwether.ingest")

Registry = Callable[[], Mapping[str, str]]  # device → status
Bytes = tuple[str, bytes]  # topic, payload

Read = Callable[[bytes], Reported | Health | Sample | Presence]

_SPOKEN: Mapping[Channel, Read] = {
    Channel.REPORTED: partial(decode, Reported),
    Channel.HEALTH: health,
    Channel.PRESENCE: partial(decode, Presence),
}


class Writer(Protocol):
    def write(self, batch: Batch, now: float) -> Written: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    per_second: float = 100.0  # messages of one device, lasting
    burst: float = 1000.0  # and at once: an outbox that was offline for hours


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    rows: int  # messages counted for the first time
    acks: list[Bytes] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    batch: int = 0  # the last watermark that it wrote


class _Round:
    """The registry as one batch sees it: asked again at most once, for whom it does not know."""

    def __init__(self, known: Mapping[str, str], again: Registry | None) -> None:
        self._known = known
        self._again = again

    def hears(self, device: str) -> bool:
        if self._known.get(device) == ACTIVE:
            return True
        if self._again is None:
            return False
        self._known, self._again = self._again(), None
        return self._known.get(device) == ACTIVE

    def status(self, device: str) -> str:
        return self._known.get(device) or "unknown"


class Ingest:
    def __init__(
        self,
        store: Writer,
        registry: Registry,
        limits: Limits | None = None,
        *,
        again: Registry | None = None,
    ) -> None:
        """`again` is the registry without its cache, for devices that enrolled a moment ago."""
        self._store = store
        self._registry = registry
        self._again = again
        self._limits = limits or Limits()
        self._buckets: dict[str, tuple[float, float]] = {}  # device → (tokens, when)
        self._acks = Acks()
        self._topics: dict[str, tuple[str, Read]] = {}

    def batch(self, messages: Sequence[Bytes], now: float) -> BatchResult:
        """Read, commit, acknowledge; raises what the database raises when it is not there."""
        return self.commit(self.read(messages, now), now)

    def read(self, messages: Sequence[Bytes], now: float) -> Batch:
        """Believe or refuse; charges the buckets, so call it once per message received."""
        heard: list[Heard] = []
        refusals: Counter[str] = Counter()
        spoken, probe = self._by_device(messages, refusals)
        registry = _Round(self._registry(), self._again)
        for device, words in spoken.items():
            if not registry.hears(device):
                refusals[f"{registry.status(device)}_device"] += len(words)
                continue
            allowed = self._spend(device, len(words), now)
            if allowed < len(words):
                refusals["rate_limited"] += len(words) - allowed
                del words[allowed:]
            believed: list[Message] = []
            for read, payload in words:
                try:
                    believed.append(read(payload))
                except ProtocolError as error:
                    refusals[error.reason] += 1
                except Exception:  # one device's bytes must not deafen us to the others
                    log.exception("message_not_understood", device=device)
                    refusals["internal"] += 1
            if believed:
                heard.append(Heard(device, believed))
        return Batch(heard=heard, refusals=refusals, probe=probe)

    def _by_device(
        self, messages: Sequence[Bytes], refusals: Counter[str]
    ) -> tuple[dict[str, list[tuple[Read, bytes]]], bool]:
        """Device → what it said; and whether our own probe is among the messages."""
        spoken: dict[str, list[tuple[Read, bytes]]] = {}
        topics, probe = self._topics, False
        for topic, payload in messages:
            known = topics.get(topic)
            if known is None:
                if topic == PROBE_TOPIC:
                    probe = True
                    continue
                try:
                    known = self._learn(topic)
                except ProtocolError as error:
                    refusals[error.reason] += 1
                    continue
            device, read = known
            words = spoken.get(device)
            if words is None:
                spoken[device] = [(read, payload)]
            else:
                words.append((read, payload))
        return spoken, probe

    def commit(self, batch: Batch, now: float) -> BatchResult:
        """Write a batch, and settle its acks; may be called again with the same batch."""
        refusals = Counter(batch.refusals)
        new, number = 0, 0
        for part, written in self._write(batch, now):
            number = written.batch
            metrics.count("bellwether_ingest_clock_shifted_total", written.shifted)
            new += self._settle(part.heard, written.verdicts, refusals)
            for reason in part.refusals.keys() - batch.refusals.keys():
                refusals[reason] += part.refusals[reason]
        metrics.count("bellwether_ingest_messages_total", new)
        metrics.gauge("bellwether_ingest_watermark", number)
        for reason, n in refusals.items():
            metrics.count("bellwether_ingest_refused_total", n, reason=reason)
        return BatchResult(rows=new, acks=self.due(now), refusals=refusals, batch=number)

    def due(self, now: float) -> list[Bytes]:
        """Acks that had to wait for their second."""
        return self._acks.due(now)

    def owes(self) -> bool:
        return self._acks.waiting()

    def _learn(self, topic: str) -> tuple[str, Read]:
        device, channel = parse_topic(topic)
        read = _SPOKEN.get(channel)
        if read is None:
            raise ProtocolError("wrong_channel", f"{channel} is ours to publish")
        if len(self._topics) > TOPICS:
            self._topics.clear()
        known = self._topics[topic] = (device, read)
        return known

    def _spend(self, device: str, wanted: int, now: float) -> int:
        """How many of so many messages the device's bucket allows."""
        limits = self._limits
        tokens, at = self._buckets.get(device, (limits.burst, now))
        tokens = min(limits.burst, tokens + max(0.0, now - at) * limits.per_second)
        allowed = min(wanted, int(tokens))
        self._buckets[device] = (tokens - allowed, now)
        return allowed

    def _write(self, batch: Batch, now: float) -> list[tuple[Batch, Written]]:
        """Commit; what the database will never take is found by halving, and refused alone."""
        try:
            return [(batch, self._store.write(batch, now))]
        except Unstorable as error:
            halves = _halves(batch.heard)
            if halves is None:
                if not batch.heard:
                    raise
                log.warning("unstorable", device=batch.heard[0].device, error=str(error)[:300])
                refusals = {**batch.refusals, "unstorable": 1}
                return self._write(Batch(refusals=refusals, probe=batch.probe), now)
        head = Batch(heard=halves[0], refusals=batch.refusals, probe=batch.probe)
        return [*self._write(head, now), *self._write(Batch(heard=halves[1]), now)]

    def _settle(
        self, heard: Sequence[Heard], verdicts: Sequence[Verdict], refusals: Counter[str]
    ) -> int:
        """Note what is owed for a committed part; how many messages were new."""
        dropped, rest = 0, iter(verdicts)
        for device, messages in heard:
            boot, owed = "", _NOBODY  # whose numbers these are
            for message, verdict in zip(messages, rest):  # noqa: B905 - the others follow
                if isinstance(message, Presence) or verdict is Verdict.LATE:
                    continue
                if isinstance(message, Reported):
                    self._acks.note(device, message.boot, message.seq, message.nonce)
                    continue
                if message.dropped and verdict is Verdict.NEW:
                    dropped += message.dropped
                if message.boot != boot:
                    boot = message.boot
                    owed = self._acks.numbers(device, boot)
                owed.add(message.seq)
        metrics.count("bellwether_outbox_dropped_total", dropped)
        refusals.update(v.value for v in verdicts if v is not Verdict.NEW)
        return verdicts.count(Verdict.NEW)


def _halves(heard: Sequence[Heard]) -> tuple[Sequence[Heard], Sequence[Heard]] | None:
    """The same messages in two parts; None when there are not two."""
    if len(heard) > 1:
        middle = len(heard) // 2
        return heard[:middle], heard[middle:]
    if not heard or len(heard[0].messages) < 2:
        return None
    ((device, messages),) = heard
    middle = len(messages) // 2
    return [Heard(device, messages[:middle])], [Heard(device, messages[middle:])]
