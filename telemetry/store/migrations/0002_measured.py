"""A health message's three tables become one column, and its index of times goes.

A message is written once and read as a whole: one text costs half of three, on both ways. Retention
finds old messages by their batch, so no index is kept up for every message.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_KEPT = "batch, place, device, received_at, boot, seq, attempt, components, t0, seconds"
_JOINED = "'[' || levels || ',' || counters || ',' || exposure || ']'"


def upgrade() -> None:
    op.drop_index("telemetry_health_received", table_name="telemetry_health")
    op.rename_table("telemetry_health", "telemetry_health_0001")
    if op.get_bind().dialect.name == "postgresql":  # there, names of keys are the schema's
        op.execute("ALTER INDEX telemetry_health_pkey RENAME TO telemetry_health_0001_pkey")
    op.create_table(
        "telemetry_health",
        sa.Column("batch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("place", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("received_at", sa.Double(), nullable=False),
        sa.Column("boot", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.String(length=128), nullable=True),
        sa.Column("components", sa.Text(), nullable=False),
        sa.Column("t0", sa.Double(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("measured", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("batch", "place"),
        sqlite_with_rowid=False,
    )
    op.execute(
        f"INSERT INTO telemetry_health ({_KEPT}, measured) "  # noqa: S608 - our own names
        f"SELECT {_KEPT}, {_JOINED} FROM telemetry_health_0001"
    )
    op.drop_table("telemetry_health_0001")
