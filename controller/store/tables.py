"""The tables of the control database, for SQLite and PostgreSQL alike.

Columns and keys only: queries live in one file per noun beside this one. One row per device plus
counters: no parent row embeds its children. Times are Unix seconds (float64) by the server's clock.
JSON columns hold plain data; what is judged later (policies, inputs) is stored as it was judged.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from telemetry.store.schema import Schema

metadata = MetaData()
SCHEMA = Schema(
    name="control",
    metadata=metadata,
    folder=Path(__file__).parent / "migrations",
    lock=0x62775F6374,  # "bw_ct"
)
Big = BigInteger().with_variant(Integer, "sqlite")  # SQLite autoincrements INTEGER keys only

meta = Table(  # Git head, counters, notices: one value a key
    "meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", JSON, nullable=False),
)

leases = Table(  # one row: which controller may write, see controller.store.lease
    "leases",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("term", Integer, nullable=False),
    Column("holder", String(200), nullable=False),
    Column("beat", BigInteger, nullable=False),
    Column("seconds", Double, nullable=False),
)

devices = Table(  # the registry: who a device is; what it runs is telemetry's
    "devices",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("fleet", String(63), nullable=False, index=True),
    Column("labels", JSON, nullable=False),
    Column("status", String(16), nullable=False),  # pending | active | retired | quarantined
    Column("password_issue", Integer, nullable=False, default=0),  # raised at each (re)enrolment
    Column("term", Integer, nullable=False, default=0),  # added to the controller's: replaced board
    Column("created_at", Double, nullable=False),
    Column("enrolled_at", Double),
    Column("moved_at", Double),  # evidence before this instant belongs to the fleet before
    Column("replaces", String(63)),
    Column("change", Big, nullable=False, index=True),  # meta counter `registry`: what is new
    Index("ix_devices_fleet_id", "fleet", "id"),
    Index("ix_devices_fleet_status", "fleet", "status"),
)

enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("hash", String(64), primary_key=True),  # sha256 of the one-time token
    Column("device", ForeignKey("devices.id"), nullable=False, index=True),
    Column("expires_at", Double, nullable=False),
    Column("used_at", Double),
)

api_tokens = Table(
    "api_tokens",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("name", String(128), nullable=False),
    Column("role", String(16), nullable=False),
    Column("fleets", JSON, nullable=False),  # list of fleets, empty: all
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
)

sessions = Table(  # of people on the pages; the cookie itself is not kept
    "sessions",
    metadata,
    Column("hash", String(64), primary_key=True),  # sha256 of the cookie
    Column("name", String(256), nullable=False),
    Column("grants", JSON, nullable=False),  # [[role, [fleets]], …]
    Column("via", String(8), nullable=False),  # token | oidc
    Column("token", String(26)),  # of which API token: a revoked one ends its sessions
    Column("csrf", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False, index=True),
    Column("ended_at", Double),
)

logins = Table(  # begun at the identity provider, not come back yet
    "logins",
    metadata,
    Column("state", String(64), primary_key=True),  # sha256 of the state parameter
    Column("browser", String(64), nullable=False),  # sha256 of the browser's login cookie
    Column("nonce", String(64), nullable=False),
    Column("verifier", String(128), nullable=False),  # of PKCE
    Column("next", String(512), nullable=False),
    Column("expires_at", Double, nullable=False, index=True),
)

artifacts = Table(  # index of the content store; the bytes are files named by their digest
    "artifacts",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("size", Big, nullable=False),
    Column("component", String(63), nullable=False),
    Column("version", String(64), nullable=False),
    Column("stored_at", Double, nullable=False),
)

releases = Table(  # immutable: every release document that an accepted commit has shown
    "releases",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("digest", String(71), nullable=False, index=True),
    Column("document", JSON, nullable=False),
    Column("commit", String(64), nullable=False),
    Column("seen_at", Double, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String(26), primary_key=True),  # ULID
    Column("name", String(63), nullable=False, index=True),  # of the Rollout manifest
    Column("fleet", String(63), nullable=False, index=True),
    Column("release", String(63), nullable=False),
    Column("digest", String(71), nullable=False),
    Column("artifacts", JSON, nullable=False),  # component → artifact digest
    Column("commit", String(64), nullable=False),
    Column("author", String(256), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("sentence", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("opened_at", Double, nullable=False),
    Column("step_at", Double, nullable=False),  # when the current step opened
    Column("soak", Double, nullable=False, default=0),  # seconds soaked in this step, with reports
    Column("soak_mark", Double),  # when soak was last advanced
    Column("finished_at", Double),
    Column("updated_at", Double, nullable=False),
    Column("seed", String(64), nullable=False),  # of the draw: fixed by the commit
    Column("pinned", JSON, nullable=False),  # {rollout, fleet, policy, release}: as at opening
    Column("flags", JSON, nullable=False),  # promoted steps, paused by whom, stops seen, …
    Index("ix_rollouts_fleet_state", "fleet", "state"),
)

members = Table(  # drawn once, never moved by a score
    "members",
    metadata,
    Column("rollout", ForeignKey("rollouts.id"), primary_key=True),
    Column("device", String(63), primary_key=True),
    Column("step", Integer, nullable=False),
    Column("arm", String(10), nullable=False),  # exposed | control
    Column("drawn_at", Double, nullable=False),
    Column("hardware", String(64), nullable=False),
    Column("band", Integer, nullable=False),  # score quintile 0–4, −1 unscored
    Column("score", Double),
    Column("previous", JSON),  # component → ComponentOrder data: its own set before
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("attempt", String(128)),
    Column("told_at", Double),
    Column("exposed_at", Double),  # first contact after TRIAL or, for controls, the step's opening
    Column("left_at", Double),  # censored here: updated, moved, retired, other component changed
    Column("updated_at", Double, nullable=False),
    Index("ix_members_state", "rollout", "state", "device"),
    Index("ix_members_device", "device"),
)

member_counts = Table(  # how many members are in each state: kept with `members`, never counted
    "member_counts",
    metadata,
    Column("rollout", ForeignKey("rollouts.id"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("arm", String(10), primary_key=True),
    Column("state", String(16), primary_key=True),
    Column("n", Integer, nullable=False),
)

looks = Table(  # what the evidence said while a step soaked, at some moments: for the chart
    "looks",
    metadata,
    Column("rollout", ForeignKey("rollouts.id"), primary_key=True),
    Column("at", Double, primary_key=True),
    Column("numbers", JSON, nullable=False),
)

decisions = Table(
    "decisions",
    metadata,
    Column("id", String(26), primary_key=True),  # ULID
    Column("rollout", ForeignKey("rollouts.id"), nullable=False),
    Column("at", Double, nullable=False),
    Column("kind", String(16), nullable=False),  # open | draw | verdict | command | state
    Column("verdict", String(16), nullable=False),
    Column("sentence", Text, nullable=False),
    Column("inputs", JSON, nullable=False),
    Column("numbers", JSON, nullable=False),  # A, E_m, F_m, bands, counts
    Column("watermark", Big, nullable=False),
    Column("commit", String(64), nullable=False),
    Column("policy", JSON, nullable=False),
    Column("term", Integer, nullable=False),
    Index("ix_decisions_rollout_at", "rollout", "at"),
)

commands = Table(  # what people want; the loop decides
    "commands",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("kind", String(16), nullable=False),  # rollback hold lift pause resume promote stop
    Column("rollout", String(26)),
    Column("body", JSON, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Column("incident", String(128)),
    Column("at", Double, nullable=False),
    Column("state", String(10), nullable=False, index=True),  # recorded | done | refused
    Column("result", Text, nullable=False, default=""),
    Column("done_at", Double),
)

holds = Table(
    "holds",
    metadata,
    Column("id", String(26), primary_key=True),  # ULID, also the file's name in Git
    Column("rollout", String(63), nullable=False),  # name of the Rollout manifest
    Column("fleet", String(63), nullable=False),
    Column("release", String(63), nullable=False),
    Column("digest", String(71), nullable=False),
    Column("artifacts", JSON, nullable=False),  # rejected artifact digests
    Column("to", String(63), nullable=False),  # stay | previous | <release>
    Column("scope", JSON, nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("incident", String(128)),
    Column("created_at", Double, nullable=False),
    Column("commit", String(64)),  # where Git has it; None: still to be recorded
    Column("lift", String(26)),
    Column("lifted_at", Double),
    Column("lifted_by", String(128)),
    Column("lift_reason", Text),
    Column("lift_commit", String(64)),
)

stops = Table(  # stop everything: no new activation in scope
    "stops",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("scope", String(16), nullable=False),  # all | product | hardware | digest
    Column("value", String(128), nullable=False, default=""),
    Column("reason", Text, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("at", Double, nullable=False),
    Column("lifted_at", Double),
    Column("lifted_by", String(128)),
)

desired = Table(  # the last order of each device, signed; the broker is a cache of this
    "desired",
    metadata,
    Column("device", String(63), primary_key=True),
    Column("term", Integer, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("attempt", String(128), nullable=False),
    Column("kind", String(10), nullable=False),
    Column("components", JSON, nullable=False),  # component → digest
    Column("rollout", String(26)),
    Column("body", LargeBinary, nullable=False),  # the envelope as published
    Column("at", Double, nullable=False),
    Column("published", Boolean, nullable=False, index=True),
)

audit = Table(  # append-only and chained
    "audit",
    metadata,
    Column("seq", Big, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(128), nullable=False),
    Column("detail", JSON, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    UniqueConstraint("hash"),
    Index("ix_audit_subject", "subject", "seq"),
)

approvals = Table(  # what waits for a second person, bound to the digest of what was seen
    "approvals",
    metadata,
    Column("id", String(26), primary_key=True),  # ULID
    Column("kind", String(16), nullable=False),  # start | recall | promote | lift | rule
    Column("fleet", String(63), nullable=False, index=True),
    Column("rollout", String(26), nullable=False),  # id; of the rule: empty
    Column("digest", String(71), nullable=False),  # of `seen`: a vote names it
    Column("seen", JSON, nullable=False),  # what is approved, as it was
    Column("proposer", String(256), nullable=False),  # has no vote
    Column("reason", Text, nullable=False, default=""),
    Column("needs", Integer, nullable=False),  # people besides the proposer
    Column("state", String(10), nullable=False, index=True),  # waiting | granted | void
    Column("at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("decided_at", Double),
    Column("result", Text, nullable=False, default=""),
)

votes = Table(
    "votes",
    metadata,
    Column("approval", ForeignKey("approvals.id"), primary_key=True),
    Column("actor", String(256), primary_key=True),
    Column("at", Double, nullable=False),
    Column("reason", Text, nullable=False, default=""),
)

deliveries = Table(  # how far each receiver of notifications has come in the audit
    "deliveries",
    metadata,
    Column("target", String(64), primary_key=True),
    Column("seq", Big, nullable=False),
    Column("failures", Integer, nullable=False, default=0),  # in a row
    Column("next_at", Double, nullable=False, default=0.0),
    Column("error", Text, nullable=False, default=""),
)

proven = Table(  # newest completed, unheld release per (fleet, component, hardware)
    "proven",
    metadata,
    Column("fleet", String(63), primary_key=True),
    Column("component", String(63), primary_key=True),
    Column("hardware", String(64), primary_key=True),
    Column("release", String(63), nullable=False),
    Column("digest", String(71), nullable=False),  # artifact digest
    Column("rollout", String(26)),
    Column("at", Double, nullable=False),
)
