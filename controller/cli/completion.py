"""`completion SHELL`: prints the script that completes commands and options in a shell."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Shell(str, Enum):  # noqa: UP042 - typer reads the values of str enums
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"
    POWERSHELL = "powershell"


def register(app: typer.Typer) -> None:
    app.command("completion")(completion)


def completion(
    shell: Annotated[Shell, typer.Argument(help="bash, zsh, fish or powershell.")],
) -> None:
    """Print a completion script, e.g. `source <(bellwether completion bash)`."""
    from typer._completion_shared import get_completion_script

    typer.echo(
        get_completion_script(
            prog_name="bellwether", complete_var="_BELLWETHER_COMPLETE", shell=shell.value
        )
    )
