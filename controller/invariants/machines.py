"""I9 a device runs old or new, always · I10 nothing activates against its guard · I1: the lease."""

from __future__ import annotations

from collections.abc import Iterator

from controller.facts import Finding, Look


def machines(look: Look) -> Iterator[Finding]:
    for truth in look.seen.devices:
        for component, running in truth.active.items():
            if running not in truth.had:
                yield Finding(
                    invariant="I9",
                    what=f"{truth.device} runs {running[:19]} of {component}, never whole there",
                    do="Take it out of service",
                )
        if truth.settled and dict(truth.active) != dict(truth.running):
            yield Finding(
                invariant="I9",
                what=f"{truth.device} believes {dict(truth.running)}, and runs {truth.active}",
                do="Its journal and its slots disagree: restart its agent",
            )
        for start in truth.starts:
            if start.guards:
                yield Finding(
                    invariant="I10",
                    what=f"{truth.device} activated while {', '.join(start.guards)} was not true",
                    do="Take the agent's version out of service",
                )
            if start.late:
                yield Finding(
                    invariant="I1",
                    what=f"{truth.device} installed under a lease that had passed",
                    do="Take the agent's version out of service",
                )
