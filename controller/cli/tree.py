"""A rollout as a tree for a terminal: state and sentence first, then its steps, holds, decisions.

Text only from here down: what people wrote is shown as `Text`, never read as markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from controller.rollout.model import quoted

_STYLE = {
    "Completed": "green",
    "Soaking": "cyan",
    "Progressing": "cyan",
    "Pending": "cyan",
    "Paused": "yellow",
    "Inconclusive": "yellow",
    "NoMembers": "yellow",
    "Held": "red",
    "RollingBack": "red",
    "RolledBack": "red",
    "Superseded": "dim",
}
_DONE = frozenset({"Completed", "Superseded"})


def fleets(found: Mapping[str, Any]) -> RenderableType:
    """All rollouts, by fleet; what is wrong with Git and what is stopped above them."""
    git = found["git"]
    head = Text("Git ", style="dim")
    head.append(git["accepted"][:12] if git["accepted"] else "no commit accepted yet")
    head.append(f"  {git['author']}", style="dim")
    parts: list[RenderableType] = [head]
    for stop in found["stops"]:
        said = (
            f"STOPPED {stop['scope']} {stop['value']}: {quoted(stop['reason'])} ({stop['actor']})"
        )
        parts.append(Text(said, style="bold red"))
    if git["refused"]:
        parts.append(Text(f"Git: {git['refused']}", style="bold yellow"))
    for problem in git["problems"]:
        parts.append(Text(f"  {problem.get('text', problem)}", style="yellow"))
    for name, sentence in git["notices"].items():
        parts.append(Text(f"  {name}: {sentence}", style="yellow"))
    for fleet in sorted({r["fleet"] for r in found["rollouts"]}):
        branch = Tree(Text(fleet, style="bold"), guide_style="dim")
        for about in (r for r in found["rollouts"] if r["fleet"] == fleet):
            branch.add(Group(_head(about), Text(about["sentence"], style="dim")))
        parts.append(branch)
    if not found["rollouts"]:
        parts.append(Text("No rollout yet: commit a Rollout, or see `bellwether init`"))
    return Group(*parts)


def rollout(found: Mapping[str, Any]) -> RenderableType:
    """One rollout with its steps, holds and latest decisions."""
    about = found["rollout"]
    tree = Tree(Group(_head(about), Text(about["sentence"])), guide_style="dim")
    members = about["members"]["steps"]
    for number, (name, step) in enumerate(_steps(about)):
        tree.add(_step(about, number, name, step, members.get(str(number), {})))
    if "-1" in members:
        tree.add(Text(f"back to what they ran before: {counts(members['-1'])}"))
    for hold in about["holds"]:
        ended = f", lifted by {hold['liftedBy']}" if hold["liftedAt"] else ""
        where = hold["commit"][:12] if hold["commit"] else "not yet in Git"
        style = "dim" if hold["liftedAt"] else "red"
        said = f"hold {hold['id']}: {quoted(hold['reason'])} ({hold['actor']}, {where}{ended})"
        tree.add(Text(said, style=style))
    if found["decisions"]:
        latest = tree.add(Text("decisions, newest first", style="dim"))
        for entry in found["decisions"]:
            line = Text(f"{entry['at'][:19]}Z  ", style="dim")
            line.append(f"{entry['verdict']}  ", style="bold")
            line.append(entry["sentence"])
            latest.add(line)
    tail = f"fleet {about['fleet']} · commit {about['commit'][:12]} by {about['author']}"
    return Group(tree, Text(tail, style="dim"))


def counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {state}" for state, n in sorted(numbers.items())) or "none yet"


def _head(about: Mapping[str, Any]) -> Text:
    style = _STYLE.get(about["state"], "")
    line = Text(f"{about['state']:<12}", style=f"bold {style}".strip())
    line.append(f" {about['name']} → ", style="bold")
    line.append(about["release"], style="bold")
    total = len(_steps(about))
    if total and about["state"] not in _DONE:
        line.append(f"  step {about['step'] + 1} of {total}", style=style)
    line.append(f"  {counts(about['members']['devices'])}", style="dim")
    line.append(f"  revision {about['revision']}", style="dim")
    return line


def _steps(about: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, step) of every wave; a fix goes first to the devices that ran the fault."""
    named = [
        (f"{s['cohort']} {'all' if s['percent'] >= 1 else format(s['percent'], '.0%')}", s)
        for s in about["steps"]
    ]
    fixes = about.get("fixes")
    return [(f"{fixes}'s devices", about["steps"][0]), *named] if fixes else named


def _step(
    about: Mapping[str, Any],
    number: int,
    name: str,
    step: Mapping[str, Any],
    members: Mapping[str, int],
) -> Text:
    done = number < about["step"] or about["state"] in _DONE
    here = number == about["step"] and not done
    sign, style = ("✔", "green") if done else ("●", "cyan") if here else ("○", "dim")
    line = Text(f"{sign} {number + 1} {name}", style=style)
    line.append(f"  {counts(members)}" if members or here else "")
    if here:
        line.append(f"  soaked {about['soakSeconds']:,.0f} s of {step['soak']:,.0f} s", style="dim")
    if step["pause"] is not None:
        line.append("  then waits for `promote`", style="dim")
    return line
