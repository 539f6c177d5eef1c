"""The tables of the telemetry store as of version 0.1.0, before it had revisions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "telemetry_boots",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("boot", sa.String(length=64), nullable=False),
        sa.Column("boot_count", sa.BigInteger(), nullable=False),
        sa.Column("high", sa.BigInteger(), nullable=False),
        sa.Column("missing", sa.LargeBinary(), nullable=False),
        sa.Column("last_seen", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("device", "boot"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "telemetry_contacts",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("change", sa.BigInteger(), nullable=False),
        sa.Column("last_contact", sa.Double(), nullable=False),
        sa.Column("heard_clock", sa.Double(), nullable=False),
        sa.Column("online", sa.Boolean(), nullable=False),
        sa.Column("sleeping_until", sa.Double(), nullable=True),
        sa.Column("boot", sa.String(length=64), nullable=False),
        sa.Column("boot_count", sa.BigInteger(), nullable=False),
        sa.Column("boot_floor", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("device"),
    )
    op.create_index("ix_telemetry_contacts_change", "telemetry_contacts", ["change"], unique=False)
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
        sa.Column("levels", sa.Text(), nullable=False),
        sa.Column("counters", sa.Text(), nullable=False),
        sa.Column("exposure", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("batch", "place"),
        sqlite_with_rowid=False,
    )
    op.create_index("telemetry_health_received", "telemetry_health", ["received_at"], unique=False)
    op.create_table(
        "telemetry_refusals",
        sa.Column("reason", sa.String(length=64), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("last_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("reason"),
    )
    op.create_table(
        "telemetry_reports",
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("boot", sa.String(length=64), nullable=False),
        sa.Column("boot_count", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("reported_at", sa.Double(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=64), nullable=True),
        sa.Column("blocked_by", sa.Text(), nullable=False),
        sa.Column("attempt", sa.String(length=128), nullable=True),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("components", sa.Text(), nullable=False),
        sa.Column("history", sa.Text(), nullable=False),
        sa.Column("log", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("device"),
    )
    op.create_table(
        "telemetry_rollups",
        sa.Column("hour", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("device", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.Double(), nullable=False),
        sa.Column("squares", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("hour", "device", "kind", "name"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "telemetry_state",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.Column("hearing", sa.Double(), nullable=False),
        sa.Column("hearing_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.execute(
        "INSERT INTO telemetry_state (id, batch, hearing, hearing_at) VALUES (1, 0, 0.0, 0.0)"
    )
