"""A simulated device's MQTT session: paho over an asyncio loop, without a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from device_agent import protocol
from device_agent.agent import (
    AckArrived,
    Connected,
    DesiredArrived,
    Disconnected,
    Event,
    Identity,
    Publish,
)
from device_agent.link import SESSION_SECONDS
from device_agent.mqtt import PacketTypes, Properties, mqtt, secure
from device_agent.protocol import Channel, ProtocolError

KEEPALIVE = 60


class AsyncLink:
    """paho over an asyncio loop: one session, no thread. Connecting again is the caller's."""

    def __init__(
        self,
        identity: Identity,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[Event], None],
    ) -> None:
        url = urlsplit(identity.broker_url)
        if url.scheme not in ("mqtt", "mqtts") or not url.hostname:
            raise ValueError(f"{identity.broker_url!r}: mqtt://host:port is expected")
        self._host = url.hostname
        self._port = url.port or (8883 if url.scheme == "mqtts" else 1883)
        self._loop = loop
        self._deliver = deliver
        self._topics: tuple[str, ...] = ()
        self.up = False
        self.open = False
        self._cut = False
        self._deaf = False
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=identity.device,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        self._client.username_pw_set(identity.broker_username, identity.broker_password)
        self._client.max_inflight_messages_set(20)
        if url.scheme == "mqtts":
            secure(self._client)
        self._client.on_socket_open = self._socket_open
        self._client.on_socket_close = self._socket_close
        self._client.on_socket_register_write = self._register_write
        self._client.on_socket_unregister_write = self._unregister_write
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message

    def connect(self, topics: tuple[str, ...], will: tuple[str, bytes]) -> None:
        """Raises OSError when nobody listens."""
        self._topics = topics
        self._cut = self._deaf = False
        self._client.will_set(will[0], will[1], qos=1, retain=True)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = SESSION_SECONDS
        self._client.connect(
            self._host, self._port, KEEPALIVE, clean_start=False, properties=properties
        )

    def publish(self, message: Publish) -> None:
        if self.up and not self._cut:
            self._client.publish(
                message.topic, message.payload, qos=message.qos, retain=message.retain
            )

    def misc(self) -> None:
        """Keep-alive; about once a second."""
        if self.open:
            self._client.loop_misc()

    def cut(self) -> None:
        """The network is gone: no goodbye, the broker speaks our will.

        paho notices when its socket is read next; until then nothing passes, in neither direction.
        We may stand inside one of its callbacks here, so it must not be entered again.
        """
        sock: Any = self._client.socket()
        if sock is not None:
            self._cut = True
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def fade(self) -> None:
        """Hear nothing from now on; what was said a moment ago still leaves, then all is cut."""
        self._deaf = True  # paho writes at the loop's next turn
        self._loop.call_later(0.02, self.cut)

    def abandon(self) -> None:
        """Cut, and never heard of again: its owner has crashed."""
        self._deliver = lambda _event: None
        self.cut()

    def close(self, last_word: tuple[str, bytes]) -> None:
        """An orderly end."""
        if self._cut:
            return
        if self.up:
            self._client.publish(last_word[0], last_word[1], qos=1, retain=True)
        self._client.disconnect()
        if self.open:
            self._client.loop_write()

    def _socket_open(self, _client: Any, _data: Any, sock: Any) -> None:
        self.open = True
        self._loop.add_reader(sock, self._read)

    def _socket_close(self, _client: Any, _data: Any, sock: Any) -> None:
        self.open = False
        self._loop.remove_reader(sock)
        self._loop.remove_writer(sock)

    def _register_write(self, _client: Any, _data: Any, sock: Any) -> None:
        self._loop.add_writer(sock, self._write)

    def _unregister_write(self, _client: Any, _data: Any, sock: Any) -> None:
        self._loop.remove_writer(sock)

    def _read(self) -> None:
        self._client.loop_read()

    def _write(self) -> None:
        self._client.loop_write()

    def _on_connect(self, client: Any, _data: Any, _flags: Any, reason: Any, _props: Any) -> None:
        if not reason.is_failure:
            client.subscribe([(topic, mqtt.SubscribeOptions(qos=1)) for topic in self._topics])

    def _on_subscribe(self, *_: Any) -> None:
        self.up = True
        self._deliver(Connected())

    def _on_disconnect(self, *_: Any) -> None:
        if self.up:
            self.up = False
            self._deliver(Disconnected())

    def _on_message(self, _client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
        if self._cut or self._deaf:
            return
        try:
            _device, channel = protocol.parse_topic(message.topic)
        except ProtocolError:
            return
        if channel is Channel.DESIRED and message.payload:
            self._deliver(DesiredArrived(payload=bytes(message.payload)))
        elif channel is Channel.ACK:
            self._deliver(AckArrived(payload=bytes(message.payload)))
