"""The terminal's tree: state and sentence first, steps with a fix's wave, nobody's markup."""

from __future__ import annotations

from typing import Any

from rich.console import Console, RenderableType

from controller.cli import tree


def shown(what: RenderableType) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as caught:
        console.print(what)
    return caught.get()


def about(**changes: Any) -> dict[str, Any]:
    step = {"percent": 1.0, "soak": 60.0, "pause": None}
    return {
        "name": "cars", "fleet": "eu", "release": "fsd-2", "state": "Soaking",
        "sentence": "WAITING — [red]not markup[/red]", "revision": 3, "step": 1, "commit": "c" * 40,
        "author": "ann", "soakSeconds": 5.0, "holds": [], "fixes": None,
        "steps": [{"cohort": "canary", **step}, {"cohort": "general", **step}],
        "members": {"devices": {"updated": 3}, "steps": {"0": {"updated": 3}}, "control": 0},
    } | changes  # fmt: skip


def test_steps_say_what_is_done_and_where_it_stands() -> None:
    text = shown(tree.rollout({"rollout": about(), "decisions": []}))
    assert "✔ 1 canary all  3 updated" in text
    assert "● 2 general all  none yet  soaked 5 s of 60 s" in text
    assert "[red]not markup[/red]" in text


def test_a_fix_has_its_own_first_step() -> None:
    text = shown(tree.rollout({"rollout": about(fixes="fsd-1", step=0), "decisions": []}))
    assert "● 1 fsd-1's devices  3 updated" in text
    assert "step 1 of 3" in text


def test_the_list_goes_by_fleet_and_says_what_is_wrong_first() -> None:
    git = {"accepted": None, "author": "", "refused": "history was rewritten", "problems": [],
           "notices": {}}  # fmt: skip
    stop = {"scope": "all", "value": "", "reason": "recall", "actor": "ann"}
    text = shown(tree.fleets({"git": git, "stops": [stop], "rollouts": [about()]}))
    assert text.index("STOPPED") < text.index("history was rewritten") < text.index("eu")
    empty = shown(tree.fleets({"git": git, "stops": [], "rollouts": []}))
    assert "No rollout yet" in empty
