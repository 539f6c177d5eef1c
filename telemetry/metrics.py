"""Every Prometheus name and label, in one list; all packages count here.

Labels never hold a device id: their values must stay few however large the fleet is.

The roles are processes: `bellwether serve` names a directory in PROMETHEUS_MULTIPROC_DIR, each
process keeps its values there, and whichever is asked answers for all of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

METRICS: tuple[Metric, ...] = (
    # ingest
    Metric("bellwether_ingest_messages_total", _C, "Device messages counted for the first time"),
    Metric("bellwether_ingest_refused_total", _C, "Device messages not counted", ("reason",)),
    Metric("bellwether_ingest_clock_shifted_total", _C, "Messages with an implausible clock"),
    Metric("bellwether_ingest_batches_total", _C, "Committed batches"),
    Metric("bellwether_ingest_batch_seconds", _H, "Time to read and commit one batch"),
    Metric("bellwether_ingest_queue_messages", _G, "Messages received and not yet committed"),
    Metric("bellwether_ingest_paused", _G, "1 while the queue is full and nothing is read"),
    Metric("bellwether_ingest_store_errors_total", _C, "Commits that failed and are tried again"),
    Metric("bellwether_ingest_watermark", _G, "Number of the last batch this process committed"),
    Metric("bellwether_outbox_dropped_total", _C, "Messages that devices say they lost"),
    # broker connections
    Metric("bellwether_broker_connected", _G, "1 while the session stands", ("client",)),
    Metric("bellwether_broker_connects_total", _C, "Sessions opened", ("client",)),
    Metric("bellwether_broker_published_total", _C, "Messages acknowledged by the broker"),
    # controller
    Metric("bellwether_loop_ticks_total", _C, "Turns of the rollout loop", ("result",)),
    Metric("bellwether_loop_tick_seconds", _H, "Duration of one turn"),
    Metric("bellwether_controller_leading", _G, "1 while this controller leads"),
    Metric("bellwether_controller_term", _G, "Term of this controller, while it leads"),
    Metric("bellwether_decisions_total", _C, "Recorded decisions", ("verdict",)),
    Metric("bellwether_rollouts", _G, "Rollouts by state", ("state",)),
    Metric("bellwether_devices", _G, "Devices by registry status", ("status",)),
    Metric("bellwether_orders_published_total", _C, "Orders acknowledged by the broker", ("kind",)),
    Metric("bellwether_orders_pending", _G, "Recorded orders that the broker has not yet"),
    Metric("bellwether_commands_total", _C, "Commands of people", ("kind", "result")),
    Metric("bellwether_git_fetches_total", _C, "Polls of the fleet repository", ("result",)),
    Metric("bellwether_git_head_time_seconds", _G, "When the accepted head was accepted"),
    Metric("bellwether_manifest_problems", _G, "Problems in the fleet repository", ("severity",)),
    Metric("bellwether_holds_unrecorded", _G, "Holds and lifts not yet in Git"),
    Metric("bellwether_audit_records", _G, "Length of the audit chain"),
    Metric("bellwether_audit_head", _G, "First 48 bits of the hash of its newest row"),
    Metric(
        "bellwether_notifications_total",
        _C,
        "Events of receivers, by what became of them",
        ("target", "result"),
    ),
    # HTTP
    Metric("bellwether_http_requests_total", _C, "Answers", ("route", "method", "status")),
    Metric("bellwether_http_request_seconds", _H, "Time to answer", ("route",)),
)

REGISTRY = CollectorRegistry()


def _made(metric: Metric) -> Counter | Gauge | Histogram:
    if metric.kind is Kind.HISTOGRAM:
        return Histogram(
            metric.name, metric.help, metric.labels, buckets=_SECONDS, registry=REGISTRY
        )
    if metric.kind is Kind.COUNTER:
        return Counter(metric.name, metric.help, metric.labels, registry=REGISTRY)
    return Gauge(
        metric.name,
        metric.help,
        metric.labels,
        registry=REGISTRY,
        multiprocess_mode="mostrecent",
    )


_MADE = {metric.name: _made(metric) for metric in METRICS}


def count(name: str, amount: float = 1, /, **labels: str) -> None:
    """Add to a counter; KeyError for a name that is not in the list."""
    found = _MADE[name]
    if not isinstance(found, Counter):
        raise TypeError(f"{name} is no counter")
    (found.labels(**labels) if labels else found).inc(amount)


def gauge(name: str, value: float, /, **labels: str) -> None:
    found = _MADE[name]
    if not isinstance(found, Gauge):
        raise TypeError(f"{name} is no gauge")
    (found.labels(**labels) if labels else found).set(value)


def observe(name: str, value: float, /, **labels: str) -> None:
    found = _MADE[name]
    if not isinstance(found, Histogram):
        raise TypeError(f"{name} is no histogram")
    (found.labels(**labels) if labels else found).observe(value)


def render() -> bytes:
    """The exposition text of `GET /metrics`."""
    if not shared():
        return generate_latest(REGISTRY)
    everybody = CollectorRegistry()
    multiprocess.MultiProcessCollector(everybody)  # type: ignore[no-untyped-call]
    return generate_latest(everybody)


def shared() -> bool:
    """Do several processes answer as one?"""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ
