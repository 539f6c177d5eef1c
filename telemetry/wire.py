"""Bytes ⇄ MQTT packets of one TCP connection; knows no session and no meaning."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

import mqtt5
import numpy as np

from device_agent.protocol import MAX_MESSAGE_BYTES

MAX_PACKET = MAX_MESSAGE_BYTES * 2  # the broker drops larger ones before they reach us
_BUFFER = 4 * MAX_PACKET
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)  # Linux: else Nagle and delayed ACK cost 44 ms


def pubacks(packet_ids: Sequence[int]) -> bytes:
    """One PUBACK of success for each: four bytes, so that a batch is one array."""
    return (np.array(packet_ids, dtype=">u4") + 0x40020000).astype(">u4").tobytes()


class Wire(asyncio.BufferedProtocol):
    def __init__(self, on_packets: Callable[[list[mqtt5.Packet]], None]) -> None:
        """`on_packets` gets all packets of one read at once, in their order."""
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._on_packets = on_packets
        self.paused = False
        self.transport: asyncio.Transport | None = None
        self.error: str | None = None
        self.heard = False  # since the last look of the keep-alive
        self.ended = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - asyncio's own promise
        self.transport = transport
        self._quick()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._quick()
        self.heard = True
        self._filled += nbytes
        start, wrong = 0, None
        packets: list[mqtt5.Packet] = []
        view, filled, read = self._view[: self._filled], self._filled, mqtt5.read
        try:
            while start < filled:
                packet, size = read(view[start:])
                start += size
                packets.append(packet)
        except IndexError:  # the rest of this packet is still on its way
            pass
        except ValueError as error:
            wrong = f"not MQTT: {error}"
        if packets:
            self._on_packets(packets)
        if wrong is not None:
            self.end(wrong)
            return
        left = self._filled - start
        if left == _BUFFER:
            self.end("packet larger than agreed")
            return
        self._buffer[:left] = self._buffer[start : self._filled]
        self._filled = left

    def pause(self) -> None:
        """Read no more: the peer's packets wait in the sockets, and then at the peer."""
        if self.transport is not None and not self.paused:
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.transport is not None and self.paused:
            self.paused = False
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = self.error or (str(exc) if exc else "closed by the broker")
        self.writable.set()
        self.ended.set()

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def end(self, why: str) -> None:
        self.error = self.error or why
        if self.transport is not None:
            self.transport.abort()

    def _quick(self) -> None:
        if _QUICKACK is None or self.transport is None:
            return
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
