"""The audit finds what was done to it, an evidence file each flipped byte; no service is needed."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import delete, insert, select, text, update
from typer.testing import CliRunner

from controller import anchors, audit, dossier
from controller.cli import app
from controller.keys import DirectorKey
from controller.rollout.gate import Case, Outcome, StepLimits, judge
from controller.store.database import open_control
from controller.store.tables import audit as table
from controller.store.tables import decisions, holds
from telemetry.policy import Gate, GateType, Policy
from telemetry.store.database import reading, writing

if TYPE_CHECKING:
    from conftest import House

NOW = 1_800_000_000.0
ROWS = 12


@pytest.fixture
def state(tmp_path: Path) -> Path:
    engine = open_control(f"sqlite:///{tmp_path}/control.db")
    for i in range(ROWS):
        with writing(engine) as conn:
            audit.append(
                conn, at=NOW + i, actor="ann", action="hold", subject=f"r{i}",
                detail={"reason": f"because {i}", "score": 1.5 * i},
            )  # fmt: skip
            head = audit.head(conn)
        assert head is not None
        anchors.keep(tmp_path, head, None)
    engine.dispose()
    return tmp_path


def verify(*args: str) -> Any:
    return CliRunner().invoke(app, ["evidence", "verify", *args])


def problems(done: Any) -> str:
    return f"{done.output} {done.exception or ''}"


def changed(state: Path, *statements: Any) -> None:
    engine = open_control(f"sqlite:///{state}/control.db")
    with writing(engine) as conn:
        for statement in statements:
            conn.execute(statement)
    engine.dispose()


def test_a_whole_chain_is_whole(state: Path) -> None:
    done = verify("--state-dir", str(state))
    assert done.exit_code == 0, problems(done)
    assert f"{ROWS} rows" in done.output
    assert f"{ROWS} beside it" in done.output


def test_both_databases_are_verified(database_url: str) -> None:
    engine = open_control(database_url)
    with writing(engine) as conn:
        for reason in ("é – \u202e", "x" * 2000, '"quoted" \\ back'):
            audit.append(
                conn, at=NOW + 0.1, actor="ann", action="hold", subject="r",
                detail={"reason": reason, "score": 0.1 + 0.2, "n": 1e22, "none": None},
            )  # fmt: skip
        assert audit.verify(conn) == []
        conn.execute(update(table).where(table.c.seq == 2).values(detail={"reason": "?"}))
        assert audit.verify(conn) == ["row 2 was changed"]
    engine.dispose()


COLUMNS = {"at": 1.0, "actor": "eve", "action": "lift", "subject": "x", "detail": {"reason": "?"},
           "previous": "0" * 64, "hash": "f" * 64}  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", [1, 6, ROWS])
def test_an_edited_row_is_found(state: Path, column: str, row: int) -> None:
    changed(state, update(table).where(table.c.seq == row).values({column: COLUMNS[column]}))
    if column == "previous" and row == 1:
        return  # it is what it was
    done = verify("--state-dir", str(state))
    assert done.exit_code != 0, (column, row)


@pytest.mark.parametrize(
    "detail", ["xyz", "null", '{"reason": NaN}', '{"score": 1e999}', "[" * 5000, '{"reason": "', ""]
)
def test_a_row_whose_detail_was_made_unreadable_is_named(state: Path, detail: str) -> None:
    """It was found by a traceback, which names no row and hides the others."""
    said = text("UPDATE audit SET detail = :detail WHERE seq IN (4, 7)")
    changed(state, said.bindparams(detail=detail))
    found = problems(verify("--state-dir", str(state)))
    assert "the audit is broken: row 4 was changed; row 7 was changed" in found


def test_an_edited_row_with_its_hash_made_right_is_found_by_the_next(state: Path) -> None:
    engine = open_control(f"sqlite:///{state}/control.db")
    with reading(engine) as conn:
        row = dict(conn.execute(select(table).where(table.c.seq == 5)).one()._mapping)
    row["actor"] = "eve"
    changed(
        state,
        update(table).where(table.c.seq == 5).values(actor="eve", hash=audit.digest(row)),
    )
    assert "row 6 does not follow" in problems(verify("--state-dir", str(state)))


def test_a_chain_that_was_forged_from_a_row_on_is_found_by_the_kept_heads(state: Path) -> None:
    """Whoever can write the database can make a whole chain: only a head kept elsewhere tells."""
    engine = open_control(f"sqlite:///{state}/control.db")
    with writing(engine) as conn:
        rows = [dict(r._mapping) for r in conn.execute(select(table).order_by(table.c.seq))]
        conn.execute(delete(table).where(table.c.seq >= 5))
        for row in rows[4:]:
            audit.append(
                conn, at=row["at"], actor="eve", action=row["action"], subject=row["subject"],
                detail=row["detail"],
            )  # fmt: skip
        assert audit.verify(conn) == []
    engine.dispose()
    assert "is not in the chain" in problems(verify("--state-dir", str(state)))


@pytest.mark.parametrize("row", [1, 6])
def test_a_deleted_row_is_found(state: Path, row: int) -> None:
    changed(state, delete(table).where(table.c.seq == row))
    assert verify("--state-dir", str(state)).exit_code != 0


def test_two_rows_in_each_others_place_are_found(state: Path) -> None:
    changed(
        state,
        update(table).where(table.c.seq == 4).values(seq=99),
        update(table).where(table.c.seq == 5).values(seq=4),
        update(table).where(table.c.seq == 99).values(seq=5),
    )
    assert verify("--state-dir", str(state)).exit_code != 0


@pytest.mark.parametrize("cut", [1, 5, ROWS])
def test_a_cut_tail_is_found_by_a_head_kept_outside(state: Path, cut: int) -> None:
    changed(state, delete(table).where(table.c.seq > ROWS - cut))
    done = verify("--state-dir", str(state))
    assert f"rows {ROWS - cut + 1} to {ROWS} were there once" in problems(done)


def test_a_cut_tail_is_found_by_git_or_by_hand_when_the_file_was_cut_too(state: Path) -> None:
    engine = open_control(f"sqlite:///{state}/control.db")
    with reading(engine) as conn:
        head = audit.head(conn)
    assert head is not None
    clone = state / "git"
    for command in (
        ["init", "-q", "-b", "main", str(clone)],
        ["-C", str(clone), "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q",
         "--allow-empty", "-m", f"Hold\n\nwhy\n\nHold: 01X\nAudit-Head: {anchors.words(head)}"],
    ):  # fmt: skip
        subprocess.run(["git", *command], check=True)
    (state / anchors.FILE).unlink()
    assert verify("--state-dir", str(state)).exit_code == 0
    changed(state, delete(table).where(table.c.seq > 3))
    assert "the tail was cut" in problems(verify("--state-dir", str(state)))
    moved = clone.rename(state / "elsewhere")
    assert verify("--state-dir", str(state)).exit_code == 0  # nothing is left that remembers
    assert "the tail" in problems(verify("--state-dir", str(state), "--repo", str(moved)))
    kept = f"{head[0]}:{head[1]}"
    assert "the tail" in problems(verify("--state-dir", str(state), "--head", kept))
    assert verify("--state-dir", str(state), "--head", "x").exit_code != 0


# -- the file of one rollout ----------------------------------------------------------------------


@pytest.fixture
def evidence(house: House, tmp_path: Path) -> bytes:
    """A rollout with one real verdict, its hold, and what people did."""
    rollout = house.add_rollout()
    policy = Policy(name="plain", gates=(Gate(metric="update_ok", type=GateType.PROPORTION),))
    step = StepLimits(name="canary", min_soak=60, max_soak=600, soaked=60, reporting=60, updated=60)
    case = Case(
        policy=policy,
        step=step,
        outcomes=(Outcome(wave=0, hardware="hw3", started=60, committed=60),),
    )
    said = judge(case)
    with writing(house.deps.engine) as conn:
        conn.execute(
            insert(decisions).values(
                id="01D", rollout=rollout, at=NOW, kind="verdict", verdict=str(said.verdict),
                sentence=said.sentence, inputs=case.to_json(), numbers=dict(said.numbers),
                watermark=1, commit="c" * 40, policy={"name": "plain"}, term=1,
            )
        )  # fmt: skip
    house.client.post(
        "/api/v1/rollouts/cars:rollback",
        json={"reason": "it brakes – \u202e“hard”", "incident": "INC-1"},
        headers={"If-Match": "*"},
    )
    answer = house.client.get("/api/v1/rollouts/cars/evidence:file")
    assert answer.status_code == 200, answer.text
    return answer.content


def test_the_file_is_whole_offline_and_tells_the_story(evidence: bytes, tmp_path: Path) -> None:
    file = tmp_path / "evidence.json"
    file.write_bytes(evidence)
    done = verify(str(file))
    assert done.exit_code == 0, problems(done)
    plain = json.loads(evidence)
    assert [d["verdict"] for d in plain["decisions"]] == ["widen"]
    assert [r["action"] for r in plain["audit"]][-1] == "rollback"
    assert plain["rollout"]["holds"][0]["incident"] == "INC-1"
    replayed = CliRunner().invoke(app, ["replay", str(file)])
    assert replayed.exit_code == 0
    assert "1 verdicts judged again, 0 differ" in replayed.output


def test_each_flipped_byte_is_found(evidence: bytes) -> None:
    chance = random.Random(1)
    places = {0, 1, len(evidence) - 1, len(evidence) - 2, *range(0, len(evidence), 97)}
    places |= set(range(len(evidence) - 180, len(evidence)))  # the signature itself
    for place in sorted(places):
        for flip in (1, 0x20, chance.randint(1, 255)):
            spoilt = bytearray(evidence)
            spoilt[place] ^= flip
            assert dossier.check(bytes(spoilt)), (place, flip)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.replace(b"\n", b"\n ", 1),
        lambda d: d[:-1],
        lambda d: d + b" ",
        lambda d: b"\xef\xbb\xbf" + d,
        lambda d: d.replace(b'"v": 1', b'"v": 1, "v": 1', 1),
        lambda d: json.dumps(json.loads(d)).encode(),
        lambda d: b"[" * 100_000,
        lambda d: b"",
        lambda d: b"null",
        lambda d: b'{"format": "bellwether.evidence/1"}',
    ],
)
def test_what_is_not_as_it_was_written_is_found(evidence: bytes, spoil: Any) -> None:
    assert dossier.check(spoil(evidence))


def test_a_forger_with_a_key_of_his_own_is_found_by_the_key_that_you_know(
    evidence: bytes, house: House, tmp_path: Path
) -> None:
    forger = DirectorKey.load_or_create(tmp_path / "forger.pem")
    plain = json.loads(evidence)
    plain["rollout"]["author"] = "somebody else"
    plain["key"] = {"keyid": forger.keyid, "public": forger.public_hex}
    del plain["signature"]
    signature = forger.sign_bytes(dossier._canonical(plain)).hex()
    forged = dossier._canonical({**plain, "signature": signature})
    assert dossier.check(forged) == []
    assert "another key" in dossier.check(forged, public=house.deps.key.public_hex)[0]
    assert dossier.check(evidence, public=house.deps.key.public_hex) == []


def test_a_signer_who_changed_a_verdict_or_a_row_is_found(evidence: bytes, house: House) -> None:
    key = house.deps.key
    for spoil, says in (
        (lambda p: p["decisions"][0].update(verdict="roll_back"), "DIFFERENT"),
        (lambda p: p["audit"][0].update(actor="eve"), "was changed"),
        (lambda p: p["audit"].pop(0) if len(p["audit"]) > 2 else p["audit"].reverse(), "follow"),
    ):
        plain = json.loads(evidence)
        del plain["signature"]
        spoil(plain)
        if says == "follow":
            plain["audit"].insert(0, plain["audit"][-1])
        signed = {**plain, "signature": key.sign_bytes(dossier._canonical(plain)).hex()}
        found = dossier.check(dossier._canonical(signed))
        assert any(says in problem for problem in found), (says, found)


def test_only_who_may_read_the_audit_gets_the_file(house: House, evidence: bytes) -> None:
    client = house.with_settings(auth="required")
    url = "/api/v1/rollouts/cars/evidence:file"
    assert client.get(url, headers=house.token("viewer")).status_code == 403
    assert client.get(url, headers=house.token("auditor")).status_code == 200
    assert client.get(url, headers=house.token("auditor", ("eu",))).status_code == 403
    with reading(house.deps.engine) as conn:
        assert conn.execute(select(holds)).first() is not None
