"""The wire contract between devices and the server: topics, messages, canonical signed bytes.

This file decides what a well-formed message is; how dataclasses become JSON values and come back is
`device_agent.codec`'s. Both do no I/O and import the standard library only, so that the agent, the
ingest and a stranger's implementation can all hold on to them.

Rules, in order:

1. A message is at most `MAX_MESSAGE_BYTES` of UTF-8 JSON, one object, at most `MAX_DEPTH` deep.
2. Wire names are camelCase; the dataclasses here use the same words in snake_case.
3. Types are strict: no `true` for 1, no "1" for 1, no NaN, no infinities, no 1e999.
4. Unknown fields are accepted: devices are older and servers newer than each other.
5. Ids match `ID`; metric names match `METRIC`; everything has an upper bound.
6. What a director signs is `canonical(signed)`: sorted keys, no blanks, integers only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

from device_agent.codec import MAX_SAFE_INTEGER as MAX_SAFE_INTEGER
from device_agent.codec import MAX_TEXT as MAX_TEXT
from device_agent.codec import ProtocolError as ProtocolError
from device_agent.codec import camel as camel
from device_agent.codec import finite, from_wire, to_wire

VERSION = 1
MAX_MESSAGE_BYTES = 64 * 1024
MAX_DEPTH = 8
MAX_SAMPLES = 60  # samples in one health message
MAX_METRICS = 64  # columns, counters or exposures in one message, each
MAX_COMPONENTS = 32
MAX_HISTORY = 32

ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
METRIC = re.compile(r"[a-z][a-z0-9_]{0,62}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

# A whole string, or one that never ends: neither can be mistaken for structure.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|$)|[\[\]{}]', re.DOTALL)
_TOPIC = re.compile(rf"bw/v1/({ID.pattern})/(desired|reported|health|ack|presence)")


_sorted = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)


class Channel(StrEnum):
    DESIRED = "desired"  # controller → device, retained, QoS 1
    REPORTED = "reported"  # device → controller, retained, QoS 1
    HEALTH = "health"  # device → controller, QoS 1
    ACK = "ack"  # controller → device, QoS 0
    PRESENCE = "presence"  # device → controller, will


class State(StrEnum):
    """Where an update stands on a device. The transitions are `device_agent.update`'s."""

    IDLE = "IDLE"
    OFFERED = "OFFERED"
    DEFERRED = "DEFERRED"
    DOWNLOADING = "DOWNLOADING"
    STAGED = "STAGED"
    ARMED = "ARMED"
    INSTALLING = "INSTALLING"
    INSTALLED = "INSTALLED"
    ACTIVATING = "ACTIVATING"
    TRIAL = "TRIAL"
    COMMITTING = "COMMITTING"
    COMMITTED = "COMMITTED"
    ROLLING_BACK = "ROLLING_BACK"
    ROLLED_BACK = "ROLLED_BACK"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    REJECTED = "REJECTED"
    SUPERSEDED = "SUPERSEDED"
    STUCK = "STUCK"


class Kind(StrEnum):
    INSTALL = "install"  # forward: needs a valid lease (`not_after`) to start INSTALLING
    ROLLBACK = "rollback"  # back to what ran before: carries no lease, obeyed at once
    NONE = "none"  # nothing to do; cancels what has not reached ACTIVATING


class Reason(StrEnum):
    """Why a device refused an order, waits, failed or rolled back. Reported, shown, counted."""

    # orders refused (State.REJECTED)
    BAD_SIGNATURE = "bad_signature"
    FOREIGN_DEVICE = "foreign_device"
    LOWER_GENERATION = "lower_generation"
    CONFLICTING_GENERATION = "conflicting_generation"
    EXPIRED = "expired"
    MALFORMED = "malformed"
    KNOWN_BAD = "known_bad"
    SECURITY_EPOCH = "security_epoch"
    UNKNOWN_INSTALLER = "unknown_installer"
    # waiting (State.DEFERRED); further values are the names of preconditions
    LEASE_EXPIRED = "lease_expired"
    # failures
    DOWNLOAD_FAILED = "download_failed"
    DOWNLOAD_REFUSED = "download_refused"  # 4xx: final
    SIZE_MISMATCH = "size_mismatch"
    DIGEST_MISMATCH = "digest_mismatch"
    UNSAFE_BUNDLE = "unsafe_bundle"
    DISK_FULL = "disk_full"
    INSTALL_FAILED = "install_failed"
    ACTIVATION_FAILED = "activation_failed"
    BOOT_FAILED = "boot_failed"
    SELF_TEST_FAILED = "self_test_failed"
    TRIAL_EXPIRED = "trial_expired"  # no proof of link although the network was up
    LINK_LOST = "link_lost"  # inconclusive: never counted against the release by the device
    ORDERED = "ordered"  # rolled back because a signed order said so
    TOO_MANY_TRANSITIONS = "too_many_transitions"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentOrder:
    """What one component of one device must be."""

    release: str  # name of the Release manifest
    digest: str  # sha256 of the artifact file
    size: int  # bytes
    urls: tuple[str, ...]  # tried in order
    installer: str = "slots"


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """The director's order for one device: the inner, signed part of the `desired` message."""

    v: int = VERSION
    device: str
    term: int  # raised at each take-over and restore of the controller
    generation: int  # raised at each new order for this device
    attempt: str  # ties reports and evidence to this try
    kind: Kind
    components: dict[str, ComponentOrder]  # the whole device: component → what it must be
    preconditions: tuple[str, ...] = ()
    security_epoch: int = 0
    issued_at: str  # RFC 3339, UTC
    not_after: str | None = None  # the install lease of a forward order


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    keyid: str  # sha256 of the raw public key, hex
    sig: str  # hex


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentReport:
    release: str
    digest: str
    committed: bool  # installed and committed are different facts


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """Appended at every activation (TRIAL entered) and every return to an older set."""

    component: str
    release: str
    digest: str
    at: float  # Unix seconds by the device's clock: shown, never decided on
    event: str  # activated | rolled_back


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What the device says it is: retained, the last one by (boot_count, seq) wins."""

    v: int = VERSION
    boot: str  # id of this boot of the device
    boot_count: int
    seq: int  # one counter for reported and health of one boot
    attempt: str | None = None
    term: int = 0
    generation: int = 0
    state: State
    reason: str | None = None
    blocked_by: tuple[str, ...] = ()
    components: dict[str, ComponentReport]
    history: tuple[HistoryEntry, ...] = ()
    log: str = ""  # the last 2 KiB
    nonce: str | None = None  # asks for its echo in an ack: the proof of link


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """1–60 samples as columns, with the counters and the exposure of the same interval."""

    v: int = VERSION
    boot: str
    boot_count: int
    seq: int
    components: dict[str, str]  # component → digest active during the whole interval
    attempt: str | None = None
    t0: float  # Unix seconds of the first sample, device clock: bounded, never trusted
    dt: float  # seconds between samples; the interval is dt × number of samples
    columns: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    exposure: dict[str, float] = field(default_factory=dict)
    dropped: int = 0  # messages lost from the outbox since the last message


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """What this batch committed: [first, last] sequence numbers, both ends included."""

    v: int = VERSION
    boot: str
    ranges: tuple[tuple[int, int], ...]
    nonce: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    v: int = VERSION
    online: bool
    boot: str
    boot_count: int
    sleeping_until: float | None = None  # Unix seconds: announced sleep is not silence


Message = Desired | Reported | Health | Ack | Presence
M = TypeVar("M")


def topic(device: str, channel: Channel) -> str:
    """`bw/v1/{device}/{channel}`; raises ProtocolError for an id that is none."""
    if not ID.fullmatch(device):
        raise ProtocolError("bad_id", f"{device!r} is not a device id ({ID.pattern})")
    return f"bw/v1/{device}/{channel}"


def parse_topic(text: str) -> tuple[str, Channel]:
    """(device, channel) of a topic; raises ProtocolError("bad_topic")."""
    match = _TOPIC.fullmatch(text)
    if match is None:
        raise ProtocolError("bad_topic", repr(text[:120]))
    return match.group(1), Channel(match.group(2))


def encode(message: Message) -> bytes:
    """A message as compact UTF-8 JSON; raises ValueError for NaN and infinities."""
    return json.dumps(
        to_wire(message), separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def decode(cls: type[M], payload: bytes) -> M:
    """Strictly decode one message; raises ProtocolError with the reason to count.

    The agent's decoder. The ingest has a faster one made from the same dataclasses; both are held
    against the same golden and hostile messages in `tests/protocol/`.
    """
    message = from_wire(cls, load(payload))
    check(message)
    return message


def load(payload: bytes) -> Any:
    """JSON bytes → data, refusing oversize, depth, duplicate keys, NaN and non-UTF-8."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError("oversize", f"{len(payload)} bytes; at most {MAX_MESSAGE_BYTES}")
    try:
        text = payload.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("not_utf8", str(error)) from None
    _check_depth(text)
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_no_duplicates)
    except ProtocolError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProtocolError("not_json", str(error)[:200]) from None


def canonical(signed: Any) -> bytes:
    """The bytes that are signed: sorted keys, no blanks, UTF-8, no floats (as TUF does)."""
    return _sorted.encode(signed).encode()


def envelope(desired: Desired, signatures: tuple[Signature, ...]) -> bytes:
    """The `desired` message: the order beside its signatures."""
    return sealed(canonical(to_wire(desired)), signatures)


def sealed(signed: bytes, signatures: tuple[Signature, ...]) -> bytes:
    """The envelope around the canonical bytes of an order: itself canonical."""
    listed = canonical({"signatures": [to_wire(s) for s in signatures]})
    return b'%s,"signed":%s}' % (listed[:-1], signed)


def open_envelope(payload: bytes) -> tuple[Desired, bytes, tuple[Signature, ...]]:
    """(order, the bytes that must carry the signature, signatures), not yet verified."""
    body = load(payload)
    if not isinstance(body, dict) or not isinstance(body.get("signed"), dict):
        raise ProtocolError("malformed", "a desired message is {signed, signatures}")
    listed = body.get("signatures")
    if not isinstance(listed, list) or not 1 <= len(listed) <= 8:
        raise ProtocolError("malformed", "signatures: 1 to 8 are expected")
    signatures = tuple(from_wire(Signature, item) for item in listed)
    desired = from_wire(Desired, body["signed"])
    check(desired)
    return desired, canonical(body["signed"]), signatures


def check(message: object) -> None:
    """The bounds that types cannot say; raises ProtocolError. Shared by both decoders."""
    if getattr(message, "v", VERSION) != VERSION:
        raise ProtocolError("unknown_version", f"v is {getattr(message, 'v', None)}, not {VERSION}")
    if isinstance(message, Reported | Health | Ack | Presence):
        _bounded("boot", message.boot, 64)
    if isinstance(message, Reported | Health):
        _natural("bootCount", message.boot_count)
        _natural("seq", message.seq)
        if message.attempt is not None:
            _bounded("attempt", message.attempt, 128)
    if isinstance(message, Health):
        _check_health(message)
    elif isinstance(message, Reported):
        _check_reported(message)
    elif isinstance(message, Desired):
        _check_desired(message)
    elif isinstance(message, Ack):
        _check_ack(message)
    elif isinstance(message, Presence):
        _natural("bootCount", message.boot_count)
        finite("sleepingUntil", message.sleeping_until)


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, as every wire and API time is written."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_timestamp(text: str) -> datetime:
    """The moment of an RFC 3339 text with a zone; raises ProtocolError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ProtocolError("malformed", f"{text[:40]!r} is not an RFC 3339 time") from None
    if moment.tzinfo is None:
        raise ProtocolError("malformed", f"{text[:40]!r} has no time zone")
    return moment.astimezone(UTC)


# -- bounds ---------------------------------------------------------------------------------------


def _check_health(message: Health) -> None:
    _components(message.components)
    for digest in message.components.values():
        _digest("components", digest)
    _names("columns", message.columns)
    _names("counters", message.counters)
    _names("exposure", message.exposure)
    _check_columns(message.columns)
    for name, count in message.counters.items():
        _natural(f"counters.{name}", count)
    for name, amount in message.exposure.items():
        if finite(f"exposure.{name}", amount) < 0:
            raise ProtocolError("malformed", f"exposure.{name}: below zero")
    finite("t0", message.t0)
    if not 0 < finite("dt", message.dt) <= 86_400 * 31:
        raise ProtocolError("malformed", "dt: above 0 s and at most 31 days")
    _natural("dropped", message.dropped)


def _names(label: str, table: Mapping[str, object]) -> None:
    if len(table) > MAX_METRICS:
        raise ProtocolError("malformed", f"{label}: more than {MAX_METRICS} names")
    for name in table:
        if not METRIC.fullmatch(name):
            raise ProtocolError("bad_metric", f"{label}: {name[:64]!r} ({METRIC.pattern})")


def _check_columns(columns: Mapping[str, tuple[float | None, ...]]) -> None:
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise ProtocolError("malformed", "columns: of different lengths")
    if lengths and not 1 <= next(iter(lengths)) <= MAX_SAMPLES:
        raise ProtocolError("malformed", f"columns: 1 to {MAX_SAMPLES} samples are expected")
    for column in columns.values():
        for sample in column:
            finite("columns", sample)


def _check_reported(message: Reported) -> None:
    _components(message.components)
    for component in message.components.values():
        _bounded("release", component.release, 64)
        _digest("components", component.digest)
    if len(message.history) > MAX_HISTORY:
        raise ProtocolError("malformed", f"history: more than {MAX_HISTORY} entries")
    if len(message.blocked_by) > 16:
        raise ProtocolError("malformed", "blockedBy: more than 16 entries")
    for entry in message.history:
        finite("history.at", entry.at)
        _bounded("history.release", entry.release, 64)
        _digest("history", entry.digest)
    for blocker in message.blocked_by:
        _bounded("blockedBy", blocker, 64)
    if message.reason is not None:
        _bounded("reason", message.reason, 64)
    if message.nonce is not None:
        _bounded("nonce", message.nonce, 64)
    _natural("term", message.term)
    _natural("generation", message.generation)


def _check_desired(message: Desired) -> None:
    if not ID.fullmatch(message.device):
        raise ProtocolError("bad_id", f"device: {message.device[:64]!r}")
    _components(message.components)
    _natural("term", message.term)
    _natural("generation", message.generation)
    _bounded("attempt", message.attempt, 128)
    parse_timestamp(message.issued_at)
    if message.not_after is not None:
        parse_timestamp(message.not_after)
    for component in message.components.values():
        _digest("components", component.digest)
        _natural("size", component.size)
        if not 1 <= len(component.urls) <= 8:
            raise ProtocolError("malformed", "urls: 1 to 8 are expected")


def _check_ack(message: Ack) -> None:
    if len(message.ranges) > 1024:
        raise ProtocolError("malformed", "ranges: more than 1024")
    for first, last in message.ranges:
        if not 0 <= first <= last:
            raise ProtocolError("malformed", "ranges: [first, last] with first ≤ last")


def _components(table: Mapping[str, object]) -> None:
    if len(table) > MAX_COMPONENTS:
        raise ProtocolError("malformed", f"components: more than {MAX_COMPONENTS}")
    for name in table:
        if not ID.fullmatch(name):
            raise ProtocolError("bad_id", f"component: {name[:64]!r}")


def _digest(where: str, text: str) -> None:
    if not DIGEST.fullmatch(text):
        raise ProtocolError("malformed", f"{where}: {text[:80]!r} is not sha256:<64 hex digits>")


def _bounded(where: str, text: str, longest: int) -> None:
    if not 1 <= len(text) <= longest or not text.isprintable():
        raise ProtocolError("malformed", f"{where}: 1 to {longest} printable characters")


def _natural(where: str, number: int) -> None:
    if not 0 <= number <= MAX_SAFE_INTEGER:
        raise ProtocolError("malformed", f"{where}: 0 to 2^53 − 1")


def _check_depth(text: str) -> None:
    """Refuse nesting before a recursive parser sees it; brackets within strings do not count."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _TOKEN.finditer(text):
        match token.group()[0]:
            case "[" | "{":
                depth += 1
            case "]" | "}":
                depth -= 1
            case _:
                continue
        if depth > MAX_DEPTH:
            raise ProtocolError("too_deep", f"more than {MAX_DEPTH} levels")


def _refuse_constant(name: str) -> float:
    raise ProtocolError("not_finite", name)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ProtocolError("malformed", "an object names a key twice")
    return table
