"""`bellwether`: the command line. One file per noun; each registers its commands here.

Modules import at their top what is light (typer); everything else inside the command, so that
`--help` answers in less than 0.3 s. Exit codes: 0 ok · 1 error · 2 usage · wait: 4, 5, 6.
"""

from __future__ import annotations

import importlib
import importlib.util

import typer

_NOUNS = (
    "demo",
    "serve",
    "manifests",
    "plan",
    "status",
    "explain",
    "verbs",
    "approve",
    "replay",
    "devices",
    "release",
    "tokens",
    "broker",
    "simulate",
    "evidence",
    "doctor",
    "bench",
    "completion",
)

app = typer.Typer(
    name="bellwether",
    help="GitOps releases for fleets of devices: canary, widen, roll back, fix forward.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: loading Rich costs 0.3 s
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _noun in _NOUNS:
    if importlib.util.find_spec(f"controller.cli.{_noun}") is not None:
        importlib.import_module(f"controller.cli.{_noun}").register(app)


def main() -> None:
    """The entry point `bellwether`: errors go to stderr and say what to do."""
    import sys

    from controller.cli.errors import Failed

    try:
        app()
    except Failed as error:
        print(f"bellwether: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        from controller.cli.errors import explained

        if (message := explained(error)) is None:
            raise
        print(f"bellwether: {message}", file=sys.stderr)
        sys.exit(1)
