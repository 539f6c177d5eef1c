"""I4 what is acknowledged is never lost · I5 every message is counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from controller.facts import Finding, Look


def counting(look: Look) -> Iterator[Finding]:
    twice = [key for key, n in Counter(look.tables.health).items() if n > 1]
    for device, boot, seq in twice[:20]:
        yield Finding(
            invariant="I5",
            what=f"message {seq} of boot {boot[:12]} of {device} was counted twice",
            do="Keep the telemetry database: its evidence is wrong; pause the rollouts it feeds",
        )
    for device, boot, seq in look.tables.health:
        counted = look.tables.boots.get((device, boot))
        if counted is not None and not counted.has(seq):
            yield Finding(
                invariant="I5",
                what=f"message {seq} of {device} is kept, and would be counted again",
                do="Rows of telemetry_boots were changed: restore the telemetry database",
            )
            break
    for one in look.tables.sums:
        for what, total in (("hourly sums", one.hours), ("running sums", one.ever)):
            if abs(one.messages - total) > 1e-6 * max(1.0, one.messages):
                yield Finding(
                    invariant="I5",
                    what=f"{one.counter} of {one.device}: {one.messages:g} in messages, "
                    f"{total:g} in {what}",
                    do="Restore the telemetry database; if the device invents names or numbers, "
                    "quarantine it",
                )
    for truth in look.seen.devices:
        for boot, seq in truth.acknowledged if truth.honest else ():
            counted = look.tables.boots.get((truth.device, boot))
            if counted is None or not counted.has(seq):
                yield Finding(
                    invariant="I4",
                    what=f"message {seq} of boot {boot[:12]} of {truth.device} was acknowledged "
                    "and is not in the store",
                    do="The telemetry database lost commits: check its disk and its backups",
                )
                break
