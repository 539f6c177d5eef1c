"""Reads a fleet's own history from a CSV file. Hostile input: each error names its line.

Format: `docs/calibration.md`. One row is what one device reported of one stretch of time.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_ROWS = 5_000_000
MAX_CELL = 200  # characters
MAX_HEADER = 1 << 16
MAX_EVENTS = 1_000_000_000
_MISSING = frozenset({"", "nan", "na", "n/a", "null", "none", "-"})
_FIXED = ("device", "time", "exposure")


class Unreadable(ValueError):
    """The file is no history; the message says in which line and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Rows in the order of time; arrays of shape (rows,)."""

    devices: tuple[str, ...]
    device: Ints  # index into `devices`
    time: Floats  # seconds since 1970, UTC
    exposure: Floats  # hours
    events: Mapping[str, Ints]
    levels: Mapping[str, Floats]  # NaN: not measured
    repeated: int  # rows that were there before: same device and time
    ignored: tuple[str, ...]  # columns


def read(path: Path) -> History:
    """Raises Unreadable."""
    csv.field_size_limit(1 << 16)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            parted_by = _delimiter(file.readline(MAX_HEADER))
            file.seek(0)
            return _read(csv.reader(file, strict=True, delimiter=parted_by))
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path.name}: not UTF-8 text ({error.reason})") from None


def _delimiter(header: str) -> str:
    """Tables of other programs are parted by semicolons or tabs: the header tells."""
    return max(",;\t", key=header.count)


def _read(lines: csv._reader) -> History:  # type: ignore[name-defined]
    header = _next(lines)
    if header is None:
        raise Unreadable("line 1: the file is empty; a header is expected: device,time,exposure,…")
    columns = _columns(header)
    rows: dict[tuple[str, float], list[float]] = {}
    repeated = 0
    while (row := _next(lines)) is not None:
        if not any(cell.strip() for cell in row):
            continue
        where = f"line {lines.line_num}"
        if len(row) != len(header):
            raise Unreadable(f"{where}: {len(row)} cells, the header has {len(header)}")
        key, values = _row(row, columns, where)
        if key in rows:
            repeated += 1
            continue
        rows[key] = values
        if len(rows) > MAX_ROWS:
            raise Unreadable(f"{where}: more than {MAX_ROWS:,} rows; take a shorter stretch")
    if not rows:
        raise Unreadable("line 2: no rows below the header")
    if repeated > len(rows):
        raise Unreadable(
            f"{repeated:,} of {repeated + len(rows):,} rows repeat the device and time of another; "
            "write the time of day, or one row of a device for each stretch"
        )
    return _history(rows, columns, repeated)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    fixed: Mapping[str, int]
    events: Mapping[str, int]
    levels: Mapping[str, int]
    ignored: tuple[str, ...]


def _columns(header: Sequence[str]) -> _Columns:
    fixed: dict[str, int] = {}
    events: dict[str, int] = {}
    levels: dict[str, int] = {}
    ignored = []
    for at, raw in enumerate(header):
        name = raw.strip().lower()
        kind = next((k for k in ("event", "level") if name.startswith(k)), "")
        if name in _FIXED:
            table = fixed
        elif kind:
            table = events if kind == "event" else levels
        else:
            ignored.append(raw.strip()[:40])
            continue
        if name in table:
            raise Unreadable(f"line 1: column {name!r} is there twice")
        table[name] = at
    for name in ("device", "time"):
        if name not in fixed:
            raise Unreadable(f"line 1: no column {name!r}; found {', '.join(header)[:200]}")
    if not events and not levels:
        raise Unreadable(
            "line 1: no column to judge; name counts events or events.<what>, measurements levels "
            "or levels.<what>"
        )
    return _Columns(fixed=fixed, events=events, levels=levels, ignored=tuple(ignored))


def _row(row: list[str], columns: _Columns, where: str) -> tuple[tuple[str, float], list[float]]:
    for cell in row:
        if len(cell) > MAX_CELL:
            raise Unreadable(f"{where}: a cell of {len(cell)} characters; at most {MAX_CELL}")
    device = row[columns.fixed["device"]].strip()
    if not device:
        raise Unreadable(f"{where}: no device")
    time = _time(row[columns.fixed["time"]], where)
    exposure = 1.0
    if "exposure" in columns.fixed:
        exposure = _number(row[columns.fixed["exposure"]], where, "exposure", missing=0.0)
    if not 0 <= exposure <= 1e5:
        raise Unreadable(
            f"{where}: exposure {exposure:g}; hours between 0 and 100,000 are expected"
        )
    values = [exposure]
    for name, at in columns.events.items():
        count = _number(row[at], where, name, missing=0.0)
        if count != math.floor(count) or not 0 <= count <= MAX_EVENTS:
            raise Unreadable(
                f"{where}: {name} is {row[at].strip()!r}; a count 0, 1, 2 … is expected"
            )
        values.append(count)
    for name, at in columns.levels.items():
        level = _number(row[at], where, name, missing=math.nan)
        if abs(level) > 1e15:
            raise Unreadable(
                f"{where}: {name} is {row[at].strip()!r}; too large to be a measurement"
            )
        values.append(level)
    return (device, time), values


def _number(cell: str, where: str, name: str, *, missing: float) -> float:
    text = cell.strip()
    if text.lower() in _MISSING:
        return missing
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value) or "_" in text:
        raise Unreadable(f"{where}: {name} is {text!r}; a number is expected, or nothing")
    return value


def _time(cell: str, where: str) -> float:
    text = cell.strip()
    try:
        number = float(text)
    except ValueError:
        number = None
    if number is not None:
        return _seconds(number, text, where)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Unreadable(
            f"{where}: time is {text!r}; ISO 8601 (2026-03-01T12:00:00Z) or seconds since 1970"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp()


def _seconds(value: float, text: str, where: str) -> float:
    if not (math.isfinite(value) and -1e11 < value < 1e11):
        much = " (these look like milliseconds or less)" if 1e11 <= value < 1e20 else ""
        raise Unreadable(f"{where}: time is {text!r}; seconds since 1970 are expected{much}")
    return value


def _next(lines: csv._reader) -> list[str] | None:  # type: ignore[name-defined]
    try:
        return next(lines, None)
    except csv.Error as error:
        raise Unreadable(f"line {lines.line_num}: {error}") from None


def _history(
    rows: Mapping[tuple[str, float], list[float]], columns: _Columns, repeated: int
) -> History:
    names = sorted({device for device, _ in rows})
    index: Callable[[str], int] = {name: i for i, name in enumerate(names)}.__getitem__
    device = np.array([index(key[0]) for key in rows], dtype=np.int64)
    time = np.array([key[1] for key in rows])
    table = np.array(list(rows.values()), dtype=np.float64)
    order = np.lexsort((device, time))
    table = table[order]
    counted = len(columns.events)
    return History(
        devices=tuple(names),
        device=device[order],
        time=time[order],
        exposure=table[:, 0],
        events={n: table[:, 1 + i].astype(np.int64) for i, n in enumerate(columns.events)},
        levels={n: table[:, 1 + counted + i] for i, n in enumerate(columns.levels)},
        repeated=repeated,
        ignored=columns.ignored,
    )
