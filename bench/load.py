"""An honest fleet in one process: what devices would publish, as fast as a broker takes it.

`python -m bench.load PORT …` prepares every packet first, says `ready`, waits for a line on its
standard input, publishes at QoS 1 with `WINDOW` messages on their way, and prints
`{"began": …, "sent": …, "acked": …}` in seconds of the machine's monotonic clock. `acked` is when
the service acknowledged the last message to the device that sent it (`--await-ack`).

Both sides make the same `Plan` from the seed, so that what was published is known afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import mqtt5

WINDOW = 1000
SENTINEL = "car-last"
DIGEST = "sha256:" + "5e" * 32
BASE = 1_700_000_000
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)  # else Nagle and delayed ACK cost 44 ms a window
_PIECE = 200  # messages in one write


@dataclass(frozen=True, slots=True)
class Message:
    topic: str
    payload: bytes
    refused: str | None = None  # the reason why it must not be counted


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`messages` honest ones, evenly over `devices` topics, and dirt between them."""

    seed: int
    devices: int
    messages: int
    samples: int = 1  # in each health message
    duplicates: float = 0.01  # share of messages that come twice
    hostile: float = 0.01  # share of further messages that must be refused
    now: float = 0.0  # when the first sample was taken; the device clock

    @property
    def names(self) -> list[str]:
        return [f"car-{number:05d}" for number in range(self.devices)] + [SENTINEL]

    @property
    def each(self) -> int:
        """Honest messages of one device: the first and the last are reports, the others health."""
        return max(3, self.messages // self.devices)

    @cached_property
    def stream(self) -> list[Message]:
        """In the order of publishing; the last one is the sentinel's."""
        return list(self.mixed())

    @cached_property
    def refused(self) -> Counter[str]:
        """reason → how many of the stream."""
        return Counter(m.refused for m in self.stream if m.refused)

    def report(self, device: str, seq: int) -> dict[str, object]:
        """The state that a device claims with message `seq`."""
        release = f"app-{seq}"
        return {
            "v": 1,
            "boot": f"boot-{device}",
            "bootCount": 1,
            "seq": seq,
            "state": "COMMITTED",
            "generation": seq,
            "term": 1,
            "attempt": f"att-{device}-{seq}",
            "components": {"app": {"release": release, "digest": DIGEST, "committed": True}},
        }

    def mixed(self) -> Iterator[Message]:
        """The stream, made on the way."""
        dice = random.Random(self.seed)
        recent: list[Message] = []
        for message in self._honest(dice):
            yield message
            if dice.random() < self.duplicates:
                recent.append(message)
            if recent and dice.random() < self.duplicates:  # some time later, out of order
                again = recent.pop(dice.randrange(len(recent)))
                yield Message(again.topic, again.payload, "duplicate")
            if dice.random() < self.hostile:
                yield self._hostile(dice, message)
        for again in recent:
            yield Message(again.topic, again.payload, "duplicate")
        yield Message(f"bw/v1/{SENTINEL}/health", self._health(SENTINEL, 0, dice))

    def _honest(self, dice: random.Random) -> Iterator[Message]:
        devices, last = self.names[:-1], self.each - 1
        for seq in range(self.each):
            for device in devices:
                if seq in (0, last):
                    body = json.dumps(self.report(device, seq), separators=(",", ":")).encode()
                    yield Message(f"bw/v1/{device}/reported", body)
                else:
                    yield Message(f"bw/v1/{device}/health", self._health(device, seq, dice))

    def _health(self, device: str, seq: int, dice: random.Random) -> bytes:
        """About 300 bytes with one sample."""
        n = self.samples

        def column(low: float, high: float) -> str:
            return ",".join(f"{dice.uniform(low, high):.2f}" for _ in range(n))

        return (
            f'{{"v":1,"boot":"boot-{device}","bootCount":1,"seq":{seq},'
            f'"components":{{"app":"{DIGEST}"}},"t0":{self.now + seq:.2f},"dt":1.0,'
            f'"columns":{{"cpu_percent":[{column(0, 100)}],"temperature":[{column(20, 90)}]}},'
            f'"counters":{{"disengagement":{int(dice.random() < 0.01)}}},'
            f'"exposure":{{"device_hour":{n / 3600:.6f},"km":{dice.uniform(0, 0.03):.4f}}},'
            f'"dropped":0}}'
        ).encode()

    def _hostile(self, dice: random.Random, near: Message) -> Message:
        topic = near.topic.rsplit("/", 1)[0] + "/health"
        good = self._health(topic.split("/")[2], 10**6, dice)
        kinds = (
            Message(topic, good.replace(b'"dt":1.0', b'"dt":NaN'), "not_finite"),
            Message(topic, good[: len(good) // 2], "not_json"),
            Message(topic, good.replace(b'"seq":', b'"seq":1,"seq":'), "malformed"),
            Message(topic, good.replace(b'"seq":1000000', b'"seq":"1"'), "malformed"),
            Message(topic, good.replace(b'"km":', b'"km":1e300,"x":'), "out_of_range"),
            Message(topic, b"\xff" * 300, "not_utf8"),
            Message(topic, good[:-1] + b',"x":' + b"[" * 40 + b"]" * 40 + b"}", "too_deep"),
            Message("bw/v1/nobody/health", good, "unknown_device"),
        )
        return dice.choice(kinds)


def packets(messages: Iterable[Message]) -> Iterator[bytes]:
    """As packets; the ids go round, far outside of the window."""
    qos = mqtt5.QoS.AT_LEAST_ONCE
    for number, message in enumerate(messages):
        yield mqtt5.PublishPacket(
            message.topic,
            message.payload,
            qos=qos,
            retain=message.topic.endswith("reported"),
            packet_id=number % 60_000 + 1,
        ).write()


class Session:
    """A blocking MQTT 5 connection that counts PUBACKs."""

    def __init__(self, port: int, name: str, hear: str | None = None) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._buffer = b""
        self.acked = 0
        self.heard: float | None = None  # when the first PUBLISH came
        self._send(mqtt5.ConnectPacket(name, clean_start=True, keep_alive=0).write())
        self._await(mqtt5.ConnAckPacket)
        if hear is not None:
            wanted = [mqtt5.TopicFilter(hear, max_qos=mqtt5.QoS.AT_MOST_ONCE)]
            self._send(mqtt5.SubscribePacket(65_535, wanted).write())
            self._await(mqtt5.SubAckPacket)

    def publish(self, data: Iterable[bytes], rate: float | None = None) -> None:
        """All of them; at most `rate` a second."""
        began, sent, source = time.monotonic(), 0, iter(data)
        while some := list(islice(source, _PIECE)):
            while sent + len(some) - self.acked > WINDOW:
                self._receive()
            if rate is not None:
                time.sleep(max(0.0, began + sent / rate - time.monotonic()))
            self._send(b"".join(some))
            sent += len(some)
        while self.acked < sent:
            self._receive()

    def await_heard(self, seconds: float) -> None:
        self._socket.settimeout(seconds)
        while self.heard is None:
            self._receive()

    def _send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def _await(self, kind: type[object]) -> None:
        while not any(isinstance(packet, kind) for packet in self._receive()):
            pass

    def _receive(self) -> list[object]:
        data = self._socket.recv(1 << 18)
        if not data:
            raise ConnectionError("the broker closed the connection")
        if _QUICKACK is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        self._buffer += data
        whole = len(self._buffer) // 4
        buffer = self._buffer
        if len(buffer) == 4 * whole and buffer[::4].count(0x40) == buffer[1::4].count(2) == whole:
            self.acked += whole  # nothing but PUBACKs of success: no need to look at each
            self._buffer = b""
            return []
        return self._parse()

    def _parse(self) -> list[object]:
        found: list[object] = []
        view, start = memoryview(self._buffer), 0
        try:
            while start < len(view):
                packet, size = mqtt5.read(view[start:])
                start += size
                self.acked += isinstance(packet, mqtt5.PubAckPacket)
                if isinstance(packet, mqtt5.PublishPacket) and self.heard is None:
                    self.heard = time.monotonic()
                found.append(packet)
        except IndexError:  # the rest is still on its way
            pass
        self._buffer = bytes(view[start:])
        return found


def arguments(
    port: int, plan: Plan, *, await_ack: bool = False, rate: float | None = None
) -> list[str]:
    """The command that publishes `plan`, as fast as it goes or at a steady rate."""
    words = [sys.executable, "-m", "bench.load", str(port)]
    for name in ("seed", "devices", "messages", "samples", "duplicates", "hostile", "now"):
        words += [f"--{name}", repr(getattr(plan, name))]
    words += ["--await-ack"] if await_ack else []
    return words + (["--rate", repr(rate)] if rate else [])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--await-ack", action="store_true")
    for name, kind in Plan.__annotations__.items():
        parser.add_argument(f"--{name}", type={"int": int, "float": float}[str(kind)])
    parser.add_argument("--rate", type=float)
    told = vars(parser.parse_args())
    port, await_ack, rate = told.pop("port"), told.pop("await_ack"), told.pop("rate")
    plan = Plan(**told)
    # With a rate they are made on the way: a long run would not fit into memory.
    data: Iterable[bytes] = packets(plan.mixed()) if rate else list(packets(plan.mixed()))
    session = Session(port, "bench-load", f"bw/v1/{SENTINEL}/ack" if await_ack else None)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    session.publish(data, rate)
    sent = time.monotonic()
    if await_ack:
        session.await_heard(300.0)
    print(json.dumps({"began": began, "sent": sent, "acked": session.heard}), flush=True)


if __name__ == "__main__":
    main()
