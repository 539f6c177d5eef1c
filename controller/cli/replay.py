"""`bellwether replay`: judge recorded decisions again, or try another policy on the past."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controller.cli.errors import Failed
from controller.cli.options import SERVER, Database, Format, Output, Server, StateDir, Token

if TYPE_CHECKING:
    from controller.rollout.hindsight import Past, Seen
    from telemetry.policy import Policy

_MOST_BYTES = 256 * 1024 * 1024


def register(app: typer.Typer) -> None:
    app.command("replay")(replay)


def replay(
    what: Annotated[
        str, typer.Argument(help="Rollout (id or name), or a file of `evidence export`; `-`: stdin")
    ],
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="Try this HealthPolicy (YAML) on what was recorded."),
    ] = None,
    state_dir: StateDir = None,
    database: Database = None,
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Judge recorded decisions again: 0 when every verdict is the same, 1 when one differs.

    With --policy: what that policy would have decided, and when. With --state-dir every kept
    message is judged; over the API, or from a file, the recorded decisions are.
    """
    tried = None if policy is None else _policy(policy)
    if what == "-" or Path(what).is_file():
        data = _load(what)
        if tried is None:
            _judged_again(what, data, output)
        else:
            _tried(_past_of(what, data), tried, None, output)
        return
    if "/" in what:  # no rollout has such a name
        raise Failed(f"{what}: no such file")
    if state_dir is not None or database is not None:
        past, looks = recorded(what, state_dir, database, tried)
        _show(past, looks, tried, output)
        return
    from controller.cli.client import Api

    data = evidence(Api(server, token), what)
    if tried is None:
        _judged_again(what, data, output)
    else:
        _tried(_past_of(what, data), tried, None, output)


def recorded(
    rollout: str, state_dir: Path | None, database: str | None, policy: Policy | None
) -> tuple[Past, list[Seen]]:
    """The past of a rollout in a state directory, and every look at it by `policy`."""
    from controller.cli.direct import open_engine
    from controller.hindsight import messages, past
    from controller.rollout.hindsight import retry
    from controller.settings import Settings
    from controller.store import views
    from telemetry.store.database import open_engine as open_telemetry
    from telemetry.store.database import reading
    from telemetry.store.reports import Store

    directory = state_dir or Path("bellwether-state")
    with reading(open_engine(directory, database)) as conn:
        row = views.find_rollout(conn, rollout)
        if row is None:
            raise Failed(f"rollout {rollout}: unknown in {directory}")
        try:
            found = past(conn, row)
        except ValueError as error:
            raise Failed(f"rollout {rollout}: {error}") from None
    urls = Settings.model_construct(state_dir=directory, database=database)
    return found, retry(found, messages(Store(open_telemetry(urls.telemetry_url))), policy)


def evidence(api: Any, rollout: str) -> dict[str, Any]:
    """What `evidence export` writes: every decision whole, oldest first."""
    about = api.get(f"/rollouts/{rollout}")
    decisions = list(api.every(f"/rollouts/{about['id']}/evidence", limit=20))
    return {"v": 1, "rollout": about, "decisions": decisions[::-1]}


def _judged_again(what: str, data: object, output: Output) -> None:
    from controller.rollout.replay import Unreadable
    from controller.rollout.replay import replay as judged_again

    try:
        found = judged_again(data)
    except (ValueError, RecursionError, Unreadable) as error:
        print(f"error: {what}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if output is Output.JSON:
        rows = [
            {
                "id": one.id,
                "recorded": one.recorded,
                "verdict": str(one.judgement.verdict),
                "same": one.same,
                "sentence": one.judgement.sentence,
                "numbers": one.judgement.numbers,
            }
            for one in found
        ]
        print(json.dumps({"v": 1, "decisions": rows}, ensure_ascii=False, indent=2))
    else:
        for one in found:
            print(f"{one.id}  {one.sentence}")
        print(f"{len(found)} verdicts judged again, {sum(not o.same for o in found)} differ")
    if not all(one.same for one in found):
        raise typer.Exit(1)


def _tried(past: Past, policy: Policy, looks: Sequence[Seen] | None, output: Output) -> None:
    from controller.rollout.hindsight import again

    _show(past, again(past, policy) if looks is None else looks, policy, output)


def _show(past: Past, looks: Sequence[Seen], policy: Policy | None, output: Output) -> None:
    from controller.rollout.hindsight import compared, told

    name = policy.name if policy is not None else "the policy in force then"
    lines = told(past, looks)
    if output is Output.JSON:
        data = {
            "v": 1,
            "rollout": past.name,
            "release": past.release,
            "policy": name,
            "sentences": lines,
            "looks": [look.to_json(past.opened_at) for look in looks],
            "compare": [asdict(said) for said in compared(past, looks)],
        }
        print(json.dumps(data, ensure_ascii=False, indent=2))
        return
    print(f"{past.name} → {past.release} under {name}, {len(looks)} looks at what was recorded:")
    for line in lines or ["no verdict was recorded: there is nothing to judge"]:
        print(f"  {line}")


def past_of(data: dict[str, Any]) -> Past:
    """The past as exported evidence tells it: recorded cases, no messages."""
    from controller.rollout.hindsight import Past, cases

    decisions = data["decisions"]
    when = {row["id"]: _unix(row["at"]) for row in decisions}
    about = data.get("rollout") or {}
    return Past(
        name=str(about.get("name", "")),
        release=str(about.get("release", "")),
        opened_at=min(when.values(), default=0.0),
        finished_at=None,
        enrolled=(),
        recorded=tuple(cases(decisions, when)),
    )


def _past_of(what: str, data: object) -> Past:
    try:
        if not isinstance(data, dict) or not isinstance(data.get("decisions"), list):
            raise ValueError("write it with `bellwether evidence export`")
        return past_of(data)
    except (ValueError, KeyError, TypeError) as error:
        raise Failed(f"{what}: this is no export of decisions: {error}") from None


def _unix(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _policy(file: Path) -> Policy:
    """The one HealthPolicy of a YAML file; Failed with every problem of it."""
    from controller.manifests.reader import read

    try:
        reading = read({file.name: file.read_text(encoding="utf-8")})
    except (OSError, UnicodeDecodeError) as error:
        raise Failed(f"{file}: {error}") from None
    errors = [str(problem) for problem in reading.problems if problem.severity == "error"]
    if errors:
        raise Failed("\n".join(errors))
    found = list(reading.manifests.policies.values())
    if len(found) != 1:
        raise Failed(f"{file}: {len(found)} HealthPolicy documents, one is needed")
    return found[0].judged


def _load(what: str) -> object:
    try:
        return json.loads(_read(what))
    except (OSError, ValueError, RecursionError) as error:
        print(f"error: {what}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _read(what: str) -> str:
    if what == "-":
        return sys.stdin.read(_MOST_BYTES)
    file = Path(what)
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError("the file is larger than 256 MiB")
    return file.read_text(encoding="utf-8")
