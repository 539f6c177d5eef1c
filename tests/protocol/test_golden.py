"""Golden and hostile messages, held against the agent's decoder and the ingest's.

`golden/*.json` are what an implementation by others must read and write. A hostile file is named
`<message>.<what>.<reason>`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from controller.keys import DirectorKey
from device_agent import protocol
from device_agent.protocol import Ack, Health, Presence, ProtocolError, Reported
from device_agent.trust import Accepted, Known, judge, keyring
from telemetry.decode import decode as ingest_decode

HERE = Path(__file__).parent
GOLDEN = sorted((HERE / "golden").glob("*.json"))
HOSTILE = sorted((HERE / "hostile").iterdir())
TYPES: dict[str, Any] = {"reported": Reported, "health": Health, "ack": Ack, "presence": Presence}
KEY = DirectorKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
DEVICE = [p for p in GOLDEN if not p.stem.startswith("desired")]
UP = [p for p in DEVICE if p.stem != "ack"]


def named(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", DEVICE, ids=named)
def test_a_golden_message_is_read_and_written_alike(path: Path) -> None:
    payload = path.read_bytes()
    message = protocol.decode(TYPES[path.stem.partition("-")[0]], payload)
    assert protocol.encode(message) == payload


@pytest.mark.parametrize("path", UP, ids=named)
def test_both_decoders_read_the_same(path: Path) -> None:
    kind = TYPES[path.stem.partition("-")[0]]
    payload = path.read_bytes()
    assert ingest_decode(kind, payload) == protocol.decode(kind, payload)


@pytest.mark.parametrize("path", UP, ids=named)
def test_unknown_fields_are_accepted_by_both(path: Path) -> None:
    kind = TYPES[path.stem.partition("-")[0]]
    payload = json.dumps(json.loads(path.read_bytes()) | {"fromTheFuture": [1, {"a": 2}]}).encode()
    assert ingest_decode(kind, payload) == protocol.decode(kind, path.read_bytes())


@pytest.mark.parametrize("path", HOSTILE, ids=named)
def test_a_hostile_message_is_refused_by_both_for_the_same_reason(path: Path) -> None:
    kind, _, reason = path.name.split(".")
    for decode in (protocol.decode, ingest_decode):
        with pytest.raises(ProtocolError) as refused:
            decode(TYPES[kind], path.read_bytes())
        assert refused.value.reason == reason


@pytest.mark.parametrize("name", ["desired.json", "desired-rollback.json"])
def test_a_golden_order_carries_a_signature_that_verifies(name: str) -> None:
    payload = (HERE / "golden" / name).read_bytes()
    known = Known(device="car-0001", keys=keyring((KEY.public_hex,)))
    verdict = judge(payload, known)
    assert isinstance(verdict, Accepted)
    assert KEY.sign(verdict.order) == payload


@pytest.mark.parametrize(
    "text",
    ["bw/v1/+/health", "bw/v1/a/b/health", "bw/v1/A/health", "bw/v1/a/nope", "bw/v1/a\0/ack"],
)
def test_a_topic_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        protocol.parse_topic(text)


def test_brackets_within_text_are_no_depth() -> None:
    assert protocol.load(b'{"a":"[[[[[[[[[[\\"[["}') == {"a": '[[[[[[[[[["[['}
