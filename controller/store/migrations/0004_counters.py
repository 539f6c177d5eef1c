"""Counters of members, looks at the evidence, and the indexes that pages are read by."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "member_counts",
        sa.Column("rollout", sa.String(length=26), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("arm", sa.String(length=10), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["rollout"], ["rollouts.id"]),
        sa.PrimaryKeyConstraint("rollout", "step", "arm", "state"),
    )
    op.execute(
        "INSERT INTO member_counts (rollout, step, arm, state, n) "
        "SELECT rollout, step, arm, state, count(*) FROM members "
        "GROUP BY rollout, step, arm, state"
    )
    op.create_table(
        "looks",
        sa.Column("rollout", sa.String(length=26), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("numbers", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["rollout"], ["rollouts.id"]),
        sa.PrimaryKeyConstraint("rollout", "at"),
    )
    op.drop_index("ix_members_state", "members")
    op.create_index("ix_members_state", "members", ["rollout", "state", "device"], unique=False)
    op.create_index("ix_members_device", "members", ["device"], unique=False)
    op.create_index("ix_devices_fleet_id", "devices", ["fleet", "id"], unique=False)
    op.create_index("ix_audit_subject", "audit", ["subject", "seq"], unique=False)
