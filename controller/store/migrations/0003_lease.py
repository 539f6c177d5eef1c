"""The controller's lease gets a row of its own; its term moves there."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "leases",
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("term", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(length=200), nullable=False),
        sa.Column("beat", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.execute(
        "INSERT INTO leases (name, term, holder, beat, seconds) "
        "SELECT 'controller', CAST(CAST(value AS VARCHAR) AS INTEGER), '', 0, 0.0 "
        "FROM meta WHERE key = 'term'"
    )
    op.execute("DELETE FROM meta WHERE key = 'term'")
