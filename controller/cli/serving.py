"""Reads and shows the settings of `serve`; faults end the command with exit code 2."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from controller.cli.errors import Failed

if TYPE_CHECKING:
    from controller.settings import Settings


def load(flags: Mapping[str, Any]) -> Settings:
    from controller.settings import SettingsError
    from controller.settings import load as read

    try:
        return read(flags)
    except SettingsError as error:
        raise Failed(str(error), 2) from None


def show(settings: Settings) -> None:
    print(json.dumps(settings.shown(), indent=2, sort_keys=True))
