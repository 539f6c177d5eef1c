"""`explain`: why, in a paragraph; what each look saw; what other methods would have done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controller.cli.options import SERVER, Database, Format, Output, Server, StateDir, Token

if TYPE_CHECKING:
    from controller.cli.client import Api
    from controller.rollout.hindsight import Past, Seen


def register(app: typer.Typer) -> None:
    app.command("explain")(explain)


def explain(
    what: Annotated[str, typer.Argument(help="Rollout (id or name) or decision id.")],
    compare: Annotated[
        bool, typer.Option("--compare", help="Beside it: what other methods would have done.")
    ] = False,
    state_dir: StateDir = None,
    database: Database = None,
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Say why, in a paragraph: of a rollout's newest verdict, or of one decision.

    --output json has the numbers: evidence, proofs, bands and counts of every decision; with
    --state-dir of every look at the messages that are kept.
    """
    from controller.cli.client import Api, NotFound

    if state_dir is not None or database is not None:
        _explain_recorded(what, state_dir, database, compare, output)
        return
    api = Api(server, token)
    try:
        found = api.get(f"/decisions/{what}")
    except NotFound:
        _explain_rollout(api, what, compare, output)
        return
    if compare and output is Output.JSON:
        found["compare"] = _said(_exported(api, found["rollout"]))
    _explain_decision(found, output)
    if compare:
        _compare(_exported(api, found["rollout"]), output)


def _explain_rollout(api: Api, what: str, compare: bool, output: Output) -> None:
    from controller.cli import show
    from controller.rollout.explaining import paragraph

    about = api.get(f"/rollouts/{what}")
    decisions = list(api.every(f"/rollouts/{about['id']}/decisions"))
    if output is Output.JSON:
        found = {"rollout": about, "decisions": decisions}
        if compare:
            found["compare"] = _said(_exported(api, about["id"]))
        show.as_json(found)
        return
    print(f"{about['name']} → {about['release']}: {about['state']}\n{about['sentence']}\n")
    newest = next((d for d in decisions if d["kind"] == "verdict" and d["numbers"]), None)
    if newest is not None:
        print(paragraph(api.get(f"/decisions/{newest['id']}"), about["release"]) + "\n")
    for entry in reversed(decisions):
        print(f"{entry['at']}  {entry['verdict']:<12} {entry['sentence']}  [{entry['id']}]")
    if compare:
        _compare(_exported(api, about["id"]), output)


def _explain_recorded(
    what: str, state_dir: Path | None, database: str | None, compare: bool, output: Output
) -> None:
    """From the state directory itself: every look at the messages that are kept."""
    from controller.cli import show
    from controller.cli.replay import recorded
    from controller.rollout.explaining import paragraph

    past, looks = recorded(what, state_dir, database, None)
    if output is Output.JSON:
        found: dict[str, Any] = {
            "rollout": past.name,
            "release": past.release,
            "looks": [look.to_json(past.opened_at) for look in looks],
        }
        if compare:
            found["compare"] = _said((past, looks))
        show.as_json(found)
        return
    if not looks:
        print(f"{past.name} → {past.release}: no verdict was recorded")
        return
    last = looks[-1]
    decision = {
        "verdict": str(last.judgement.verdict),
        "sentence": last.judgement.sentence,
        "numbers": last.judgement.numbers,
        "inputs": {"step": {"wave": last.case.step.wave, "name": last.case.step.name}},
    }
    print(f"{past.name} → {past.release}\n{paragraph(decision, past.release)}")
    if compare:
        _compare((past, looks), output)


def _exported(api: Api, rollout: str) -> tuple[Past, list[Seen]]:
    """The recorded decisions as looks: what can be compared without the messages."""
    from controller.cli.replay import evidence, past_of
    from controller.rollout.hindsight import again

    past = past_of(evidence(api, rollout))
    return past, again(past, past.recorded[-1].case.policy) if past.recorded else []


def _said(found: tuple[Past, list[Seen]]) -> list[dict[str, Any]]:
    """What each method would have done; ours first."""
    from dataclasses import asdict

    from controller.rollout.gate import Verdict
    from controller.rollout.hindsight import compared

    past, looks = found
    ours = next((look for look in looks if look.judgement.verdict is Verdict.ROLL_BACK), None)
    own = {
        "method": "bellwether",
        "stops": ours is not None,
        "at": ours.at if ours else None,
        "why": ours.judgement.sentence if ours else "lets it pass",
    }
    rows = [own, *(asdict(said) for said in compared(past, looks))]
    return [{**row, "hours": _hours(past, row["at"]), "looks": len(looks)} for row in rows]


def _hours(past: Past, at: float | None) -> float | None:
    return None if at is None else (at - past.opened_at) / 3600


def _compare(found: tuple[Past, list[Seen]], output: Output) -> None:
    from controller.cli import show

    if output is Output.JSON:
        return
    print(f"\nThe same data, by other methods ({len(found[1])} looks):")
    show.table(
        ("METHOD", "WOULD", "AFTER", "WHY"),
        [
            (
                row["method"],
                "stop" if row["stops"] else "pass",
                f"{row['hours']:.2f} h" if row["hours"] is not None else "",
                row["why"],
            )
            for row in _said(found)
        ],
    )


def _explain_decision(found: dict[str, Any], output: Output) -> None:
    import json

    from controller.cli import show
    from controller.rollout.explaining import paragraph

    if output is Output.JSON:
        show.as_json(found)
        return
    print(f"{found['at']}  {found['kind']}: {found['verdict']}\n{paragraph(found)}")
    print(f"commit {found['commit']} · watermark {found['watermark']} · term {found['term']}")
    print(json.dumps(found["numbers"], indent=2, ensure_ascii=False))
