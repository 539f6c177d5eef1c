"""Broker and network between the service and its devices: it loses, doubles, delays and reorders.

What MQTT promises is kept and nothing more: a desired message is retained, QoS 1 is delivered again
after a cut, QoS 0 is not; order is not promised here at all. What ingest has not acknowledged comes
again. A broker that forgets loses retained messages, sessions and queues, and tells nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from bench.world.heap import Heap
from bench.world.points import Points
from device_agent.protocol import Channel, parse_topic

QUEUE = 100  # messages kept for an absent session


@dataclass(slots=True)
class Weather:
    """Chances per message; `slow` is the longest delay in seconds."""

    cut: float = 0.0  # the sender's or the receiver's connection breaks, the message with it
    double: float = 0.0
    slow: float = 0.05
    lose_puback: float = 0.0  # delivered, but the publisher never learns


class Session(Protocol):
    """A device as the broker knows it."""

    name: str

    def arrive(self, channel: Channel, payload: bytes) -> None: ...
    def cut(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Sent:
    """One message that left the controller, in order."""

    order: int
    at: float
    device: str
    payload: bytes


class Wire:
    def __init__(self, heap: Heap, points: Points, chance: Random) -> None:
        self.weather = Weather()
        self.up = True
        self.sent: list[Sent] = []
        self.connections = 1  # of the controller's session: raised when it had to connect again
        self.inbox: deque[tuple[str, bytes]] = deque()  # for ingest, until it acknowledges
        self.noted: Callable[[Sent], None] = lambda _sent: None
        self._heap, self._points, self._chance = heap, points, chance
        self._retained: dict[str, bytes] = {}  # device → its desired message
        self._queued: dict[str, deque[bytes]] = {}
        self._sessions: dict[str, Session] = {}

    # -- the controller's side --------------------------------------------------------------------

    def publish(
        self,
        messages: Sequence[tuple[str, bytes]],
        *,
        qos: int = 1,
        retain: bool = True,
        timeout: float = 10.0,
    ) -> list[bool]:
        self._points.reach("publish")
        taken = []
        for topic, payload in messages:
            if not self.up:
                taken.append(False)
                continue
            device, _channel = parse_topic(topic)
            sent = Sent(len(self.sent), self._heap.now, device, payload)
            self.sent.append(sent)
            self.noted(sent)
            self._retained[device] = payload
            self._deliver(device, Channel.DESIRED, payload)
            taken.append(self._chance.random() >= self.weather.lose_puback)
        self._points.reach("published")
        return taken

    def handed(self, device: str, payload: bytes) -> None:
        """Not by the broker: by HTTP, which is as good as sent."""
        sent = Sent(len(self.sent), self._heap.now, device, payload)
        self.sent.append(sent)
        self.noted(sent)

    def acknowledge(self, acks: Sequence[tuple[str, bytes]]) -> None:
        """QoS 0: for whoever hears it."""
        for topic, payload in acks if self.up else ():
            device, _channel = parse_topic(topic)
            self._deliver(device, Channel.ACK, payload)

    # -- the devices' side ------------------------------------------------------------------------

    def connect(self, session: Session) -> bool:
        if not self.up:
            return False
        self._sessions[session.name] = session
        waiting = list(self._queued.pop(session.name, ()))
        if session.name in self._retained:
            waiting.append(self._retained[session.name])
        for payload in waiting:
            self._carry(session.name, Channel.DESIRED, payload)
        return True

    def disconnect(self, device: str) -> None:
        self._sessions.pop(device, None)

    def say(self, device: str, topic: str, payload: bytes) -> None:
        """A device publishes; QoS 1: what is lost here it sends again, for want of an ack."""
        if not self.up or device not in self._sessions:
            return
        if self._chance.random() < self.weather.cut:
            self._break(device)
            return
        for _ in range(1 + (self._chance.random() < self.weather.double)):
            self._heap.after(self._delay(), lambda: self._keep(topic, payload))

    # -- faults -----------------------------------------------------------------------------------

    def fall(self) -> None:
        """The broker is gone; sessions end."""
        self.up = False
        for session in list(self._sessions.values()):
            session.cut()
        self._sessions.clear()

    def rise(self, *, forgot: bool) -> None:
        self.up = True
        self.connections += 1
        if forgot:
            self._retained.clear()
            self._queued.clear()
            self.inbox.clear()

    # -- inside -----------------------------------------------------------------------------------

    def _keep(self, topic: str, payload: bytes) -> None:
        if self.up:
            self.inbox.append((topic, payload))

    def _deliver(self, device: str, channel: Channel, payload: bytes) -> None:
        if device not in self._sessions:
            if channel is Channel.DESIRED:
                queue = self._queued.setdefault(device, deque(maxlen=QUEUE))
                queue.append(payload)
            return
        if self._chance.random() < self.weather.cut:
            if channel is Channel.DESIRED:
                self._queued.setdefault(device, deque(maxlen=QUEUE)).append(payload)
            self._break(device)
            return
        for _ in range(1 + (self._chance.random() < self.weather.double)):
            self._carry(device, channel, payload)

    def _carry(self, device: str, channel: Channel, payload: bytes) -> None:
        self._heap.after(self._delay(), lambda: self._arrive(device, channel, payload))

    def _arrive(self, device: str, channel: Channel, payload: bytes) -> None:
        session = self._sessions.get(device)
        if session is not None:
            session.arrive(channel, payload)
        elif channel is Channel.DESIRED:
            self._queued.setdefault(device, deque(maxlen=QUEUE)).append(payload)

    def _break(self, device: str) -> None:
        session = self._sessions.pop(device, None)
        if session is not None:
            session.cut()

    def _delay(self) -> float:
        return self._chance.random() * self.weather.slow
