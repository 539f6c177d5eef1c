"""Decides who may do what on the broker: one role per device, three services, nobody else.

Pure. Rules, in order:

1. Nothing is allowed that is not listed here; anonymous clients are refused.
2. A device may read its own `desired` and `ack`, and write its own `reported`, `health`,
   `presence`. Mosquitto 2.0 does not substitute `%u` in roles, so each device has its own role.
3. A device's client id must be its own name: nobody can push another one off the broker.
4. Only the ingest may join the shared subscription: who joins it takes a part of the telemetry.
5. The names of the services are reserved: no device may be called like one.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64encode
from collections.abc import Iterable, Mapping
from typing import Any

CONTROLLER = "bw-controller"
INGEST = "bw-ingest"
ADMIN = "bw-admin"
SERVICES = frozenset({CONTROLLER, INGEST, ADMIN})
SHARE_GROUP = "bw-ingest"
PROBE_TOPIC = "bw/service/probe"

_HEARD = ("reported", "health", "presence")
_ITERATIONS = 101  # Mosquitto's own; what is hashed is 256 random bits, not a human's word


def device_password(secret: bytes, device: str, issue: int) -> str:
    """The broker password of a device: derived, so a broker that forgot can be filled again."""
    return hmac.new(secret, f"{device}:{issue}".encode(), hashlib.sha256).hexdigest()


def service_password(secret: bytes, service: str) -> str:
    """The password of `bw-controller` (or `controller`), `bw-ingest`, `bw-admin`."""
    name = service.removeprefix("bw-")
    return hmac.new(secret, f"service:{name}".encode(), hashlib.sha256).hexdigest()


def device_acls(device: str) -> list[dict[str, Any]]:
    topic = f"bw/v1/{device}"
    reads = [_acl("subscribeLiteral", f"{topic}/{c}") for c in ("desired", "ack")]
    return reads + [_acl("publishClientSend", f"{topic}/{c}") for c in _HEARD]


def service_acls() -> Mapping[str, list[dict[str, Any]]]:
    """What each service may do."""
    shared = [f"$share/{SHARE_GROUP}/bw/v1/+/{c}" for c in _HEARD]
    plain = [f"bw/v1/+/{c}" for c in _HEARD]
    return {
        CONTROLLER: [
            _acl("publishClientSend", "bw/v1/+/desired"),
            _acl("publishClientSend", PROBE_TOPIC),
            _acl("subscribePattern", "bw/v1/+/desired"),
            *_both("$SYS/#"),
        ],
        INGEST: [
            *(_acl("subscribePattern", topic) for topic in [*shared, *plain]),
            _acl("subscribePattern", f"$share/{SHARE_GROUP}/{PROBE_TOPIC}"),
            _acl("subscribePattern", PROBE_TOPIC),
            _acl("publishClientSend", "bw/v1/+/ack"),
            _acl("publishClientSend", PROBE_TOPIC),
            *_both("$SYS/#"),
        ],
        ADMIN: [
            _acl("publishClientSend", "$CONTROL/dynamic-security/#"),
            *_both("$CONTROL/dynamic-security/#"),
            _acl("publishClientSend", "bw/v1/+/desired"),  # empties what a retired device was told
            *_both("$SYS/#"),
        ],
    }


def defaults() -> dict[str, bool]:
    return {
        "publishClientSend": False,
        # What is delivered was subscribed to, and subscribing is checked.
        "publishClientReceive": True,
        "subscribe": False,
        "unsubscribe": True,
    }


def document(services: Mapping[str, str], devices: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The plugin's whole file, for (name → password) of services and (device, password) pairs."""
    acls = service_acls()
    clients = [_client(name, password, None) for name, password in services.items()]
    roles = [{"rolename": name, "acls": acls[name]} for name in services]
    for device, password in devices:
        clients.append(_client(device, password, device))
        roles.append({"rolename": device, "acls": device_acls(device)})
    return {"defaultACLAccess": defaults(), "clients": clients, "groups": [], "roles": roles}


def merge_services(current: Mapping[str, Any], services: Mapping[str, str]) -> dict[str, Any]:
    """`current` (a file as the plugin left it) with our services and defaults put right."""
    fresh = document(services, ())
    keep_clients = [c for c in current.get("clients", []) if c.get("username") not in services]
    keep_roles = [r for r in current.get("roles", []) if r.get("rolename") not in services]
    return {
        "defaultACLAccess": defaults(),
        "clients": fresh["clients"] + keep_clients,
        "groups": [],
        "roles": fresh["roles"] + keep_roles,
    }


def _client(name: str, password: str, client_id: str | None) -> dict[str, Any]:
    # The salt only has to differ between names: the passwords are random 256-bit values.
    salt = hashlib.sha256(f"salt:{name}:{password}".encode()).digest()[:12]
    hashed = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ITERATIONS, 64)
    client: dict[str, Any] = {
        "username": name,
        "roles": [{"rolename": name}],
        "password": b64encode(hashed).decode(),
        "salt": b64encode(salt).decode(),
        "iterations": _ITERATIONS,
    }
    return client if client_id is None else client | {"clientid": client_id}


def _both(pattern: str) -> list[dict[str, Any]]:
    # Topics that begin with $ are not delivered by the default right: say so for each.
    return [_acl("subscribePattern", pattern), _acl("publishClientReceive", pattern)]


def _acl(kind: str, topic: str) -> dict[str, Any]:
    return {"acltype": kind, "topic": topic, "priority": 0, "allow": True}
