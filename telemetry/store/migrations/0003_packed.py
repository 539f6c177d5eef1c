"""Sums become packed rows, one a device and hour, and running sums with checkpoints join them.

A score reads a window of thirty days: with ten rows a device and hour that was thousands of rows a
device, now it is one, less what it was at a checkpoint. The checkpoints of the days before this
step are made of the hours, by the samples' own time.
"""

import json
import struct
from collections.abc import Iterator
from hashlib import blake2b
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_KINDS = _COUNTER, _EXPOSURE, _LEVEL = 0, 1, 2
_PIECE = 1_000
_HOURS = "SELECT DISTINCT hour FROM telemetry_rollups_0002 ORDER BY hour"
_Sums = dict[tuple[int, str], tuple[float, float]]  # kind, name → n, total


def upgrade() -> None:
    op.rename_table("telemetry_rollups", "telemetry_rollups_0002")
    if op.get_bind().dialect.name == "postgresql":  # there, names of keys are the schema's
        op.execute("ALTER INDEX telemetry_rollups_pkey RENAME TO telemetry_rollups_0002_pkey")
    layouts = op.create_table(
        "telemetry_layouts",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("names", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    rollups = op.create_table(
        "telemetry_rollups",
        sa.Column("hour", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("layout", sa.BigInteger(), nullable=False),
        sa.Column("sums", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("hour", "device"),
        sqlite_with_rowid=False,
    )
    sums = op.create_table(
        "telemetry_sums",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("layout", sa.BigInteger(), nullable=False),
        sa.Column("sums", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("device"),
        sqlite_with_rowid=False,
    )
    checkpoints = op.create_table(
        "telemetry_checkpoints",
        sa.Column("day", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("place", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("layout", sa.BigInteger(), nullable=False),
        sa.Column("devices", sa.Text(), nullable=False),
        sa.Column("sums", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("day", "place"),
    )
    _pack(layouts, rollups, sums, checkpoints)
    op.drop_table("telemetry_rollups_0002")


def _pack(layouts: sa.Table, rollups: sa.Table, sums: sa.Table, checkpoints: sa.Table) -> None:
    bind = op.get_bind()
    ever: dict[str, _Sums] = {}
    texts: dict[int, str] = {}
    day = None
    for hour in bind.execute(sa.text(_HOURS)).scalars().all():
        if ever and day != hour // 24:
            _insert(checkpoints, _checkpoint(hour // 24, ever, texts))
        day = hour // 24
        rows = []
        for device, measured in _hour(hour):
            rows.append((hour, device, *_packed(measured, texts)))
            _add(ever.setdefault(device, {}), measured)
        _insert(rollups, rows)
    _insert(sums, [(device, *_packed(ever[device], texts)) for device in sorted(ever)])
    _insert(layouts, sorted(texts.items()))


def _hour(hour: int) -> Iterator[tuple[str, _Sums]]:
    query = sa.text(
        "SELECT device, kind, name, n, total FROM telemetry_rollups_0002 WHERE hour = :hour"
        " ORDER BY device"
    )
    rows = op.get_bind().execute(query, {"hour": hour})
    for device, some in groupby(rows, key=lambda row: row[0]):
        yield device, {(kind, name): (n, total) for _, kind, name, n, total in some}


def _add(to: _Sums, measured: _Sums) -> None:
    for series, (n, total) in measured.items():
        before = to.get(series, (0, 0.0))
        to[series] = before[0] + n, before[1] + total


def _packed(measured: _Sums, texts: dict[int, str]) -> tuple[int, bytes]:
    """Layout and numbers, as `telemetry.sums` has them."""
    names = [sorted(name for kind, name in measured if kind == one) for one in _KINDS]
    text = json.dumps(names, separators=(",", ":"))
    key = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
    texts[key] = text
    numbers = [measured[kind, name][1] for kind in (_COUNTER, _EXPOSURE) for name in names[kind]]
    for part in (0, 1):  # how many samples; their sum
        numbers += [measured[_LEVEL, name][part] for name in names[_LEVEL]]
    return key, struct.pack(f"<{len(numbers)}d", *numbers)


def _checkpoint(day: int, ever: dict[str, _Sums], texts: dict[int, str]) -> list[tuple[Any, ...]]:
    alike: dict[int, list[tuple[str, bytes]]] = {}
    for device in sorted(ever):
        key, numbers = _packed(ever[device], texts)
        alike.setdefault(key, []).append((device, numbers))
    found: list[tuple[Any, ...]] = []
    for key, rows in alike.items():
        for first in range(0, len(rows), _PIECE):
            devices, packed = zip(*rows[first : first + _PIECE], strict=True)
            columns = zip(*(struct.iter_unpack("<d", row) for row in packed), strict=True)
            sums = b"".join(struct.pack("<d", *one) for column in columns for one in column)
            found.append((day, len(found), key, "\n".join(devices), sums))
    return found


def _insert(table: sa.Table, rows: list[tuple[Any, ...]]) -> None:
    names = [column.name for column in table.columns]
    if rows:
        op.bulk_insert(table, [dict(zip(names, row, strict=True)) for row in rows])
