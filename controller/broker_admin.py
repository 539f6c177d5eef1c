"""Gives devices and services their accounts on the broker, over its dynamic-security topic.

It does; who may do what stands in `broker_roles`, the process itself in `broker_child`.

Rules, in order:

1. Everything is idempotent: what exists already is no error, what is gone already neither.
2. Commands go in batches: the plugin rewrites its whole file after each of them.
3. Revoking is `deleteClient`: a disabled client could come back with a certificate.
4. The registry is right, the broker is a cache: `sync` makes it equal.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from controller import broker_roles
from controller.broker_child import BrokerChild, BrokerFailed, load_secret
from controller.broker_roles import ADMIN, CONTROLLER, INGEST, device_password, service_password

__all__ = [
    "ADMIN",
    "CONTROLLER",
    "INGEST",
    "BrokerAdmin",
    "BrokerChild",
    "BrokerFailed",
    "BrokerUnavailable",
    "device_password",
    "load_secret",
    "service_password",
]

_TOPIC = "$CONTROL/dynamic-security/v1"
_BATCH = 200
_HARMLESS = ("already exists", "not found", "already in", "not in")


class BrokerUnavailable(RuntimeError):
    """The broker did not answer, or refused a command. Ask again later: nothing is half done."""


class BrokerAdmin:
    """The administrator's session. Thread-safe; connects when first used and again when cut."""

    def __init__(self, url: str, username: str, password: str, *, timeout: float = 15.0) -> None:
        self._url = url
        self._username = username
        self._password = password
        self._timeout = timeout
        self._lock = threading.Lock()
        self._client: mqtt.Client | None = None
        self._ready = threading.Event()
        self._answers: list[dict[str, Any]] = []
        self._answered = threading.Condition()
        self._refusal = ""

    def ensure_services(self, secret: bytes) -> None:
        """Roles, accounts and default rights of the services, where they are missing.

        What exists is left alone: a changed role cuts the sessions of who has it.
        """
        present = set(
            self._send([{"command": "listClients", "verbose": False, "count": -1}])[0]
            .get("data", {})
            .get("clients", [])
        )
        missing = broker_roles.SERVICES - {ADMIN} - present
        if not missing:
            return
        access = [{"acltype": kind, "allow": on} for kind, on in broker_roles.defaults().items()]
        commands: list[dict[str, Any]] = [{"command": "setDefaultACLAccess", "acls": access}]
        for name, acls in broker_roles.service_acls().items():
            if name not in missing:
                continue
            password = service_password(secret, name)
            commands += [
                {"command": "createRole", "rolename": name, "acls": acls},
                _create(name, password, None),
            ]
        self._send(commands)

    def add_devices(self, devices: Iterable[tuple[str, str]]) -> None:
        """Accounts and roles for (device, password) pairs; those that exist keep theirs."""
        commands: list[dict[str, Any]] = []
        for device, password in devices:
            acls = broker_roles.device_acls(device)
            commands.append({"command": "createRole", "rolename": device, "acls": acls})
            commands.append(_create(device, password, device))
        self._send(commands)

    def set_password(self, device: str, password: str) -> None:
        """A new password: the old one stops working, and its session is cut."""
        self.remove_devices([device])
        self.add_devices([(device, password)])

    def remove_device(self, device: str) -> None:
        """The device is cut off at once, has no rights left, and its order is emptied."""
        self.remove_devices([device])

    def remove_devices(self, devices: Sequence[str]) -> None:
        commands = [{"command": "deleteClient", "username": device} for device in devices]
        self._send(commands)
        self._send([{"command": "deleteRole", "rolename": device} for device in devices])
        with self._lock:
            for device in devices:
                self._connected().publish(f"bw/v1/{device}/desired", b"", qos=1, retain=True)

    def list_devices(self) -> set[str]:
        """The devices that have an account."""
        answer = self._send([{"command": "listClients", "verbose": False, "count": -1}])
        names = answer[0].get("data", {}).get("clients", [])
        return set(names) - broker_roles.SERVICES - {self._username}

    def sync(self, devices: Iterable[tuple[str, str]]) -> tuple[int, int]:
        """Make the broker's accounts equal to the registry's; answers (added, removed)."""
        wanted = dict(devices)
        present = self.list_devices()
        missing = [(name, word) for name, word in wanted.items() if name not in present]
        surplus = sorted(present - wanted.keys())
        self.add_devices(missing)
        if surplus:
            self.remove_devices(surplus)
        return len(missing), len(surplus)

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _send(self, commands: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        with self._lock:
            for batch in _batches(commands):
                answers += self._exchange(batch)
        failed = [a for a in answers if a.get("error") and not _harmless(str(a["error"]))]
        if failed:
            raise BrokerUnavailable(f"{failed[0].get('command')}: {failed[0]['error']}")
        return answers

    def _exchange(self, batch: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        client = self._connected()
        with self._answered:
            self._answers.clear()
            client.publish(_TOPIC, json.dumps({"commands": list(batch)}), qos=1)
            complete = self._answered.wait_for(
                lambda: len(self._answers) >= len(batch), self._timeout
            )
            if complete:
                return list(self._answers)
        self._drop()
        raise BrokerUnavailable(
            f"the broker at {self._url} did not answer within {self._timeout:.0f} s; "
            "is its dynamic-security plugin loaded?"
        )

    def _connected(self) -> mqtt.Client:
        if self._client is not None and self._ready.is_set():
            return self._client
        self._drop()
        address = urlsplit(self._url)
        client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        client.username_pw_set(self._username, self._password)
        if address.scheme == "mqtts":
            client.tls_set()
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        self._refusal = ""
        port = address.port or (8883 if address.scheme == "mqtts" else 1883)
        try:
            client.connect(address.hostname or "127.0.0.1", port)
        except OSError as error:
            raise BrokerUnavailable(f"the broker at {self._url} is away: {error}") from error
        client.loop_start()
        self._client = client
        if not self._ready.wait(self._timeout) or self._refusal:
            self._drop()
            raise BrokerUnavailable(
                f"the broker at {self._url} refused {self._username}: "
                f"{self._refusal or 'no answer'}"
            )
        return client

    def _drop(self) -> None:
        client, self._client = self._client, None
        self._ready.clear()
        if client is not None:
            client.disconnect()
            client.loop_stop()

    def _on_connect(
        self, client: mqtt.Client, _data: object, _flags: object, code: Any, _properties: object
    ) -> None:
        if code.is_failure:
            self._refusal = str(code)
            self._ready.set()
            return
        client.subscribe(f"{_TOPIC}/response", qos=1)

    def _on_subscribe(self, *_: object) -> None:
        self._ready.set()

    def _on_disconnect(self, *_: object) -> None:
        self._ready.clear()

    def _on_message(self, _client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        responses = json.loads(message.payload).get("responses", [])
        with self._answered:
            self._answers += responses
            self._answered.notify_all()


def _create(name: str, password: str, client_id: str | None) -> dict[str, Any]:
    command: dict[str, Any] = {
        "command": "createClient",
        "username": name,
        "password": password,
        "roles": [{"rolename": name}],
    }
    return command if client_id is None else command | {"clientid": client_id}


def _batches(commands: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    rest = iter(commands)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _harmless(error: str) -> bool:
    return any(words in error.lower() for words in _HARMLESS)
