"""The device's MQTT 5 session, over paho in its own thread.

The session outlives connections (clean_start False, a week's expiry), so orders of QoS 1 wait at
the broker. The will tells of our loss. Reconnects are spread (`device_agent.reconnect`), so that a
fleet does not come back as one wave. What the core publishes while the link is down is
dropped here: the outbox holds it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from device_agent import agent as core
from device_agent import reconnect
from device_agent.agent import AckArrived, Connected, DesiredArrived, Disconnected, Event, Publish
from device_agent.mqtt import PacketTypes, Properties, mqtt, secure
from device_agent.protocol import Channel, ProtocolError, parse_topic

SESSION_SECONDS = 7 * 86_400
KEEPALIVE = 30


class Link:
    def __init__(
        self,
        identity: core.Identity,
        will: tuple[str, bytes],
        subscriptions: tuple[str, ...],
        deliver: Callable[[Event], None],
        *,
        longest_wait: float = reconnect.LONGEST,
    ) -> None:
        url = urlsplit(identity.broker_url)
        if url.scheme not in ("mqtt", "mqtts") or not url.hostname:
            raise ValueError(f"{identity.broker_url!r}: mqtt://host:port is expected")
        self._host = url.hostname
        self._port = url.port or (8883 if url.scheme == "mqtts" else 1883)
        self._deliver = deliver
        self._subscriptions = subscriptions
        self._longest_wait = longest_wait
        self._stop = threading.Event()
        self._up = False
        self._served = False  # this connection got as far as its subscriptions
        self._client: Any = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,
            client_id=identity.device,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        self._client.username_pw_set(identity.broker_username, identity.broker_password)
        self._client.max_inflight_messages_set(20)
        self._client.will_set(will[0], will[1], qos=1, retain=True)
        if url.scheme == "mqtts":
            secure(self._client)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def publish(self, message: Publish) -> None:
        if self._up:
            self._client.publish(
                message.topic, message.payload, qos=message.qos, retain=message.retain
            )

    def stop(self, last_word: tuple[str, bytes]) -> None:
        """Say goodbye (the will is not sent after an orderly end), and end the thread."""
        if self._up:
            said = self._client.publish(last_word[0], last_word[1], qos=1, retain=True)
            if said.rc == mqtt.MQTT_ERR_SUCCESS:
                said.wait_for_publish(2.0)
        self._stop.set()
        self._client.disconnect()
        self._thread.join(5.0)

    def _run(self) -> None:
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = SESSION_SECONDS
        failures = 0
        while not self._stop.is_set():
            try:
                self._client.connect(
                    self._host, self._port, KEEPALIVE, clean_start=False, properties=properties
                )
                self._client.loop_forever(retry_first_connection=False)
            except OSError:
                self._lost()
            failures = 0 if self._was_up() else failures + 1
            wait = reconnect.pause(failures, reconnect.dice(), longest=self._longest_wait)
            self._stop.wait(wait)

    def _was_up(self) -> bool:
        was, self._served = self._served, False
        return was

    def _on_connect(self, client: Any, _: Any, __: Any, reason: Any, ___: Any) -> None:
        if not reason.is_failure:
            client.subscribe(
                [(topic, mqtt.SubscribeOptions(qos=1)) for topic in self._subscriptions]
            )

    def _on_subscribe(self, *_: Any) -> None:
        self._up = self._served = True
        self._deliver(Connected())

    def _on_disconnect(self, *_: Any) -> None:
        self._lost()

    def _lost(self) -> None:
        self._up = False
        self._deliver(Disconnected())

    def _on_message(self, _: Any, __: Any, message: Any) -> None:
        try:
            _device, channel = parse_topic(message.topic)
        except ProtocolError:
            return
        if channel is Channel.DESIRED and message.payload:
            self._deliver(DesiredArrived(payload=bytes(message.payload)))
        elif channel is Channel.ACK:
            self._deliver(AckArrived(payload=bytes(message.payload)))
