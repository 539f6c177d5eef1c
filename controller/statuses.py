"""Keeps the commits' statuses at what the rollouts are: one context a rollout, its sentence.

Level-triggered: what each rollout is now is compared with what was told last (`meta["statuses"]`);
a forge that was away is told when it is back. Runs beside the Git watcher, on no decision's path.
"""

from __future__ import annotations

from typing import Any

import structlog
from sqlalchemy import Engine, select

from controller.forge import Forge, ForgeUnavailable
from controller.rollout.model import RolloutState
from controller.store import rollouts as store
from controller.store.tables import rollouts
from telemetry.store.database import reading, writing

log = structlog.get_logger()

MOST_AT_ONCE = 20  # statuses a round: a forge has rate limits
_STATE = {
    RolloutState.COMPLETED: "success",
    RolloutState.SUPERSEDED: "success",
    RolloutState.ROLLING_BACK: "failure",
    RolloutState.ROLLED_BACK: "failure",
    RolloutState.HELD: "failure",
    RolloutState.INCONCLUSIVE: "error",
    RolloutState.NO_MEMBERS: "error",
}


class Statuses:
    def __init__(self, engine: Engine, forge: Forge, public_url: str) -> None:
        self._engine, self._forge, self._public_url = engine, forge, public_url

    def run_once(self) -> int:
        """Tell what changed; answers how many statuses were told."""
        wanted, told = self._wanted()
        changed = [key for key in wanted if wanted[key] != told.get(key)]
        done = 0
        for key in changed[:MOST_AT_ONCE]:
            state, description = wanted[key]
            commit, _, name = key.partition(" ")
            try:
                self._forge.status(
                    commit,
                    context=f"bellwether/{name}",
                    state=state,
                    description=description,
                    url=f"{self._public_url}/rollouts/{name}",
                )
            except ForgeUnavailable as error:
                log.warning("status_not_told", commit=commit, rollout=name, reason=str(error))
                break
            told[key] = [state, description]
            done += 1
        if done:
            kept = {key: told[key] for key in told if key in wanted}
            with writing(self._engine) as conn:
                store.put_meta(conn, "statuses", kept)
        return done

    def _wanted(self) -> tuple[dict[str, list[str]], dict[str, Any]]:
        """`commit name` → [state, sentence] of the newest rollouts, oldest first."""
        with reading(self._engine) as conn:
            told = dict(store.get_meta(conn, "statuses", {}))
            rows = conn.execute(
                select(rollouts.c.name, rollouts.c.commit, rollouts.c.state, rollouts.c.sentence)
                .order_by(rollouts.c.opened_at.desc(), rollouts.c.id.desc())
                .limit(200)
            ).all()
        wanted: dict[str, list[str]] = {}
        for row in reversed(rows):
            state = _STATE.get(RolloutState(row.state), "pending")
            # Sentences of a running rollout move with every report: its state is told, once.
            said = row.sentence if state != "pending" else f"{row.state}: {_first(row.sentence)}"
            wanted[f"{row.commit} {row.name}"] = [state, said[:500]]
        return wanted, told


def _first(sentence: str) -> str:
    """The part of a sentence that does not move with every report."""
    return sentence.partition(" — ")[0].capitalize()
