"""The ingest on a real store: what it believes, what it refuses and why, what it acknowledges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from device_agent import protocol
from device_agent.protocol import Ack, Health, Presence, ProtocolError, Reported
from telemetry.decode import decode
from telemetry.ingest import PROBE_TOPIC, Ingest, Limits
from telemetry.store import tables
from telemetry.store.database import open_engine, reading
from telemetry.store.fold import Batch, Written
from telemetry.store.reports import Store, Unstorable
from telemetry.store.tables import create_schema

NOW = 1_800_000_000.0
DIGEST = "sha256:" + "a" * 64
HEALTH: dict[str, Any] = {
    "v": 1,
    "boot": "b1",
    "bootCount": 1,
    "seq": 1,
    "components": {"autopilot": DIGEST},
    "t0": NOW - 60,
    "dt": 10,
    "columns": {"cpu": [1.5, None, 3]},
    "counters": {"disengagement": 1},
    "exposure": {"device_hour": 0.5},
    "dropped": 0,
}
REPORTED: dict[str, Any] = {
    "v": 1,
    "boot": "b1",
    "bootCount": 1,
    "seq": 2,
    "state": "IDLE",
    "components": {"autopilot": {"release": "r", "digest": DIGEST, "committed": True}},
    "nonce": "n1",
}
REGISTRY = {"car-1": "active", "car-2": "active", "old": "retired", "odd": "quarantined"}


def wire(base: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**base, **changes}, separators=(",", ":")).encode()


def raw(old: str, new: str) -> bytes:
    text = wire(HEALTH).decode()
    assert old in text
    return text.replace(old, new).encode()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    engine = open_engine(f"sqlite:///{tmp_path / 'telemetry.db'}")
    create_schema(engine)
    yield Store(engine)
    engine.dispose()


@pytest.fixture
def ingest(store: Store) -> Ingest:
    return Ingest(store, lambda: REGISTRY)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "NaN": (raw("1.5", "NaN"), "not_finite"),
    "Infinity": (raw("1.5", "Infinity"), "not_finite"),
    "-Infinity": (raw("1.5", "-Infinity"), "not_finite"),
    "1e999": (raw("1.5", "1e999"), "not_finite"),
    "a huge integer for a number": (raw("1.5", "1" + "0" * 400), "not_finite"),
    "a number whose square overflows": (raw("1.5", "1e200"), "out_of_range"),
    '"inf"': (raw("1.5", '"inf"'), "malformed"),
    '"1" for 1': (wire(HEALTH, seq="1"), "malformed"),
    "true for 1": (wire(HEALTH, seq=True), "malformed"),
    "1.0 for 1": (wire(HEALTH, seq=1.0), "malformed"),
    "below zero": (wire(HEALTH, seq=-1), "malformed"),
    "beyond 2^53": (wire(HEALTH, seq=2**53), "malformed"),
    "a negative exposure": (wire(HEALTH, exposure={"km": -1}), "malformed"),
    "a huge exposure": (wire(HEALTH, exposure={"km": 1e300}), "out_of_range"),
    "oversize": (wire(HEALTH, note="x" * 70_000), "oversize"),
    "deep nesting": (wire(HEALTH)[:-1] + b',"x":' + b"[" * 9 + b"]" * 9 + b"}", "too_deep"),
    "very deep nesting": (b"[" * 30_000 + b"]" * 30_000, "too_deep"),
    "not UTF-8": (wire(HEALTH)[:-1] + b',"x":"\xff"}', "not_utf8"),
    "a duplicate key": (wire(HEALTH)[:-1] + b',"seq":2}', "malformed"),
    "a duplicate key with a blank": (wire(HEALTH)[:-1] + b',"seq" :2}', "malformed"),
    "a duplicate key inside": (raw('"cpu":', '"cpu":[1.0,2.0,3.0],"cpu":'), "malformed"),
    "an escaped duplicate key": (wire(HEALTH)[:-1] + b',"s\\u0065q":2}', "malformed"),
    "an array": (b"[]", "malformed"),
    "empty": (b"", "not_json"),
    "half": (wire(HEALTH)[:50], "not_json"),
    "trailing": (wire(HEALTH) + b"{}", "not_json"),
    "a metric's name": (wire(HEALTH, counters={"a b": 1}), "bad_metric"),
    "a component's name": (wire(HEALTH, components={"../x": DIGEST}), "bad_id"),
    "a component twice": (
        raw('{"autopilot":', f'{{"autopilot":"{DIGEST}","autopilot":'),
        "malformed",
    ),
    "no digest": (wire(HEALTH, components={"autopilot": "sha256:a"}), "malformed"),
    "components in an array": (wire(HEALTH, components=[DIGEST]), "malformed"),
    "a component's value": (wire(HEALTH, components={"autopilot": {"a": "b:c"}}), "malformed"),
    "33 components": (wire(HEALTH, components={f"c{n}": DIGEST for n in range(33)}), "malformed"),
    "a colon moved": (raw('"dropped":0', '"dropped": 0 ,"dropped":0'), "malformed"),
    "5,000 properties": (wire(HEALTH, counters={f"c{n}": 1 for n in range(3000)}), "malformed"),
    "61 samples": (wire(HEALTH, columns={"cpu": [1.0] * 61}), "malformed"),
    "ragged columns": (wire(HEALTH, columns={"a": [1.0], "b": [1.0, 2.0]}), "malformed"),
    "dt of 0": (wire(HEALTH, dt=0), "malformed"),
    "a control character in the boot": (wire(HEALTH, boot="a\0b"), "malformed"),
    "a missing field": (wire({k: v for k, v in HEALTH.items() if k != "boot"}), "malformed"),
    "null": (wire(HEALTH, counters=None), "malformed"),
    "another version": (wire(HEALTH, v=2), "unknown_version"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_health_is_refused_with_its_reason(case: str, ingest: Ingest, store: Store) -> None:
    payload, reason = HOSTILE[case]
    good = wire(HEALTH, seq=7)
    result = ingest.batch([("bw/v1/car-1/health", payload), ("bw/v1/car-2/health", good)], NOW)
    assert result.refusals == {reason: 1}
    assert [(row.device, row.seq) for row in store.health_since(0)] == [("car-2", 7)]
    assert [topic for topic, _ in result.acks] == ["bw/v1/car-2/ack"]
    assert store.refusals() == {reason: 1}


@pytest.mark.parametrize("channel", ["reported", "presence", "health"])
@pytest.mark.parametrize("case", [*HOSTILE, "a good message of another kind"])
def test_nothing_raises_on_any_channel(case: str, channel: str, ingest: Ingest) -> None:
    payload = HOSTILE[case][0] if case in HOSTILE else b'{"v":1,"ranges":[]}'
    result = ingest.batch([(f"bw/v1/car-1/{channel}", payload)], NOW)
    assert sum(result.refusals.values()) == 1 or channel != "health"


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("bw/v1/car-1/desired", "wrong_channel"),
        ("bw/v1/car-1/ack", "wrong_channel"),
        ("bw/v1/car-1/health/x", "bad_topic"),
        ("bw/v1//health", "bad_topic"),
        ("bw/v1/CAR/health", "bad_topic"),
        ("bw/v1/a+b/health", "bad_topic"),
        ("bw/v2/car-1/health", "bad_topic"),
        ("bw/v1/car-1\n/health", "bad_topic"),
        ("$SYS/broker/uptime", "bad_topic"),
        ("bw/v1/nobody/health", "unknown_device"),
        ("bw/v1/old/health", "retired_device"),
        ("bw/v1/odd/health", "quarantined_device"),
    ],
)
def test_topics_are_held_against_the_registry(topic: str, reason: str, ingest: Ingest) -> None:
    result = ingest.batch([(topic, wire(HEALTH))], NOW)
    assert (result.rows, result.refusals, result.acks) == (0, {reason: 1}, [])


def test_a_device_that_enrolled_a_moment_ago_is_heard(store: Store) -> None:
    asked: list[str] = []

    def again() -> dict[str, str]:
        asked.append("again")
        return {**REGISTRY, "new": "active"}

    ingest = Ingest(store, lambda: REGISTRY, again=again)
    assert ingest.batch([("bw/v1/car-1/health", wire(HEALTH))], NOW).rows == 1
    assert asked == []
    assert ingest.batch([("bw/v1/new/health", wire(HEALTH))], NOW).rows == 1
    assert asked == ["again"]


@pytest.mark.parametrize("many", [1, 32])
@pytest.mark.parametrize("indent", [None, 40])
def test_components_are_stored_as_they_were_meant_however_they_were_written(
    many: int, indent: int | None, ingest: Ingest, store: Store
) -> None:
    components = {f"part-{n}": DIGEST for n in range(many)}
    for seq in (1, 2):  # looked up the second time, if it is not too long to be remembered
        body = json.dumps({**HEALTH, "seq": seq, "components": components}, indent=indent)
        assert ingest.batch([("bw/v1/car-1/health", body.encode())], NOW).rows == 1
    assert [row.components for row in store.health_since(0)] == [components] * 2
    with reading(store.engine) as connection:
        said = set(connection.execute(select(tables.health.c.components)).scalars())
    assert said == {json.dumps(components, separators=(",", ":"))}


def test_unknown_fields_are_accepted(ingest: Ingest) -> None:
    payload = wire(HEALTH, fancy={"deep": [1, {"er": ':":"'}]})
    assert ingest.batch([("bw/v1/car-1/health", payload)], NOW).rows == 1


def test_an_ack_names_what_was_committed_and_echoes_the_nonce(ingest: Ingest) -> None:
    messages = [("bw/v1/car-1/health", wire(HEALTH, seq=n)) for n in (1, 3, 4)]
    messages.append(("bw/v1/car-1/reported", wire(REPORTED, seq=5)))
    ((topic, payload),) = ingest.batch(messages, NOW).acks
    assert topic == "bw/v1/car-1/ack"
    ack = protocol.decode(Ack, payload)
    assert (ack.boot, ack.ranges, ack.nonce) == ("b1", ((1, 1), (3, 5)), "n1")


def test_a_repeat_is_acknowledged_again_and_not_counted_again(ingest: Ingest) -> None:
    message = ("bw/v1/car-1/health", wire(HEALTH))
    ingest.batch([message], NOW)
    again = ingest.batch([message, message], NOW + 2)
    assert (again.rows, again.refusals) == (0, {"duplicate": 2})
    assert protocol.decode(Ack, again.acks[0][1]).ranges == ((1, 1),)


def test_a_device_gets_one_ack_per_second_and_loses_none(ingest: Ingest) -> None:
    first = ingest.batch([("bw/v1/car-1/health", wire(HEALTH, seq=1))], NOW)
    second = ingest.batch([("bw/v1/car-1/health", wire(HEALTH, seq=2))], NOW + 0.3)
    third = ingest.batch([("bw/v1/car-1/reported", wire(REPORTED, seq=3))], NOW + 0.6)
    assert (len(first.acks), second.acks, third.acks) == (1, [], [])
    assert ingest.due(NOW + 0.9) == []
    ((_, payload),) = ingest.due(NOW + 1.0)
    ack = protocol.decode(Ack, payload)
    assert (ack.ranges, ack.nonce) == (((2, 3),), "n1")
    assert not ingest.owes()


def test_a_clock_set_back_does_not_withhold_acks(ingest: Ingest) -> None:
    ingest.batch([("bw/v1/car-1/health", wire(HEALTH, seq=1))], NOW)
    later = ingest.batch([("bw/v1/car-1/health", wire(HEALTH, seq=2))], NOW - 5000)
    assert len(later.acks) == 1


def test_boots_share_no_ack(ingest: Ingest) -> None:
    messages = [
        ("bw/v1/car-1/health", wire(HEALTH, seq=9)),
        ("bw/v1/car-1/health", wire(HEALTH, boot="b2", bootCount=2, seq=1)),
    ]
    ((_, payload),) = ingest.batch(messages, NOW).acks
    assert protocol.decode(Ack, payload).boot == "b1"
    ((_, payload),) = ingest.due(NOW + 1)
    assert protocol.decode(Ack, payload).boot == "b2"


def test_a_flood_is_refused_and_disturbs_nobody_else(store: Store) -> None:
    ingest = Ingest(store, lambda: REGISTRY, Limits(per_second=2, burst=5))
    flood = [("bw/v1/car-1/health", wire(HEALTH, seq=n)) for n in range(20)]
    result = ingest.batch([*flood, ("bw/v1/car-2/health", wire(HEALTH))], NOW)
    assert (result.rows, result.refusals) == (6, {"rate_limited": 15})
    assert ingest.batch(flood[5:], NOW + 1).rows == 2


def test_nothing_is_acknowledged_before_the_commit() -> None:
    class Absent:
        def write(self, batch: Batch, now: float) -> Written:
            raise ConnectionError

    ingest = Ingest(Absent(), lambda: REGISTRY)
    with pytest.raises(ConnectionError):
        ingest.batch([("bw/v1/car-1/health", wire(HEALTH))], NOW)
    assert not ingest.owes()


def test_one_unstorable_message_is_refused_alone(store: Store) -> None:
    class Picky:
        """The real store, which cannot take number 13 for a reason that we did not foresee."""

        def write(self, batch: Batch, now: float) -> Written:
            if any(getattr(m, "seq", 0) == 13 for h in batch.heard for m in h.messages):
                raise Unstorable("13")
            return store.write(batch, now)

    ingest = Ingest(Picky(), lambda: REGISTRY)
    messages = [("bw/v1/car-1/health", wire(HEALTH, seq=n)) for n in range(1, 21)]
    result = ingest.batch([*messages, ("x", b"")], NOW)
    assert (result.rows, result.refusals) == (19, {"unstorable": 1, "bad_topic": 1})
    assert store.refusals() == {"unstorable": 1, "bad_topic": 1}
    assert protocol.decode(Ack, result.acks[0][1]).ranges == ((1, 12), (14, 20))


def test_text_that_no_database_holds_is_cleaned_not_refused(ingest: Ingest, store: Store) -> None:
    payload = wire(REPORTED)[:-1] + b',"log":"a\\u0000b\\ud800"}'
    assert ingest.batch([("bw/v1/car-1/reported", payload)], NOW).rows == 1
    row = store.device("car-1")
    assert row is not None
    assert row.log == "a\ufffdb?"


def test_the_probe_advances_hearing_and_is_no_device(ingest: Ingest, store: Store) -> None:
    ingest.batch([(PROBE_TOPIC, b"1")], NOW)
    result = ingest.batch([(PROBE_TOPIC, b"2")], NOW + 1)
    assert (store.hearing()[0], result.rows, result.refusals) == (1.0, 0, {})


def outcome(how: Any, cls: type[Any], payload: bytes) -> Any:
    try:
        return how(cls, payload)
    except ProtocolError as error:
        return error.reason


@pytest.mark.parametrize("cls", [Health, Reported, Presence])
@pytest.mark.parametrize("case", HOSTILE)
def test_both_decoders_give_the_same_verdict(case: str, cls: type[Any]) -> None:
    payload, reason = HOSTILE[case]
    if reason != "out_of_range":  # the ingest's own, stricter rule
        assert outcome(decode, cls, payload) == outcome(protocol.decode, cls, payload)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(width=16) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@given(field=st.sampled_from(sorted({*HEALTH, *REPORTED, "unknown"})), value=_JSON)
def test_any_value_in_any_field_is_decided_alike(field: str, value: Any) -> None:
    for base, cls in ((HEALTH, Health), (REPORTED, Reported)):
        for separators in ((",", ":"), (", ", ": "), (" , ", " : ")):
            payload = json.dumps({**base, field: value}, separators=separators).encode()
            mine, theirs = outcome(decode, cls, payload), outcome(protocol.decode, cls, payload)
            assert mine == theirs
