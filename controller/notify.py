"""Tells receivers what was recorded: webhooks as CloudEvents, chat and pagers by apprise.

The audit is the outbox: its rows are written in the transaction of the decision or the command
itself, numbered without a gap, and never change. Each receiver follows it by its own number, kept
in the database. Rules:

1. At least once, in order: the number goes on only after the receiver took the event. Its id stays
   the same, so that a second one can be dropped.
2. A receiver that is down, slow or answers 5xx is asked again with back-off (at most five minutes)
   for as long as it takes; the others do not wait for it.
3. One that refuses an event itself (4xx) ten times misses that event: it is logged and counted.
4. A receiver that is new begins with what is recorded from then on.
"""

from __future__ import annotations

import fnmatch
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Engine, insert, select, update

from controller import audit, cloudevents
from controller.store import views
from controller.store.tables import deliveries
from telemetry import metrics
from telemetry.store.database import reading, writing

PATIENCE = 10.0  # seconds that a receiver may take
LONGEST = 300.0  # seconds between two tries
MOST_REFUSALS = 10
_BATCH = 100
_LOOK = 1.0
# What a person wants to be woken or told for, when a target names nothing else.
USUAL = (
    "state:*", "verdict:roll_back", "open:*", "rollback", "hold", "lift", "pause", "stop",
    "promote", "break-glass", "approval.*", "token.*", "device.quarantine",
)  # fmt: skip
log = structlog.get_logger()


class BadTargets(ValueError):
    """The file cannot be used; the message names the place and says what to write."""


class Refused(Exception):
    """The receiver does not want this event: sending it again as it is will not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    name: str
    url: str
    kind: str = "webhook"  # webhook | apprise
    binary: bool = False
    secret_file: Path | None = None
    events: tuple[str, ...] = USUAL

    def wants(self, action: str) -> bool:
        return any(fnmatch.fnmatchcase(action, pattern) for pattern in self.events)


def load(file: Path) -> tuple[Target, ...]:
    """Raises BadTargets."""
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise BadTargets(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadTargets(f"{file}: {error}") from None
    plain = table.get("target")
    if set(table) != {"target"} or not isinstance(plain, list):
        raise BadTargets(f"{file}: write [[target]] tables with name and url")
    found = tuple(_target(file, i, one) for i, one in enumerate(plain, 1))
    names = [target.name for target in found]
    if len(set(names)) != len(names):
        raise BadTargets(f"{file}: two targets have one name")
    return found


def _target(file: Path, number: int, plain: Any) -> Target:
    where = f"{file}: target {number}"
    known = {"name", "url", "kind", "mode", "secret_file", "events"}
    if not isinstance(plain, Mapping) or set(plain) - known:
        raise BadTargets(f"{where}: known: {', '.join(sorted(known))}")
    name, url = plain.get("name"), plain.get("url")
    if not (isinstance(name, str) and 0 < len(name) <= 63 and name.isprintable()):
        raise BadTargets(f"{where}: name: 1 to 63 printable characters")
    kind, mode = plain.get("kind", "webhook"), plain.get("mode", "structured")
    if kind not in ("webhook", "apprise") or mode not in ("structured", "binary"):
        raise BadTargets(f"{where}: kind is webhook or apprise, mode is structured or binary")
    if not isinstance(url, str) or "://" not in url:
        raise BadTargets(f"{where}: url: write https://… (webhook), or an apprise URL")
    if kind == "webhook" and not url.startswith(("https://", "http://")):
        raise BadTargets(f'{where}: url: a webhook is https://…; kind = "apprise" for others')
    events = plain.get("events", list(USUAL))
    if not isinstance(events, list) or not all(isinstance(e, str) and e for e in events):
        raise BadTargets(f'{where}: events: a list of actions, as in ["state:*", "rollback"]')
    secret = plain.get("secret_file")
    if secret is not None and not isinstance(secret, str):
        raise BadTargets(f"{where}: secret_file: a path")
    return Target(
        name=name,
        url=url,
        kind=kind,
        binary=mode == "binary",
        secret_file=None if secret is None else file.parent / secret,
        events=tuple(events),
    )


class Notifier:
    """Follows the audit for one receiver. One a receiver, in the controller that leads."""

    def __init__(
        self,
        engine: Engine,
        target: Target,
        *,
        source: str,
        clock: Callable[[], float] = time.time,
        patience: float = PATIENCE,
    ) -> None:
        self._engine, self._target, self._source = engine, target, source
        self._clock, self._patience = clock, patience

    def run(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                sent = self.run_once()
            except Exception:  # the outermost turn: logged, and tried again from the database
                log.exception("notify", target=self._target.name)
                sent = 0
            if not sent:
                stopping.wait(_LOOK)

    def run_once(self) -> int:
        """Send what is due; answers how many events were taken."""
        place = self._place()
        now = self._clock()
        if place.next_at > now:
            return 0
        with reading(self._engine) as conn:
            rows = views.list_audit(conn, after=place.seq, limit=_BATCH)
        taken = 0
        for row in rows:
            if self._target.wants(row["action"]):
                if not self._deliver(row, place.failures if not taken else 0):
                    return taken
                taken += 1
        if rows:
            self._go_on(rows[-1]["seq"])  # past what it does not want
        return taken

    def _deliver(self, row: Mapping[str, Any], failures: int) -> bool:
        """Send one event; True when the next one may be sent."""
        try:
            self._send(row)
        except Refused as error:
            if failures + 1 < MOST_REFUSALS:
                self._wait(failures + 1, str(error))
                return False
            self._count("refused")
            log.error("notify_given_up", target=self._target.name, seq=row["seq"], why=str(error))
        except OSError as error:
            self._wait(failures + 1, str(error))
            return False
        else:
            self._count("taken")
        self._go_on(row["seq"])
        return True

    def _send(self, row: Mapping[str, Any]) -> None:
        plain = cloudevents.event(row, self._source)
        if self._target.kind == "apprise":
            _by_apprise(self._target.url, plain)
            return
        file = self._target.secret_file
        secret = None if file is None else file.read_bytes().strip()
        made = cloudevents.message(
            plain, binary=self._target.binary, secret=secret, now=self._clock()
        )
        _post(self._target.url, made, self._patience)

    # -- the place in the audit --------------------------------------------------------------------

    def _place(self) -> Any:
        here = deliveries.c.target == self._target.name
        with reading(self._engine) as conn:
            row = conn.execute(select(deliveries).where(here)).first()
            head = audit.head(conn)
        if row is not None:
            return row
        with writing(self._engine) as conn:
            conn.execute(
                insert(deliveries).values(
                    target=self._target.name, seq=head[0] if head else 0, failures=0, next_at=0.0,
                    error="",
                )
            )  # fmt: skip
            return conn.execute(select(deliveries).where(here)).one()

    def _go_on(self, seq: int) -> None:
        self._put(seq=seq, failures=0, next_at=0.0, error="")

    def _wait(self, failures: int, error: str) -> None:
        self._count("failed")
        after = min(LONGEST, 0.5 * 2.0 ** min(failures, 12))
        log.warning("notify", target=self._target.name, again_in_seconds=after, why=error[:200])
        self._put(failures=failures, next_at=self._clock() + after, error=error[:500])

    def _put(self, **values: Any) -> None:
        with writing(self._engine) as conn:
            conn.execute(
                update(deliveries).where(deliveries.c.target == self._target.name).values(**values)
            )

    def _count(self, result: str) -> None:
        metrics.count("bellwether_notifications_total", target=self._target.name, result=result)


def start(
    engine: Engine, targets: Sequence[Target], source: str, stopping: threading.Event
) -> list[threading.Thread]:
    """A thread for each receiver."""
    threads = [
        threading.Thread(
            target=Notifier(engine, target, source=source).run,
            args=(stopping,),
            name=f"notify-{target.name}",
            daemon=True,
        )
        for target in targets
    ]
    for thread in threads:
        thread.start()
    return threads


def _post(url: str, made: cloudevents.Message, patience: float) -> None:
    """Raises Refused for the event's own fault, OSError for what may be over soon."""
    import httpx2

    try:
        with httpx2.Client(timeout=patience, follow_redirects=False) as client:
            answer = client.post(url, content=made.body, headers=dict(made.headers))
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise OSError(f"{type(error).__name__}") from None
    if answer.is_success:
        return
    if 400 <= answer.status_code < 500 and answer.status_code not in (401, 403, 408, 425, 429):
        raise Refused(f"HTTP {answer.status_code}")
    raise OSError(f"HTTP {answer.status_code}")


def _by_apprise(url: str, plain: Mapping[str, Any]) -> None:
    try:
        import apprise
    except ImportError:
        raise OSError("apprise is not installed: pip install 'bellwether[notify]'") from None
    sender = apprise.Apprise()
    if not sender.add(url):
        raise OSError("apprise does not know this URL")
    data = plain["data"]
    body = "\n".join(str(part) for part in (data["sentence"], data.get("url", "")) if part)
    if not sender.notify(title=f"Bellwether: {plain['subject']}", body=body):
        raise OSError("apprise could not deliver it")
