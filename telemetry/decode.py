"""Bytes → checked messages, as strict as the agent's own decoder and many times faster. Pure.

Three roads, each taking only what is beyond doubt and leaving the rest to the next; only the last,
`device_agent.protocol.decode`, names reasons. So they can differ in speed only.

1. `_straight`, for health, nearly all of the traffic: one typed pass into a `Sample`, bounds
   included. Doubtful: an unknown or repeated key, an escape, and whatever breaks a bound.
2. `_fast`, for all messages: untyped JSON, then the protocol's own dataclasses and bounds.
3. the agent's decoder.

A duplicate key hides from msgspec. It is found by counting: without escapes, a document has as many
colons as keys and as its strings hold (each digest holds one). The second road counts `":` instead,
which is doubtful when a blank follows a quote, or when a string holds `":`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, cast

import msgspec
from msgspec import Meta

from device_agent import protocol
from device_agent.protocol import Health, HistoryEntry, Presence, ProtocolError, Reported

LARGEST = 1e100  # beyond it, squares overflow; no physical quantity comes near

M = TypeVar("M", bound=Reported | Health | Presence)
_BLANK_AFTER_QUOTE = re.compile(rb'"[ \t\r\n]')
_REFUSED = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)
_REMEMBERED = 10_000  # names and component sets that were found good
_USUAL = 1024  # bytes of a component set that is remembered

_Natural = Annotated[int, Meta(ge=0, le=protocol.MAX_SAFE_INTEGER)]
_Number = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
_Column = Annotated[tuple[_Number | None, ...], Meta(min_length=1, max_length=protocol.MAX_SAMPLES)]
_Table = Meta(max_length=protocol.MAX_METRICS)

# What stands for a field that is not there; no message can say it.
_NO_COLUMNS: Final[dict[str, tuple[float | None, ...]]] = {}
_NO_COUNTERS: Final[dict[str, int]] = {}
_NO_EXPOSURE: Final[dict[str, float]] = {}
_NO_ATTEMPT = ""
_NOT_DROPPED = -1
_BACKSLASH = 0x5C
_REQUIRED = 7  # fields of a Sample


class Sample(msgspec.Struct, rename="camel", gc=False):
    """A checked `Health`: the same fields, cheaper to make.

    `components` are the bytes that came: a fleet says the same few again and again, so that what
    they mean is looked up (`components_text`).
    """

    v: Literal[1]
    boot: Annotated[str, Meta(min_length=1, max_length=64)]
    boot_count: _Natural
    seq: _Natural
    components: msgspec.Raw
    t0: float
    dt: Annotated[float, Meta(gt=0, le=86_400 * 31)]
    attempt: Annotated[str, Meta(max_length=128)] | None = _NO_ATTEMPT
    columns: Annotated[dict[str, _Column], _Table] = msgspec.field(
        default_factory=lambda: _NO_COLUMNS
    )
    counters: Annotated[dict[str, _Natural], _Table] = msgspec.field(
        default_factory=lambda: _NO_COUNTERS
    )
    exposure: Annotated[dict[str, Annotated[float, Meta(ge=0, le=LARGEST)]], _Table] = (
        msgspec.field(default_factory=lambda: _NO_EXPOSURE)
    )
    dropped: _Natural = _NOT_DROPPED


class _Components(NamedTuple):
    text: str  # as JSON without blanks
    colons: int


_sample = msgspec.json.Decoder(Sample)
_components = msgspec.json.Decoder(
    Annotated[dict[str, str], Meta(max_length=protocol.MAX_COMPONENTS)]
)
_compact = msgspec.json.Encoder().encode
_known_names: set[str] = set()
_known_components: dict[bytes, _Components] = {}


class _Doubtful(ValueError):
    pass


def health(payload: bytes) -> Sample | Health:
    """One health message; raises ProtocolError with the reason to count."""
    try:
        return _straight(payload)
    except _REFUSED:
        return _slow(Health, payload)


def decode(cls: type[M], payload: bytes) -> M:
    """One message; raises ProtocolError with the reason to count."""
    if cls is Health:
        try:
            return cast(M, as_health(_straight(payload)))
        except _REFUSED:
            pass
    return _slow(cls, payload)


def _slow(cls: type[M], payload: bytes) -> M:
    """The second road, and then the third."""
    try:
        message = _fast(cls, payload)
    except _REFUSED:
        message = protocol.decode(cls, payload)
    if isinstance(message, Health):
        _in_range(message)
    if isinstance(message, Reported):
        return cast(M, _storable(message))
    return message


def as_health(sample: Sample) -> Health:
    """The same message as the contract's own dataclass."""
    values = {name: getattr(sample, name) for name, _ in _NAMES[Health]}
    return Health(**values | {"components": _components.decode(sample.components)})


def components_text(message: Sample | Health) -> str:
    """Its components as JSON."""
    if isinstance(message, Health):
        return _compact(message.components).decode()
    said = bytes(message.components)
    return (_known_components.get(said) or _learn_components(said)).text


def _straight(payload: bytes) -> Sample:
    if len(payload) > protocol.MAX_MESSAGE_BYTES or payload.find(_BACKSLASH) >= 0:
        raise _Doubtful
    found = _sample.decode(payload)
    columns, counters, exposure = found.columns, found.counters, found.exposure
    said = bytes(found.components)
    components = _known_components.get(said) or _learn_components(said)
    if payload.count(b":") != components.colons + _colons(found) or not found.boot.isprintable():
        raise _Doubtful
    if len(columns) > 1 and len(set(map(len, columns.values()))) != 1:
        raise _Doubtful
    known = _known_names.issuperset
    for names in (columns, counters, exposure):
        if not known(names):
            _learn_names(names)
    return found


def _colons(found: Sample) -> int:
    """How many colons a document with these fields, each once, has beside those of its components.

    Fills in what is not there.
    """
    columns, counters, exposure = found.columns, found.counters, found.exposure
    colons = _REQUIRED + len(columns) + len(counters) + len(exposure)
    colons += (columns is not _NO_COLUMNS) + (counters is not _NO_COUNTERS)
    colons += (exposure is not _NO_EXPOSURE) + found.boot.count(":")
    attempt = found.attempt
    if attempt == _NO_ATTEMPT:
        found.attempt = None
    elif attempt is None:
        colons += 1
    elif attempt.isprintable():
        colons += 1 + attempt.count(":")
    else:
        raise _Doubtful
    if found.dropped == _NOT_DROPPED:
        found.dropped = 0
        return colons
    return colons + 1


def _learn_names(names: Mapping[str, object]) -> None:
    if any(not protocol.METRIC.fullmatch(name) for name in names):
        raise _Doubtful
    if len(_known_names) > _REMEMBERED:  # a device may invent as many as it likes
        _known_names.clear()
    _known_names.update(names)


def _learn_components(said: bytes) -> _Components:
    components = _components.decode(said)
    if said.count(b":") != 2 * len(components):
        raise _Doubtful
    for name, digest in components.items():
        if not (protocol.ID.fullmatch(name) and protocol.DIGEST.fullmatch(digest)):
            raise _Doubtful
    known = _Components(_compact(components).decode(), said.count(b":"))
    if len(said) <= _USUAL:
        if len(_known_components) > _REMEMBERED:
            _known_components.clear()
        _known_components[said] = known
    return known


def _fast(cls: type[M], payload: bytes) -> M:
    if len(payload) > protocol.MAX_MESSAGE_BYTES or _BLANK_AFTER_QUOTE.search(payload):
        raise _Doubtful
    data = msgspec.json.decode(payload)
    if not isinstance(data, dict) or payload.count(b'":') != _pairs(data, protocol.MAX_DEPTH):
        raise _Doubtful
    values = {name: data[wire] for name, wire in _NAMES[cls] if wire in data}
    message = msgspec.convert(values, cls)
    if isinstance(message, Reported) and any(
        len(text) > protocol.MAX_TEXT for text in _texts(message)
    ):
        raise _Doubtful
    protocol.check(message)
    return message


def _pairs(value: Any, depth: int) -> int:
    """Keys in all objects of a document; raises when it nests deeper than `depth`."""
    if depth == 0 and isinstance(value, dict | list):
        raise _Doubtful
    if isinstance(value, dict):
        inner = (_pairs(v, depth - 1) for v in value.values() if isinstance(v, dict | list))
        return len(value) + sum(inner)
    if isinstance(value, list):
        return sum(_pairs(v, depth - 1) for v in value if isinstance(v, dict | list))
    return 0


def _texts(message: Reported) -> Iterator[str]:
    yield message.log
    for entry in message.history:
        yield entry.component
        yield entry.event


def _in_range(message: Health) -> None:
    for column in message.columns.values():
        for sample in column:
            if sample is not None and abs(sample) > LARGEST:
                raise ProtocolError("out_of_range", "columns: beyond ±1e100")
    if any(amount > LARGEST for amount in message.exposure.values()):
        raise ProtocolError("out_of_range", "exposure: beyond 1e100")


def _storable(message: Reported) -> Reported:
    """Free text without NUL and lone surrogates: JSON can carry them, databases cannot."""
    if all(_clean(text) == text for text in _texts(message)):
        return message
    history = tuple(
        dataclasses.replace(entry, component=_clean(entry.component), event=_clean(entry.event))
        for entry in message.history
    )
    return dataclasses.replace(message, log=_clean(message.log), history=history)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _names(cls: type[Any]) -> tuple[tuple[str, str], ...]:
    return tuple((field.name, protocol.camel(field.name)) for field in dataclasses.fields(cls))


_NAMES: Mapping[type[Any], tuple[tuple[str, str], ...]] = {
    cls: _names(cls) for cls in (Reported, Health, Presence)
}
for _nested in (protocol.ComponentReport, HistoryEntry):
    if any(name != wire for name, wire in _names(_nested)):
        raise TypeError(f"{_nested.__name__}: the fast decoder renames top-level fields only")
