"""What the word of a stop means, on both databases: fleets, products, hardware, digests."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, insert

from controller import commands
from controller.store import stops
from controller.store.database import open_control
from controller.store.tables import devices, releases, rollouts
from telemetry.store.database import reading, writing

NOW = 1_800_000_000.0
RELEASE, ARTIFACT = "sha256:" + "a" * 64, "sha256:" + "b" * 64


@pytest.fixture
def engine(database_url: str) -> Any:
    made = open_control(database_url)
    with writing(made) as conn:
        for n, (fleet, labels) in enumerate(
            [("eu", {"hardware": "hw3"}), ("us", {"hardware": "hw4", "product": "tram"})]
        ):
            conn.execute(
                insert(devices).values(
                    id=f"car-{n}", fleet=fleet, labels=labels, status="active", created_at=NOW,
                    change=n + 1,
                )
            )  # fmt: skip
        conn.execute(
            insert(releases).values(
                name="fsd-2", digest=RELEASE, commit="c" * 40, seen_at=NOW,
                document={"artifacts": [{"component": "autopilot", "digest": ARTIFACT}]},
            )
        )  # fmt: skip
        for n, label in enumerate(("old", "pilot")):
            conn.execute(
                insert(rollouts).values(
                    id=f"{n}" * 26, name="cars", fleet="eu", release="fsd-2", digest=RELEASE,
                    artifacts={"autopilot": ARTIFACT}, commit="c" * 40, author="ann",
                    state="Soaking", sentence="so", revision=1, step=0, opened_at=NOW, step_at=NOW,
                    soak=0.0, updated_at=NOW, seed="s", flags={},
                    pinned={"fleet": {"labels": {"product": label}}},
                )
            )  # fmt: skip
    yield made
    made.dispose()


def stop(engine: Engine, scope: str, value: str) -> commands.Recorded:
    return commands.record(
        engine, kind="stop", rollout=None, body={"scope": scope, "value": value}, actor="ann",
        reason="smoke", incident=None, if_revision=None, now=NOW,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scope", "value", "known"),
    [
        ("product", "pilot", {"eu"}), ("product", "eu", {"eu"}), ("product", "tram", {"us"}),
        ("product", "old", set()), ("hardware", "hw3", {"eu"}), ("hardware", "hw9", set()),
        ("digest", RELEASE, {"eu"}), ("digest", ARTIFACT, {"eu"}), ("digest", "fsd-2", set()),
    ],
)  # fmt: skip
def test_a_stop_says_when_nothing_that_we_know_is_in_it(
    engine: Engine, scope: str, value: str, known: set[str]
) -> None:
    """A slip of the pen at 3 a.m. is recorded, and said: it stops nothing."""
    plan = commands.preview_stop(engine, {"scope": scope, "value": value})
    # Active rollouts of the fleets in scope: `us` has none.
    assert {one["fleet"] for one in plan["rollouts"]} == known & {"eu"}
    said = stop(engine, scope, value).sentence
    assert ("NOTHING" in said) == (not known), said


def test_a_stop_in_force_knows_whom_its_words_mean(engine: Engine) -> None:
    stop(engine, "product", "pilot")
    stop(engine, "digest", RELEASE)
    with reading(engine) as conn:
        found = {one.scope: one for one in stops.load(conn)}
    assert found["product"].fleets == {"eu"}
    assert found["digest"].artifacts == {ARTIFACT}
