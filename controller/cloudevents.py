"""An audit row as a CloudEvent 1.0, structured or binary over HTTP, signed as Standard Webhooks.

Pure. https://github.com/cloudevents/spec (v1.0.2, HTTP binding) and standardwebhooks.com: the
signature is HMAC-SHA256 over `id.timestamp.body`. The id is that of the audit row, whatever how
often it is sent: receivers drop what they have seen.
"""

from __future__ import annotations

import hmac
import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import quote

PREFIX = "dev.bellwether."
_PLAIN = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in '"%')


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What is POSTed."""

    headers: Mapping[str, str]
    body: bytes


def event(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The CloudEvent of an audit row (as `views.list_audit` answers it)."""
    detail = row["detail"]
    rollout = detail.get("rollout") if isinstance(detail, Mapping) else None
    return {
        "specversion": "1.0",
        "id": f"{row['seq']}-{row['hash'][:16]}",
        "source": source,
        "type": PREFIX + row["action"].replace(":", "."),
        "subject": row["subject"],
        "time": row["at"],
        "datacontenttype": "application/json",
        "data": {
            "sentence": sentence(row),
            "actor": row["actor"],
            "action": row["action"],
            "subject": row["subject"],
            "detail": detail,
            "seq": row["seq"],
            **({"url": f"{source}/rollouts/{quote(str(rollout))}"} if rollout else {}),
        },
    }


def sentence(row: Mapping[str, Any]) -> str:
    """The decision's own sentence; for what people did, who, what and why."""
    detail = row["detail"]
    if said := detail.get("sentence"):
        return str(said)
    why = detail.get("reason") or detail.get("why") or ""
    return f"{row['action']} {row['subject']} by {row['actor']}" + (f": {why}" if why else "")


def message(plain: Mapping[str, Any], *, binary: bool, secret: bytes | None, now: float) -> Message:
    """The request of an event."""
    if binary:
        body = _json(plain["data"])
        headers = {
            f"ce-{name}": quote(str(value), safe=_PLAIN)
            for name, value in plain.items()
            if name not in ("data", "datacontenttype")
        }
        headers["Content-Type"] = "application/json"
    else:
        body = _json(plain)
        headers = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
    if secret is not None:
        headers |= signed(str(plain["id"]), body, secret, int(now))
    return Message(headers=headers, body=body)


def signed(name: str, body: bytes, secret: bytes, at: int) -> dict[str, str]:
    """The headers by which a receiver knows us."""
    right = hmac.new(secret, f"{name}.{at}.".encode() + body, sha256).digest()
    return {
        "webhook-id": name,
        "webhook-timestamp": str(at),
        "webhook-signature": "v1," + b64encode(right).decode(),
    }


def _json(plain: Any) -> bytes:
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()
