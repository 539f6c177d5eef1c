"""Devices are counted by fleet and status from an index."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_index("ix_devices_fleet_status", "devices", ["fleet", "status"], unique=False)
