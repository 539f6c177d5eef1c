"""Dataclasses ⇄ JSON values, by annotations: the types of what travels; bounds are the protocol's.

Rules, in order:

1. Wire names are camelCase; a field that is None is left out.
2. Types are strict: no `true` for 1, no "1" for 1, no NaN, no infinities.
3. Unknown fields are accepted; a missing one has its default, or is an error.

What reads a type is put together once for each class, not found out anew with each message.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache, partial
from typing import Any, TypeVar

MAX_TEXT = 2048  # characters of any string: a log tail, an URL
MAX_SAFE_INTEGER = 2**53 - 1  # what every JSON implementation can hold exactly

T = TypeVar("T")
_PLAIN = frozenset((str, int, float, bool))
_Read = Callable[[Any, str], Any]  # (value, where it stands) → what it means, or ProtocolError


class ProtocolError(ValueError):
    """A message that may not be believed. `reason` is a short code to count it by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def to_wire(value: Any) -> Any:
    """Dataclasses → dicts with camelCase names; fields that are None are left out."""
    kind = type(value)
    if value is None or kind in _PLAIN:
        return value
    if isinstance(value, dict):
        return {key: to_wire(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_wire(item) for item in value]
    if names := _names_of(typing.cast(typing.Hashable, kind)):
        pairs = ((wire, getattr(value, name)) for name, wire in names)
        return {wire: to_wire(item) for wire, item in pairs if item is not None}
    if isinstance(value, StrEnum):
        return value.value
    return value


@cache
def _names_of(cls: Any) -> tuple[tuple[str, str], ...]:
    """(field, its name on the wire) of a dataclass; empty for any other class."""
    return tuple((f.name, camel(f.name)) for f in fields(cls)) if is_dataclass(cls) else ()


def from_wire(cls: type[T], data: Any, where: str = "") -> T:
    """Parsed JSON → dataclass by its annotations; raises ProtocolError("malformed")."""
    if not isinstance(data, dict):
        raise ProtocolError("malformed", f"{where or cls.__name__}: an object is expected")
    values: dict[str, Any] = {}
    for name, wire, read, required in _plan(typing.cast(typing.Hashable, cls)):
        if wire in data:
            values[name] = read(data[wire], f"{where}.{wire}" if where else wire)
        elif required:
            raise ProtocolError("malformed", f"{where}.{wire}: missing".lstrip("."))
    return cls(**values)


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


@cache
def _plan(cls: Any) -> tuple[tuple[str, str, _Read, bool], ...]:
    hints = typing.get_type_hints(cls)
    return tuple(
        (
            f.name,
            camel(f.name),
            _reader(hints[f.name]),
            f.default is MISSING and f.default_factory is MISSING,
        )
        for f in fields(cls)
    )


def _reader(hint: Any) -> _Read:
    """What reads a value of this type: (data, where it stands) → the value, or ProtocolError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # every union on this wire is `T | None`
        (some,) = (arg for arg in args if arg is not type(None))
        return partial(_optional, _reader(some))
    if origin is dict:
        return partial(_table, _reader(args[1]))
    if origin is tuple and args[-1] is Ellipsis:
        return partial(_array, _reader(args[0]))
    if origin is tuple:
        return partial(_row, tuple(_reader(arg) for arg in args))
    if is_dataclass(hint):
        return partial(from_wire, typing.cast(type, hint))
    if issubclass(hint, StrEnum):
        return partial(_word, hint)
    return {float: _float, int: _int, str: _text, bool: _bool}[hint]


def _optional(read: _Read, data: Any, where: str) -> Any:
    return None if data is None else read(data, where)


def _table(read: _Read, data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ProtocolError("malformed", f"{where}: an object is expected")
    return {key: read(entry, f"{where}.{key[:64]}") for key, entry in data.items()}


def _array(read: _Read, data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise ProtocolError("malformed", f"{where}: an array is expected")
    return tuple([read(entry, f"{where}[{i}]") for i, entry in enumerate(data)])


def _row(reads: Sequence[_Read], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise ProtocolError("malformed", f"{where}: an array is expected")
    if len(data) != len(reads):
        raise ProtocolError("malformed", f"{where}: {len(reads)} values are expected")
    pairs = zip(reads, data, strict=True)
    return tuple([read(entry, f"{where}[{i}]") for i, (read, entry) in enumerate(pairs)])


def _word(kind: type[StrEnum], data: Any, where: str) -> StrEnum:
    try:
        return kind(data)
    except ValueError:
        raise ProtocolError("malformed", f"{where}: {str(data)[:40]!r} is unknown") from None


def _float(data: Any, where: str) -> float:
    if not isinstance(data, int | float) or isinstance(data, bool):
        raise ProtocolError("malformed", f"{where}: float is expected")
    try:
        number = float(data)
    except OverflowError:
        raise ProtocolError("not_finite", f"{where}: too large") from None
    return finite(where, number)


def _int(data: Any, where: str) -> int:
    if not isinstance(data, int) or isinstance(data, bool):
        raise ProtocolError("malformed", f"{where}: int is expected")
    if abs(data) > MAX_SAFE_INTEGER:
        raise ProtocolError("malformed", f"{where}: beyond ±(2^53 − 1)")
    return data


def _text(data: Any, where: str) -> str:
    if not isinstance(data, str):
        raise ProtocolError("malformed", f"{where}: str is expected")
    if len(data) > MAX_TEXT:
        raise ProtocolError("malformed", f"{where}: longer than {MAX_TEXT} characters")
    return data


def _bool(data: Any, where: str) -> bool:
    if not isinstance(data, bool):
        raise ProtocolError("malformed", f"{where}: bool is expected")
    return data


def finite(where: str, number: float | None) -> float:
    if number is not None and not math.isfinite(number):
        raise ProtocolError("not_finite", where)
    return 0.0 if number is None else number
